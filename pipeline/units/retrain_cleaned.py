"""Retrainings that say whether a decision helped, as units of work, and the handler that does one.

A unit is named by what it trains on: decisions that compare themselves with the same training share it.
Letters: N training samples, M test samples of the recipe.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...storage import layout
from ...storage.contributions import write_table
from ...storage.rundir import RunDirectory
from ...storage.schemas import RETRAIN_LOSSES
from ...storage.tables import read_table
from ...workers.recipe import Recipe
from ...workers.training.relabelled import relabelled
from ...workers.training.retrain import retrain_subset, retrain_weighted, test_losses
from ...workers.training.same_data import with_seed
from ...workers.training.training import Training
from ..executors.base import Report, Unit
from ..reading.unit_values import RetrainValues
from ..vocabulary import CLEAN_RETRAIN, Way
from .work import Result, TrainingWork, recorded

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Treatment:
    """What one training gets.

    Attributes:
        way: How it trains; see ``workers.training.retrain``.
        seed: Of the recipe.
        weight: (N,) of every sample in the loss of its batch; 0 drops it. Scaled as the way says.
        index: Train indices that have another label, ascending, (k,).
        label: Those labels, (k,).
    """

    way: Way
    seed: int
    weight: Floats
    index: Integers
    label: Integers

    @property
    def unit(self) -> str:
        """Name of the unit: way, seed, and a digest of weights and labels."""
        digest = hashlib.sha256(self.weight.astype("<f8").tobytes())
        digest.update(self.index.astype("<i8").tobytes())
        digest.update(self.label.astype("<i8").tobytes())
        return f"{self.way}-seed{self.seed}-{digest.hexdigest()[:20]}"

    @property
    def kept(self) -> Integers:
        """Train indices that are trained on, ascending."""
        return np.flatnonzero(self.weight).astype(np.int64)

    def as_unit(self) -> Unit:
        """Return the unit of work."""
        return Unit(stage=CLEAN_RETRAIN, name=self.unit, arguments=self)

    def steps(self, batch_size: int, epochs: int) -> int:
        """Return how many steps it takes."""
        samples = len(self.kept) if self.way == "subset" else len(self.weight)
        return -(-samples // batch_size) * epochs


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanedWork(TrainingWork):
    """Handler of these retrainings.

    Attributes:
        n_test: M.
    """

    n_test: int

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Train, measure after the last epoch, and write the test losses."""
        treatment = unit.arguments
        assert isinstance(treatment, Treatment)
        training = self._train(run, treatment, report)
        tested = np.arange(self.n_test, dtype=np.int64)
        found = test_losses(training, tested)
        relative = layout.retrained(unit.name)
        table = pa.table(
            {
                "unit": pa.array([unit.name] * self.n_test, pa.string()),
                "test_index": tested,
                "loss": found.loss,
                "correct": found.correct,
            }
        )
        write_table(run.path(relative), table.cast(RETRAIN_LOSSES), RETRAIN_LOSSES)
        known = found.correct[found.correct >= 0]
        values = RetrainValues(
            way=treatment.way,
            changed=int((treatment.weight != 1).sum()) + len(treatment.index),
            loss=float(found.loss.mean()),
            accuracy=float(known.mean()) if len(known) else None,
        )
        return [relative], values

    def _train(self, run: RunDirectory, treatment: Treatment, report: Report) -> Training:
        recipe = with_seed(self.recipe, treatment.seed)
        if treatment.way != "subset":
            place = run if treatment.seed == self.recipe.seed else run.of_seed(treatment.seed)
            weights = treatment.weight
            if treatment.way == "rescaled":
                weights = weights * (len(weights) / weights.sum())
            return retrain_weighted(recipe, self.compute, recorded(place), weights, report)
        kept = treatment.kept
        if len(treatment.index):
            recipe = relabelled(recipe, treatment.index, treatment.label)
        return retrain_subset(recipe, self.compute, kept, report, weights=_scaled(treatment.weight[kept]))


def _scaled(weights: Floats) -> Floats | None:
    """Return weights of mean 1; None where all are the same: that is plain training, to the bit."""
    if len(weights) == 0 or (weights == weights[0]).all():
        return None
    scaled: Floats = weights * (len(weights) / weights.sum())
    return scaled


def test_losses_of(run: RunDirectory, unit: str) -> pa.Table:
    """Return the test losses after a retraining; see ``storage.schemas.RETRAIN_LOSSES``."""
    return read_table(run.path(layout.retrained(unit)), source=run.vouched)


def seeds_of(recipe: Recipe, count: int) -> range:
    """Return the seeds of ``count`` retrainings: the recipe's own first."""
    return range(recipe.seed, recipe.seed + count)
