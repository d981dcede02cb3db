"""Influence functions as if training had ended after some epoch: what they would have said then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...storage.trajectory import Trajectory
from ..recipe import Recipe
from ..training.test_gradients import TEST_BATCH, TestGradients
from ..training.training import Compute, Training
from ..training.truncated import trained_until
from .base import Estimator, Ground, Report, Targets

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

INFLUENCE = ("influence-lissa", "influence-cg")
"""Estimators that look at one set of weights alone, and so can be asked at any epoch."""

MEAN = -1
"""``test_index`` of the mean over the test samples."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Influence:
    """C(i) of the tracked samples, (n,), and C(i, j), (n, M), where it was asked for."""

    mean: Floats
    contribution: Floats | None


def influence_after(
    recipe: Recipe,
    compute: Compute,
    trajectory: Trajectory,
    epoch: int,
    estimator: Estimator,
    *,
    tracked: Integers,
    tested: Integers,
    by_test: bool,
    report: Report,
) -> Influence:
    """Return influences at the weights after ``epoch`` epochs.

    Influence is linear in the test gradient, so C(i) needs one solve, for the mean gradient; each
    C(i, j) needs its own.

    Raises:
        EstimatorError: The method does not apply there; see the estimator.
    """
    training = Training(recipe, compute)
    ended = trained_until(training, trajectory, epoch)
    gradients = TestGradients(Training(recipe, compute), ended)
    blocks = [tested[start : start + TEST_BATCH] for start in range(0, len(tested), TEST_BATCH)]
    total = np.zeros(training.layout.dimension)
    parts = []
    ground = Ground(training=training, trajectory=ended, tracked=tracked)
    steps = 1 + (len(blocks) if by_test else 0)

    def ask(index: Integers, rows: npt.NDArray[np.floating], done: int) -> Floats:
        def moved(part: int, whole: int) -> None:
            report(1000 * done + 1000 * min(part, whole) // max(1, whole), 1000 * steps)

        return estimator.contributions(ground, Targets(index=index, gradient=rows), moved).values

    for done, chosen in enumerate(blocks):
        rows = gradients.rows(chosen).gradient
        total += rows.sum(0, dtype=np.float64)
        if by_test:
            parts.append(ask(chosen, rows, done))
    mean = (total / len(tested)).astype(compute.dtype)[None]
    found = ask(np.array([MEAN]), mean, steps - 1)[0]
    gradients.engine.close()
    return Influence(mean=found, contribution=np.concatenate(parts).T if parts else None)
