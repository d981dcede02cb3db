"""Units of passes over the tracked samples themselves: what the trained model makes of them, and of their gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage import layout
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...storage.trajectory import Trajectory
from ...workers.data.labels import with_labels
from ...workers.estimators.tracin import TracIn, checkpoints_used
from ...workers.model.row_map import Folds, RowMap
from ...workers.training.outputs import TrainingOutputs
from ...workers.training.own_gradients import OwnGradients, Projection, norms, products
from ...workers.training.training import Training
from ..executors.base import Report, Unit
from ..reading.unit_values import UnitValues
from ..vocabulary import self_influence_part
from .work import Result, TrainingWork, recorded, rows_of

Integers = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]

FEATURE, OUTPUT, LOSS, PREDICTION = "feature", "output", "loss", "prediction"
VALUE, ABSOLUTE, NORM = "value", "absolute", "norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnWork(TrainingWork):
    """A handler of blocks of tracked samples.

    Attributes:
        tracked: Train indices of the run, (n,).
        labels: Class of every training sample, -1 where there is none, (N,).
    """

    tracked: Integers
    labels: Integers

    def training(self) -> Training:
        """Return a fresh training of the recipe, whose labels are known."""
        return Training(with_labels(self.recipe, self.labels), self.compute)

    def write(self, run: RunDirectory, unit: Unit, base: str, name: str, found: Arrays) -> Result:
        """Write a block of a store: its rows under ``name``, its columns under theirs."""
        start, stop = rows_of(unit)
        store = RowStore.open(run.path(base), name, run.vouched)
        store.write(start, np.ascontiguousarray(found[name], dtype=store.dtype))
        files = store.files(start, stop)
        for column in found.keys() - {name}:
            store.write_column(column, found[column], start=start)
            files += store.column_files(column, start, stop)
        return [f"{base}/{file}" for file in sorted(files)], UnitValues(rows=stop - start, start=start)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOutputWork(OwnWork):
    """Handler of what the trained model makes of tracked samples; a forward pass each."""

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write features, outputs, losses and predictions of a block."""
        start, stop = rows_of(unit)
        passed = TrainingOutputs(self.training(), recorded(run))
        rows = passed.rows(self.tracked[start:stop], lambda done: report(done, stop - start))
        found = {FEATURE: rows.feature, OUTPUT: rows.output, LOSS: rows.loss, PREDICTION: rows.prediction}
        return self.write(run, unit, layout.TRAINING_OUTPUTS, FEATURE, found)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnGradientWork(OwnWork):
    """A handler that asks something of the gradients of tracked samples' own losses.

    Costs a forward and a backward pass a sample (and a checkpoint), and memory for `TEST_BATCH` rows of D numbers.
    """

    @property
    @abstractmethod
    def part(self) -> str:
        """Last part of the stage, and name of the store."""

    @abstractmethod
    def ask(self, run: RunDirectory, gradients: OwnGradients, rows: slice, report: Report) -> Arrays:
        """Return what is written of the tracked samples at ``rows``, by array."""

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Ask and write a block."""
        gradients = OwnGradients(self.training(), recorded(run))
        found = self.ask(run, gradients, slice(*rows_of(unit)), report)
        gradients.engine.close()
        return self.write(run, unit, layout.training_gradients(self.part), VALUE, found)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormsWork(OwnGradientWork):
    """Sums of squares (``value``) and of absolute values (``absolute``) of each parameter tensor's gradient."""

    PART: ClassVar[str] = "norms"

    @property
    def part(self) -> str:
        """See `OwnGradientWork`."""
        return self.PART

    def ask(self, run: RunDirectory, gradients: OwnGradients, rows: slice, report: Report) -> Arrays:
        """Return two (R, P) arrays."""
        chosen, parameters = self.tracked[rows], gradients.training.layout
        shape = (len(chosen), len(parameters.entries))
        absolute, square = np.empty(shape), np.empty(shape)

        def take(start: int, block: Tensor) -> None:
            span = slice(start, start + len(block))
            absolute[span], square[span] = norms(block, parameters)

        gradients.each(chosen, take, lambda done: report(done, len(chosen)))
        return {VALUE: square, ABSOLUTE: absolute}


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfInfluenceWork(OwnGradientWork):
    """<hypergradient_i, g_i(w_T)> (``value``): what the weight of i does to its own loss.

    Attributes:
        method: Whose hypergradients.
        row_map: What is kept of a row; None: all.
    """

    method: str
    row_map: RowMap | None = None

    @property
    def part(self) -> str:
        """See `OwnGradientWork`."""
        return self_influence_part(self.method)

    def ask(self, run: RunDirectory, gradients: OwnGradients, rows: slice, report: Report) -> Arrays:
        """Return one product a sample, (R, 1)."""
        store = RowStore.open(run.path(layout.hypergradients(self.method)), "hypergradient", run.vouched)
        chosen = self.tracked[rows]
        found = np.empty((len(chosen), 1))
        training = gradients.training
        folds = None if self.row_map is None else Folds(self.row_map, training.dtype, torch.device("cpu"))

        def take(start: int, block: Tensor) -> None:
            first = rows.start + start
            block = block if folds is None else folds.apply_(block)
            found[start : start + len(block), 0] = products(block, store.read(first, first + len(block)))

        gradients.each(chosen, take, lambda done: report(done, len(chosen)))
        return {VALUE: found}


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTracInWork(OwnGradientWork):
    """TracIn of each sample with itself, a checkpoint a column of ``value``; see ``workers.estimators.tracin``.

    Attributes:
        estimator: Chooses and weighs the checkpoints.
    """

    PART: ClassVar[str] = "self-tracin"

    estimator: TracIn

    @property
    def part(self) -> str:
        """See `OwnGradientWork`."""
        return self.PART

    def chosen(self, trajectory: Trajectory) -> list[int]:
        """Return the numbers of the checkpoints looked at, K of them."""
        return checkpoints_used(trajectory, self.estimator.checkpoints)

    def ask(self, run: RunDirectory, gradients: OwnGradients, rows: slice, report: Report) -> Arrays:
        """Return the terms of the sum, (R, K)."""
        training, trajectory = gradients.training, gradients.trajectory
        parameters, picked = training.layout, self.tracked[rows]
        chosen = self.chosen(trajectory)
        weights = self.estimator.weights(trajectory, chosen, training.n_train)
        group = np.array([entry.group for entry in parameters.entries])
        found = np.empty((len(picked), len(chosen)))
        for column, (k, weight) in enumerate(zip(chosen, weights, strict=True)):
            # What the optimiser does not hold never moves.
            each = np.where(group < 0, 0.0, np.asarray(weight)[np.maximum(group, 0)])
            gradients.load(k)
            take = self._taker(found[:, column], each, gradients)
            gradients.each(
                picked, take, partial(_share, report, column * len(picked), len(chosen), len(picked))
            )
        return {VALUE: found}

    def _taker(
        self, out: npt.NDArray[np.float64], each: npt.NDArray[np.float64], gradients: OwnGradients
    ) -> Callable[[int, Tensor], None]:
        def take(start: int, block: Tensor) -> None:
            _, square = norms(block, gradients.training.layout)
            out[start : start + len(block)] = square @ each

        return take


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientRowsWork(OwnGradientWork):
    """Gradients by some parameter tensors, as they are or projected (``value``, float32), and their norms (``norm``).

    Attributes:
        name: Of the pass.
        tensors: Which parameter tensors, by place.
        seed: Of the projection.
    """

    name: str
    tensors: tuple[int, ...]
    seed: int

    @property
    def part(self) -> str:
        """See `OwnGradientWork`."""
        return self.name

    def ask(self, run: RunDirectory, gradients: OwnGradients, rows: slice, report: Report) -> Arrays:
        """Return (R, width) and (R,)."""
        chosen, parameters = self.tracked[rows], gradients.training.layout
        spans = [(parameters.entries[k].start, parameters.size(k)) for k in self.tensors]
        project = Projection(sum(size for _, size in spans), len(self.tracked), self.seed)
        found = np.empty((len(chosen), project.width), dtype=np.float32)
        norm = np.empty(len(chosen))

        def take(start: int, block: Tensor) -> None:
            values = np.concatenate([block[:, a : a + size].numpy() for a, size in spans], axis=1)
            at = slice(start, start + len(values))
            norm[at] = np.sqrt(np.square(values, dtype=np.float64).sum(1))
            found[at] = project(values)

        gradients.each(chosen, take, lambda done: report(done, len(chosen)))
        return {VALUE: found, NORM: norm}


def _share(report: Report, before: int, checkpoints: int, rows: int, done: int) -> None:
    """Report in rows what was done at some of the checkpoints."""
    report((before + done) // checkpoints, rows)
