"""What storing rows in fewer numbers or bits costs, on a sample: contributions of some rows to some targets, both ways.

Of a shard a few rows are kept whole until its end, the gradients of a few test samples are made once more, and the products
of the whole ones stand beside those of what is stored. Letters: S sampled rows, T sampled targets, N training samples.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from ...storage.trajectory import Trajectory
from ..model.row_map import Folds, RowMap
from ..training.test_gradients import TestGradients
from ..training.training import Training

Floats = npt.NDArray[np.float64]

ROWS, TARGETS = 64, 32
"""Sampled rows of a run, and targets; at most."""

LEAST_ROWS = 2
"""Sampled rows of a shard, at least."""

SAMPLE_BYTES = 256 << 20
"""Of whole rows of a shard, at most, where that leaves `LEAST_ROWS`."""

AT_A_TIME = 4
"""Gradients of targets held at a time."""


def evenly(count: int, most: int) -> list[int]:
    """Return at most ``most`` positions spread over ``range(count)``."""
    chosen = min(count, most)
    return [(2 * k + 1) * count // (2 * chosen) for k in range(chosen)]


def most_rows(row_bytes: int) -> int:
    """Return how many rows of a shard are kept whole at most."""
    return max(LEAST_ROWS, min(ROWS, SAMPLE_BYTES // max(1, row_bytes)))


def rows_of_shard(rows: int, total: int, row_bytes: int) -> list[int]:
    """Return which rows of a shard are sampled: its share of `ROWS`.

    Args:
        rows: Of the shard.
        total: Of all shards.
        row_bytes: Of a whole row.
    """
    share = max(LEAST_ROWS, math.ceil(ROWS * rows / total))
    return evenly(rows, min(share, most_rows(row_bytes)))


def both_ways(
    training: Training,
    trajectory: Trajectory,
    tests: npt.NDArray[np.int64],
    whole: npt.NDArray[np.floating],
    kept: npt.NDArray[np.floating],
    row_map: RowMap | None,
) -> tuple[Floats, Floats]:
    """Return contributions of sampled rows to sampled test samples, (S, T), by whole rows and by what is kept of them.

    Args:
        training: A fresh one.
        trajectory: The record.
        tests: Test indices, (T,).
        whole: Rows before they are folded and rounded, in the parameters that are kept, (S, width).
        kept: The same as they are stored, (S, columns).
        row_map: What is kept of a row; None: all.
    """
    gradients = TestGradients(training, trajectory)
    found = np.empty((2, len(whole), len(tests)))
    device = torch.device("cpu")
    folds = None if row_map is None else Folds(row_map, training.dtype, device)
    selects = None if row_map is None else Folds(row_map.whole, training.dtype, device)

    for start in range(0, len(tests), AT_A_TIME):
        block = torch.from_numpy(gradients.rows(tests[start : start + AT_A_TIME]).gradient)
        span = slice(start, start + len(block))
        picked = block if selects is None else selects.apply_(block)
        found[0, :, span] = _products(whole, picked.numpy())
        folded = block if folds is None else folds.apply_(block)
        found[1, :, span] = _products(kept, folded.numpy())
    gradients.engine.close()
    found /= -float(training.n_train)
    return found[0], found[1]


def _products(rows: npt.NDArray[np.floating], others: npt.NDArray[np.floating]) -> Floats:
    """Return <row, other> in float64, a row at a time."""
    wide = others.astype(np.float64)
    return np.stack([wide @ row.astype(np.float64) for row in rows])
