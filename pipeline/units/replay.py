"""Units of the replay: hypergradients of a shard of samples, or contributions to a block of targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...storage import layout
from ...storage.curvature import Curvature, read_curvature
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...storage.trajectory import Trajectory
from ...workers.recursion.conservation import RowSums, check_sums
from ...workers.reference.growth import check_finite
from ...workers.replay.base import Replay
from ...workers.replay.make import make_replay
from ...workers.training.training import Training
from ..executors.base import Report, Unit
from ..plan.sharding import WRITE_CHUNKS
from ..reading.unit_values import ReplayValues
from ..spec.targets import store_of
from ..vocabulary import ADJOINT, CARRIED, EKFAC, FAST, FORWARD
from .reduce import bounds
from .work import Result, TrainingWork, recorded, rows_of

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
    """

    method: str
    form: str
    tracked: Integers
    targets: str
    share: float = 1.0

    def basis(self, run: RunDirectory) -> Curvature | None:
        """Return the curvature of the form, where it has one."""
        if self.form != EKFAC:
            return None
        return read_curvature(run.path(layout.curvature(self.form)), run.vouched)

    def target_gradients(self, run: RunDirectory) -> RowStore:
        """Return the gradients of the targets."""
        return RowStore.open(run.path(store_of(self.targets)), "gradient", run.vouched)

    def finite(
        self, values: npt.NDArray[np.floating], what: str, trajectory: Trajectory, *, exact: bool = False
    ) -> npt.NDArray[np.floating]:
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
class ReplayWork(CarryingWork):
    """Handler of shards of tracked samples."""

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the hypergradients of a shard."""
        start, stop = rows_of(unit)
        training, trajectory = self.training(), recorded(run)
        tracked, bent = self.tracked[start:stop], self.basis(run)
        replay = make_replay(
            self.form, FORWARD, training, trajectory, tracked, curvature=bent, share=self.share
        ).run(report)
        base = layout.hypergradients(self.method)
        store = RowStore.open(run.path(base), "hypergradient", run.vouched)
        sums = RowSums(training.layout.entries)
        for first, last in bounds(stop - start, WRITE_CHUNKS * store.chunk_rows):
            rows = replay.numpy(first, last)
            self.finite(rows, "hypergradients", trajectory)
            store.write(start + first, rows)
            if self.lawful(training):
                sums.add(rows)
        replay.close()
        files = [f"{base}/{name}" for name in store.files(start, stop)]
        notes = replay.told()
        if self.lawful(training):
            notes["law"] = sums.values(replay.sink.rest)
        return files, ReplayValues(rows=stop - start, start=start, steps=training.steps, **notes)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdjointWork(CarryingWork):
    """Handler of blocks of targets."""

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the contributions of all tracked samples to a block of targets."""
        start, stop = rows_of(unit)
        training, trajectory = self.training(), recorded(run)
        targets = self.target_gradients(run).read(start, stop)
        base = layout.by_test(self.method)
        store = RowStore.open(run.path(base), "contribution", run.vouched)
        back = make_replay(
            self.form,
            ADJOINT,
            training,
            trajectory,
            self.tracked,
            curvature=self.basis(run),
            share=self.share,
            targets=targets,
            tile=store.chunk_rows,
        )
        found, notes = back.run(report).contributions(), back.told()
        back.close()
        if self.lawful(training):
            rest = back.sink.rest if isinstance(back, Replay) else None
            check_sums(found, targets, trajectory, notes["ways"]["noise"], rest)
            notes["lawful"] = True
        store.write(start, self.finite(found, "contributions", trajectory))
        files = [f"{base}/{name}" for name in store.files(start, stop)]
        return files, ReplayValues(rows=stop - start, start=start, steps=training.steps, **notes)
