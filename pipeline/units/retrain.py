"""Which retrainings an evaluation needs, as units of work, and the handler that does one.

A unit is named by what it trains on, so the same removal asked for twice is done once, and methods
added later find the retrainings that are there. Letters: N training samples, n of them tracked
(only those are ever removed), M test samples.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ...storage import layout
from ...storage.contributions import write_table
from ...storage.files import read_bytes
from ...storage.rundir import RunDirectory
from ...storage.trajectory import open_trajectory
from ...workers.data.user_code import user_code
from ...workers.memory import peak_bytes, reset_peak
from ...workers.recipe import Recipe
from ...workers.training.retrain import (
    SampleLosses,
    WeightedTraining,
    retrain_subset,
    retrain_weighted,
    sample_losses,
    test_losses,
)
from ...workers.training.training import Compute, Training
from ..executors.base import Report, Unit
from ..vocabulary import RETRAIN, Way

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
LOSSES = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("test_index", pa.int32(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("correct", pa.int8(), nullable=False),
    ]
)
"""One row a (retraining, test sample); ``correct`` is 1, 0, or -1 where unknown."""

WEIGHTS = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
    ]
)
"""The training samples whose weight a retraining changed, before any scaling; 0: removed."""

TRAINING_LOSS = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("final_loss", pa.float64(), nullable=False),
        pa.field("mean_loss", pa.float64(), nullable=False),
    ]
)
"""Of each tracked sample: its loss at w_T in eval mode, and the mean over its visits in training."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Change:
    """What one retraining does to the training samples.

    Attributes:
        way: How it trains; see ``workers.training.retrain``.
        index: Train indices whose weight changes, ascending.
        weight: Their new weights, before `weights` scales all; 0 removes.
    """

    way: Way
    index: Integers
    weight: Floats

    @property
    def unit(self) -> str:
        """Name of the unit: the way and a digest of the weights."""
        digest = hashlib.sha256(self.index.astype("<i8").tobytes())
        digest.update(self.weight.astype("<f8").tobytes())
        return f"{self.way}-{digest.hexdigest()[:20]}"

    def weights(self, n_train: int) -> Floats:
        """Return the weight of every training sample, (N,).

        Except where the way is ``weighted`` they are scaled to a mean of 1: a loss that is averaged
        over what is left counts that more. For ``subset`` this is what the average comes to.
        """
        weights = np.ones(n_train)
        weights[self.index] = self.weight
        return weights if self.way == "weighted" else weights * (n_train / weights.sum())

    def as_unit(self) -> Unit:
        """Return the unit of work."""
        return Unit(stage=RETRAIN, name=self.unit, arguments={"change": self})


def unchanged() -> Change:
    """Return the retraining that repeats the record."""
    nothing = np.empty(0)
    return Change(way="weighted", index=nothing.astype(np.int64), weight=nothing)


