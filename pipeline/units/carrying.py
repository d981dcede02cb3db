"""What handlers share that carry something through the recursion, and those that store rows of hypergradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...storage import layout
from ...storage.curvature import Curvature, read_curvature
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...storage.trajectory import Trajectory
from ...workers.data.labels import with_labels
from ...workers.model.row_map import RowMap
from ...workers.reference.growth import check_finite
from ...workers.replay.sampled import both_ways, rows_of_shard
from ...workers.training.training import Training
from ..reading.unit_values import LossValues
from ..spec.targets import store_of
from ..vocabulary import CARRIED, EKFAC, FAST
from .work import TrainingWork

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CarryingWork(TrainingWork):
    """A handler that carries something through the recursion, in one form of the Hessian.

    Attributes:
        method: Name of the stores that are filled.
        form: Name of the Hessian's form.
        tracked: Train indices asked for, (n,).
        targets: Kind of the targets.
        share: Of the Hessian in the products of a form that carries vectors.
        row_map: What is kept of a row; None: all.
    """

    method: str
    form: str
    tracked: Integers
    targets: str
    share: float = 1.0
    row_map: RowMap | None = None

    def basis(self, run: RunDirectory) -> Curvature | None:
        """Return the curvature of the form, where it has one."""
        if self.form != EKFAC:
            return None
        return read_curvature(run.path(layout.curvature(self.form)), run.vouched)

    def target_gradients(self, run: RunDirectory) -> RowStore:
        """Return the gradients of the targets."""
        return RowStore.open(run.path(store_of(self.targets)), "gradient", run.vouched)

    def finite(self, values: Floats, what: str, trajectory: Trajectory, *, exact: bool = False) -> Floats:
        """Return ``values``, unless one is not finite: nothing of that kind is ever stored.

        Args:
            values: What is to be stored.
            what: In words.
            trajectory: The record.
            exact: Whether they were carried by exact products whatever the form is.
        """
        return check_finite(
            values,
            what=f"{what} of {self.method}",
            recipe=self.recipe,
            compute=self.compute,
            trajectory=trajectory,
            tracked=self.tracked,
            exact=exact or self.form in CARRIED,
            share=1.0 if exact else self.share,
        )

    def lawful(self, training: Training) -> bool:
        """Whether the rows of all shards must add up to what training did to the weights."""
        return self.form == FAST and len(self.tracked) == training.n_train and not training.holds_statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class StoringWork(CarryingWork):
    """A handler that writes hypergradients, some of which it holds whole to say what storing them loses.

    Attributes:
        sampled_tests: Test indices with which it is sampled what storing rows in fewer numbers or bits loses.
        test_labels: Class of every sample of the test dataset, -1 where there is none.
    """

    sampled_tests: Integers
    test_labels: Integers

    def sampled(self, store: RowStore, rows: int, row_bytes: int) -> list[int]:
        """Return the rows of a shard of ``rows`` that are held whole; none where nothing is lost."""
        exact = store.precision is None and store.dtype == self.compute.dtype
        if exact and not (self.row_map is not None and self.row_map.folds):
            return []
        return rows_of_shard(rows, len(self.tracked), row_bytes)

    def narrow(self, rows: Floats, store: RowStore, trajectory: Trajectory) -> Floats:
        """Return rows in the type of their store."""
        if store.dtype == self.compute.dtype:
            return rows
        with np.errstate(over="ignore"):
            narrow: Floats = rows.astype(store.dtype)
        return self.finite(narrow, f"hypergradients as {store.dtype}", trajectory)

    def labelled(self) -> Training:
        """Return a fresh training whose test samples have the labels that are known."""
        return Training(with_labels(self.recipe, self.test_labels), self.compute)

    def loss(
        self,
        training: Training,
        trajectory: Trajectory,
        train_index: Integers,
        whole: Sequence[Floats],
        stored: Sequence[Floats],
    ) -> LossValues:
        """Return the contributions of sampled rows by whole rows, and by what is stored of them.

        Args:
            training: See `labelled`.
            trajectory: The record.
            train_index: Of the sampled rows.
            whole: These in the parameters that are kept, piece by piece.
            stored: The same as they are stored.
        """
        right, found = both_ways(
            training,
            trajectory,
            self.sampled_tests,
            np.concatenate(whole),
            np.concatenate(stored),
            self.row_map,
        )
        return LossValues(
            train_index=tuple(train_index.tolist()),
            test_index=tuple(self.sampled_tests.tolist()),
            whole=tuple(map(tuple, right.tolist())),
            stored=tuple(map(tuple, found.tolist())),
        )
