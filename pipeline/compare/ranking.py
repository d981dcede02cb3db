"""Ranks and what is read off them: Spearman, area under the ROC curve, overlap of extremes.

All functions work on columns of (n, k) arrays at once; ties get their mean rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Values = npt.NDArray[Any]


def ranks(values: Values) -> Floats:
    """Return the ranks from 0 down each column, ties sharing their mean rank; same shape."""
    table = values.reshape(len(values), -1)
    order = np.argsort(table, axis=0, kind="stable")
    ordered = np.take_along_axis(table, order, axis=0)
    position = np.arange(len(table))[:, None]
    begins = np.ones(table.shape, dtype=bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    ends = np.ones(table.shape, dtype=bool)
    ends[:-1] = begins[1:]
    first = np.maximum.accumulate(np.where(begins, position, 0), axis=0)
    last = np.minimum.accumulate(np.where(ends, position, len(table) - 1)[::-1], axis=0)[::-1]
    out = np.empty(table.shape)
    np.put_along_axis(out, order, (first + last) / 2, axis=0)
    return out.reshape(values.shape)


def pearson(left: Values, right: Values) -> Floats:
    """Return the correlation of each column of ``left`` with that of ``right``, (k,).

    Where a column does not vary it says nothing, and the correlation is 0.
    """
    a, b = (np.asarray(side, dtype=np.float64).reshape(len(side), -1) for side in (left, right))
    a, b = a - a.mean(0), b - b.mean(0)
    size = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    found: Floats = np.divide((a * b).sum(0), size, out=np.zeros(a.shape[1]), where=size > 0)
    return found


def spearman(left: Values, right: Values) -> Floats:
    """Return the rank correlation of each column of ``left`` with that of ``right``, (k,)."""
    return pearson(ranks(left), ranks(right))


def sign_errors(values: Values, reference: Values) -> Floats:
    """Return the share of rows, per column, whose sign is not the reference's, (k,).

    Rows whose reference is 0 have no sign to be wrong about and are not counted.
    """
    a, b = (side.reshape(len(side), -1) for side in (values, reference))
    known = b != 0
    wrong = ((np.sign(a) != np.sign(b)) & known).sum(0)
    share: Floats = np.divide(wrong, known.sum(0), out=np.zeros(a.shape[1]), where=known.any(0))
    return share


def overlap(values: Values, reference: Values, k: int, *, lowest: bool = False) -> Floats:
    """Return the share that the ``k`` largest (or lowest) rows have in common, per column, (columns,)."""
    picks = []
    for side in (values, reference):
        table = side.reshape(len(side), -1)
        # Stable, so that equal values are taken in the order of the samples on both sides.
        order = np.argsort(table if lowest else -table, axis=0, kind="stable")[:k]
        mask = np.zeros(table.shape, dtype=bool)
        np.put_along_axis(mask, order, True, axis=0)
        picks.append(mask)
    share: Floats = (picks[0] & picks[1]).sum(0) / min(k, len(values))
    return share


def auc(score: Values, positive: npt.NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve of ``score`` for the rows marked ``positive``.

    The chance that a positive row outranks another one, ties counting half; NaN where all rows
    are of one kind.
    """
    n_positive = int(positive.sum())
    n_other = len(positive) - n_positive
    if not n_positive or not n_other:
        return float("nan")
    total = float(ranks(np.asarray(score, dtype=np.float64))[positive].sum())
    return (total - n_positive * (n_positive - 1) / 2) / (n_positive * n_other)
