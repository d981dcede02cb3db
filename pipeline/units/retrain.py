"""Which retrainings an evaluation needs, as units of work, and the handler that does one.

A unit is named by what it trains on, so the same removal asked for twice is done once, and methods
added later find the retrainings that are there. Letters: N training samples, n of them tracked
(only those are ever removed), M test samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...storage import layout
from ...storage.contributions import write_table
from ...storage.rundir import RunDirectory
from ...storage.schemas import RETRAIN_LOSSES, RETRAIN_WEIGHTS, TRAINING_LOSS
from ...storage.tables import read_table
from ...workers.training.retrain import (
    SampleLosses,
    WeightedTraining,
    retrain_subset,
    retrain_weighted,
    sample_losses,
    test_losses,
)
from ...workers.training.training import Training
from ..executors.base import Report, Unit
from ..reading.unit_values import RetrainValues
from ..vocabulary import RETRAIN, Way
from .work import Result, TrainingWork, recorded

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


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
        return Unit(stage=RETRAIN, name=self.unit, arguments=self)


def unchanged() -> Change:
    """Return the retraining that repeats the record."""
    nothing = np.empty(0)
    return Change(way="weighted", index=nothing.astype(np.int64), weight=nothing)


def removal(index: npt.ArrayLike, way: Way) -> Change:
    """Return the retraining without the given training samples."""
    removed = np.unique(np.asarray(index, dtype=np.int64))
    return Change(way=way, index=removed, weight=np.zeros(len(removed)))


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainWork(TrainingWork):
    """Handler of the retrainings.

    Attributes:
        n_train: N.
        tracked: Train indices of the run, (n,).
        tested: Test indices of the run, (M,).
    """

    n_train: int
    tracked: Integers
    tested: Integers

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Retrain, measure, and write the losses."""
        change = unit.arguments
        assert isinstance(change, Change)
        training = self._train(run, change, report)
        found = test_losses(training, self.tested)
        files = [self._write(run, unit.name, layout.LOSSES, RETRAIN_LOSSES, self._losses(found))]
        if len(change.index):
            table = {"train_index": change.index, "weight": change.weight}
            files.append(self._write(run, unit.name, layout.WEIGHTS, RETRAIN_WEIGHTS, table))
        if isinstance(training, WeightedTraining) and not len(change.index):
            files.append(
                self._write(run, unit.name, layout.TRAINING_LOSS, TRAINING_LOSS, self._own(training))
            )
        known = found.correct[found.correct >= 0]
        return files, RetrainValues(
            way=change.way,
            changed=len(change.index),
            loss=float(found.loss.mean()),
            accuracy=float(known.mean()) if len(known) else None,
        )

    def _train(self, run: RunDirectory, change: Change, report: Callable[[int, int], None]) -> Training:
        if change.way == "subset":
            kept = np.setdiff1d(np.arange(self.n_train), change.index)
            return retrain_subset(self.recipe, self.compute, kept, report)
        return retrain_weighted(
            self.recipe, self.compute, recorded(run), change.weights(self.n_train), report
        )

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
    return read_table(run.path(layout.evaluation(kind, unit)), source=run.vouched)