def removal(index: npt.ArrayLike, way: Way) -> Change:
    """Return the retraining without the given training samples."""
    removed = np.unique(np.asarray(index, dtype=np.int64))
    return Change(way=way, index=removed, weight=np.zeros(len(removed)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A retraining and why it is asked for.

    Attributes:
        kind: ``subset``, ``one``, ``remove`` or ``perturb``.
        labels: What tells it from others of its kind: fraction, index, ranking, direction, size.
        change: What is retrained.
    """

    kind: str
    labels: Mapping[str, Any] = field(default_factory=dict)
    change: Change


def draw(seed: int, *keys: int) -> np.random.Generator:
    """Return the generator of one draw: it depends on the seed and the keys alone."""
    return np.random.Generator(np.random.PCG64([seed, *keys]))


def subsets(tracked: Integers, fraction: float, count: int, seed: int, way: Way) -> list[Trial]:
    """Return ``count`` random subsets that keep ``fraction`` of the tracked samples.

    Subset k is the same whatever ``count`` is.
    """
    removed = len(tracked) - round(fraction * len(tracked))
    return [
        Trial(
            kind="subset",
            labels={"fraction": fraction, "index": k},
            change=removal(draw(seed, 1, round(fraction * 1e9), k).permutation(tracked)[:removed], way),
        )
        for k in range(count)
    ]


def leave_one_out(tracked: Integers, count: int, seed: int) -> list[Trial]:
    """Return the removals of ``count`` random samples, one at a time, as C(i, j) defines them."""
    chosen = np.sort(draw(seed, 2).permutation(tracked)[:count])
    return [
        Trial(kind="one", labels={"train_index": int(i)}, change=removal([i], "weighted")) for i in chosen
    ]


def perturbations(
    tracked: Integers, n_train: int, sizes: tuple[float, ...], seed: int, directions: int = 2
) -> list[Trial]:
    """Return retrainings whose weights are 1 +- size, the signs drawn at random.

    In norm a size s is the removal of a share s^2 of the samples.
    """
    trials = []
    for k in range(directions):
        signs = draw(seed, 3, k).choice([-1.0, 1.0], size=n_train)[tracked]
        for size in sizes:
            change = Change(way="weighted", index=tracked, weight=1 + size * signs)
            trials.append(Trial(kind="perturb", labels={"size": size, "index": k}, change=change))
    return trials


@dataclass(kw_only=True)
class RetrainTasks:
    """Handler of the retrainings; picklable, one per process.

    Attributes:
        uri: The run directory.
        recipe: The user's recipe, overrides applied.
        compute: How every process computes, as in the record.
        n_train: N.
        tracked: Train indices of the run, (n,).
        tested: Test indices of the run, (M,).
    """

    uri: str
    recipe: Recipe
    compute: Compute
    n_train: int
    tracked: Integers
    tested: Integers

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        """Retrain, evaluate, commit; return the manifest's values."""
        begun = time.perf_counter()
        reset_peak()
        run = RunDirectory(self.uri)
        change: Change = unit.arguments["change"]
        with user_code(f"{unit.stage} {unit.name} raised"):
            training = self._train(run, change, report)
            found = test_losses(training, self.tested)
        files = [self._write(run, unit.name, layout.LOSSES, LOSSES, self._losses(found))]
        if len(change.index):
            table = {"train_index": change.index, "weight": change.weight}
            files.append(self._write(run, unit.name, layout.WEIGHTS, WEIGHTS, table))
        if isinstance(training, WeightedTraining) and not len(change.index):
            files.append(
                self._write(run, unit.name, layout.TRAINING_LOSS, TRAINING_LOSS, self._own(training))
            )
        known = found.correct[found.correct >= 0]
        values = {
            "way": change.way,
            "changed": len(change.index),
            "loss": float(found.loss.mean()),
            "accuracy": float(known.mean()) if len(known) else None,
            "seconds": time.perf_counter() - begun,
            "peak_bytes": peak_bytes(),
        }
        run.commit(unit.stage, unit.name, files, values)
        return values

    def _train(self, run: RunDirectory, change: Change, report: Callable[[int, int], None]) -> Training:
        if change.way == "subset":
            kept = np.setdiff1d(np.arange(self.n_train), change.index)
            return retrain_subset(self.recipe, self.compute, kept, report)
        trajectory = open_trajectory(run.path(layout.TRAJECTORY))
        return retrain_weighted(self.recipe, self.compute, trajectory, change.weights(self.n_train), report)

    def _losses(self, found: SampleLosses) -> dict[str, npt.NDArray[Any]]:
        return {"test_index": self.tested, "loss": found.loss, "correct": found.correct}

    def _own(self, training: WeightedTraining) -> dict[str, npt.NDArray[Any]]:
        final = sample_losses(training, training.dataset, self.tracked)
        visits = np.bincount(training.batches[training.batches >= 0], minlength=self.n_train)
        mean = training.visited / np.maximum(visits, 1)
        return {"train_index": self.tracked, "final_loss": final.loss, "mean_loss": mean[self.tracked]}

    def _write(
        self,
        run: RunDirectory,
        unit: str,
        kind: str,
        schema: pa.Schema,
        columns: Mapping[str, npt.NDArray[Any]],
    ) -> str:
        relative = layout.evaluation(kind, unit)
        rows = len(next(iter(columns.values())))
        table = pa.table({"unit": pa.array([unit] * rows, pa.string()), **columns})
        write_table(run.path(relative), table.cast(schema), schema)
        return relative


def read_part(run: RunDirectory, kind: str, unit: str) -> pa.Table:
    """Return the table that a retraining wrote: ``retrain``, ``weights`` or ``training_loss``."""
    return pq.read_table(pa.BufferReader(read_bytes(run.path(layout.evaluation(kind, unit)))))
