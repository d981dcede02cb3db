"""The metric of a run with Adam: its preconditioner as one vector P and one number a step.

A step multiplies coordinates with D_t = 1 / (sqrt(vhat_t) + eps). With D_t taken as rho_t P and du = P^1/2 x,
dm = P^-1/2 y, the derivative of a step is

    y' = b1 y + (1 - b1) (P^1/2 H P^1/2 x + P^1/2 g);   x' = (1 - h L) x - h rho_t / (1 - b1^t) y'

and so of scalars in the eigenbasis of P^1/2 H P^1/2. P is the geometric mean of D over the record's
checkpoints, 0 where v is still 0 at the end: no sample ever moved such a coordinate. rho_t is the geometric
mean of D_t / P over the coordinates of a lane with v_t > 0. It is had at the checkpoints, where v is, and
between them interpolated in its logarithm: D is a slow average, and nothing is read from the device while
training is recorded. Coordinates that were not visited yet (D = 1 / eps) take part in neither mean.

The gradient of a Linear layer is an outer product of output gradient and input, d x^T, and stays one only in a
metric that is an outer product too. There P is replaced by the nearest such matrix in the logarithm,

    log P_oi ~ a_o + b_i,   least squares over the coordinates with v > 0

(rows and columns without any are 0). On the tasks of ``docs/benchmarks.md`` that leaves a residual of 0.25 of a
standard deviation of 1.8.

K checkpoints, D parameters, L lanes, U steps of the optimiser, O and I a layer's outputs and inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...storage.curvature import Metric
from ...storage.trajectory import Trajectory
from ..recursion.coefficients import Settings

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SWEEPS = 200
"""Sweeps of the fit of a metric with gaps, at most; without gaps it takes one."""

SETTLED = 1e-12
"""The largest change of a sweep that still counts, and how far an outer product may be from itself."""


def metric_of(
    trajectory: Trajectory,
    settings: Settings,
    lanes_D: npt.NDArray[np.int64],
    matrices: Sequence[tuple[int, ...]] = (),
) -> Metric:
    """Return P and rho of a record of Adam; without what coupled decay adds.

    Args:
        trajectory: The record.
        settings: Its settings.
        lanes_D: Lane of each parameter's values, -1: not optimised.
        matrices: Entries of the flat vector that side by side are a matrix (O, I) each, a weight and maybe its
            bias, in which P is to be an outer product.
    """
    total, seen = np.zeros(len(lanes_D)), np.zeros(len(lanes_D))
    moved = np.zeros(len(lanes_D), dtype=bool)
    for _update, logarithm, moved in preconditioners(trajectory, settings, lanes_D):
        total[moved] += logarithm[moved]
        seen += moved
    mean = np.divide(total, seen, out=np.zeros_like(total), where=seen > 0)
    for layer in matrices:
        parts = [trajectory.parameters[i] for i in layer]
        rows = parts[0].shape[0]
        spans = [slice(part.start, part.start + int(np.prod(part.shape))) for part in parts]

        def side_by_side(values: npt.NDArray[Any], spans: Any = spans, rows: int = rows) -> npt.NDArray[Any]:
            return np.concatenate([values[span].reshape(rows, -1) for span in spans], 1)

        fitted, seen_there = outer_fit(side_by_side(mean), side_by_side(moved))
        start = 0
        for span in spans:
            stop = start + (span.stop - span.start) // rows
            mean[span], moved[span] = fitted[:, start:stop].ravel(), seen_there[:, start:stop].ravel()
            start = stop
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


def outer_fit(values_OI: Floats, there_OI: Bools) -> tuple[Floats, Bools]:
    """Return a_o + b_i nearest to the values where they are there, and which rows and columns have any, (O, I)."""
    rows: Bools = np.any(there_OI, axis=1)
    columns: Bools = np.any(there_OI, axis=0)
    known = np.where(there_OI, values_OI, 0.0)
    per_row, per_column = np.maximum(there_OI.sum(1), 1), np.maximum(there_OI.sum(0), 1)
    a, b = np.zeros(len(rows)), np.zeros(len(columns))
    for _sweep in range(SWEEPS):
        before = a
        a = (known - there_OI * b).sum(1) / per_row
        b = (known - (there_OI * a[:, None])).sum(0) / per_column
        if np.abs(a - before).max() <= SETTLED:
            break
    return np.add.outer(a, b), np.logical_and.outer(rows, columns)


def outer_factors(scale_OI: Floats) -> tuple[Floats, Floats] | None:
    """Return p (O,) and q (I,) of a metric ``p_o q_i``; None where it is no outer product."""
    o, i = np.unravel_index(int(scale_OI.argmax()), scale_OI.shape)
    largest = float(scale_OI[o, i])
    if not largest > 0:
        return None
    q = scale_OI[o] / largest
    p = scale_OI[:, i]
    near: bool = np.allclose(np.outer(p, q), scale_OI, rtol=SETTLED, atol=0.0)
    return (p, q) if near else None


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
