"""The metric of a run with Adam: its preconditioner as one vector P and one number a step.

A step multiplies coordinates with D_t = 1 / (sqrt(vhat_t) + eps). With D_t taken as rho_t P and du = P^1/2 x,
dm = P^-1/2 y, the derivative of a step is

    y' = b1 y + (1 - b1) (P^1/2 H P^1/2 x + P^1/2 g);   x' = (1 - h L) x - h rho_t / (1 - b1^t) y'

and so of scalars in the eigenbasis of P^1/2 H P^1/2. P is the geometric mean of D over the record's
checkpoints, 0 where v is still 0 at the end: no sample ever moved such a coordinate. rho_t is the geometric
mean of D_t / P over the coordinates of a lane with v_t > 0. It is had at the checkpoints, where v is, and
between them interpolated in its logarithm: D is a slow average, and nothing is read from the device while
training is recorded. Coordinates that were not visited yet (D = 1 / eps) take part in neither mean.

K checkpoints, D parameters, L lanes, U steps of the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ...storage.curvature import Metric
from ...storage.trajectory import Trajectory
from ..recursion.coefficients import Settings

Floats = npt.NDArray[np.float64]


def metric_of(trajectory: Trajectory, settings: Settings, lanes_D: npt.NDArray[np.int64]) -> Metric:
    """Return P and rho of a record of Adam; without what coupled decay adds.

    Args:
        trajectory: The record.
        settings: Its settings.
        lanes_D: Lane of each parameter's values, -1: not optimised.
    """
    total, seen = np.zeros(len(lanes_D)), np.zeros(len(lanes_D))
    moved = np.zeros(len(lanes_D), dtype=bool)
    for _update, logarithm, moved in preconditioners(trajectory, settings, lanes_D):
        total[moved] += logarithm[moved]
        seen += moved
    mean = np.divide(total, seen, out=np.zeros_like(total), where=seen > 0)
    scale = np.where(moved, np.exp(mean), 0.0)  # of the last checkpoint
    steps, lanes = settings.learning_rate.shape
    at: list[list[int]] = [[] for _lane in range(lanes)]
    rates: list[list[float]] = [[] for _lane in range(lanes)]
    for update, logarithm, moved in preconditioners(trajectory, settings, lanes_D):
        for lane in range(lanes):
            mine = moved & (lanes_D == lane)
            if mine.any():
                at[lane].append(update)
                rates[lane].append(float((logarithm[mine] - mean[mine]).mean()))
    rate = np.ones((steps, lanes))
    for lane in range(lanes):
        if at[lane]:
            rate[:, lane] = np.exp(np.interp(np.arange(steps), at[lane], rates[lane]))
    return Metric(scale=scale, rate=rate)


def preconditioners(
    trajectory: Trajectory, settings: Settings, lanes_D: npt.NDArray[np.int64]
) -> Iterator[tuple[int, Floats, npt.NDArray[np.bool_]]]:
    """Yield (step of the optimiser, log D, v > 0) of each checkpoint after the first step, (D,) each."""
    for k in range(len(trajectory.checkpoint_steps)):
        found = preconditioner_at(trajectory, settings, lanes_D, k)
        if found is not None:
            yield found


def preconditioner_at(
    trajectory: Trajectory, settings: Settings, lanes_D: npt.NDArray[np.int64], k: int
) -> tuple[int, Floats, npt.NDArray[np.bool_]] | None:
    """Return (step of the optimiser, log D, v > 0) of checkpoint ``k``; None before the first step."""
    assert settings.beta2 is not None
    assert settings.eps is not None
    update = int(settings.updates_before(trajectory.checkpoint_steps[k : k + 1])[0]) - 1
    if update < 0:
        return None
    sizes = [int(np.prod(entry.shape)) for entry in trajectory.parameters]
    kept = trajectory.checkpoint(k)
    assert kept.second_moment is not None
    assert kept.count is not None
    second = kept.second_moment.astype(np.float64)
    moved = (second > 0) & (lanes_D >= 0)
    count = np.repeat(kept.count, sizes).astype(np.float64)
    beta2, eps = (np.append(values[update], 0.5)[lanes_D] for values in (settings.beta2, settings.eps))
    unbiased = second / np.where(moved, 1.0 - beta2**count, 1.0)
    return update, -np.log(np.sqrt(unbiased) + eps), moved
