"""Gradients of targets that are means over test samples: no pass over the model, only sums of rows.

Letters: M test samples, Q targets, R rows read at a time, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

PANEL_BYTES = 64 << 20
"""Rows read at a time; fixed, so that the order of the sums and their bits depend on D alone."""


def mean_gradients(
    read: Callable[[int, int], Floats],
    group_M: npt.NDArray[np.int64],
    columns: int,
    count: int,
    report: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Return the mean of the rows of each group, added in float64, (Q, D).

    Args:
        read: Gives test gradients ``start`` to ``stop``, (R, D).
        group_M: Which target each row belongs to, 0 to Q - 1; -1: none of these.
        columns: D.
        count: Q; no group is empty.
        report: Told of (rows done, M).
    """
    total = np.zeros((count, columns))
    size = max(1, PANEL_BYTES // (8 * columns))
    for start in range(0, len(group_M), size):
        group = group_M[start : start + size]
        if (group >= 0).any():
            rows = read(start, start + len(group))
            for k in np.unique(group[group >= 0]).tolist():
                total[k] += rows[group == k].sum(0, dtype=np.float64)
        if report:
            report(start + len(group), len(group_M))
    members = np.bincount(group_M[group_M >= 0], minlength=count)
    mean: npt.NDArray[np.float64] = total / members[:, None]
    return mean
