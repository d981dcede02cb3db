"""Eq. 23 as a matrix, and the two ways of scaling it that the paper's Figure 2 can mean.

Letters: A training classes, B test classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ...storage.errors import InputError

if TYPE_CHECKING:
    from ..reading.reader import Reader

Scale = Literal["raw", "paper", "code"]
Floats = npt.NDArray[np.float64]

SCALES: dict[Scale, str] = {
    "raw": "mean contribution of a pair",
    "paper": "divided by the root of row sum times column sum (the paper's text)",
    "code": "standardised, divided by the roots of the l2 norms of row and column (the authors' code, Figure 2)",
}
"""What an entry is, in words."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Interclass:
    """Contributions by class.

    Attributes:
        train_classes: (A,), ascending.
        test_classes: (B,), ascending.
        values: (A, B), NaN where there is no pair.
    """

    train_classes: list[int]
    test_classes: list[int]
    values: Floats

    def scaled(self, scale: Scale) -> Floats:
        """Return the entries on a scale of `SCALES`.

        On ``paper``'s an entry is NaN where row sum times column sum is not positive, which happens often:
        contributions have both signs. On ``code``'s all are finite; entries say what is large beside others of
        its row and column, and their sign is relative to the mean entry.

        Raises:
            InputError: There is no such scale.
        """
        if scale not in SCALES:
            raise InputError(f"scale {scale!r}: must be one of {', '.join(SCALES)}")
        if scale == "raw":
            return self.values
        if scale == "paper":
            product = np.nansum(self.values, axis=1)[:, None] * np.nansum(self.values, axis=0)[None, :]
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.where(product > 0, self.values / np.sqrt(product), np.nan)
        spread = np.nanstd(self.values) if self.values.size else 0.0
        centred = (self.values - np.nanmean(self.values)) / (spread or 1.0)
        rows, columns = (np.sqrt(np.nansum(centred**2, axis=axis)) for axis in (1, 0))
        size = np.sqrt(rows[:, None] * columns[None, :])
        found: Floats = np.divide(centred, size, out=np.zeros_like(centred), where=size > 0)
        return found


def interclass(run: Reader, method: str | None = None) -> Interclass | None:
    """Return the contributions of a method by class; None where samples or targets have no classes."""
    table = run.interclass(method)
    rows, columns, values = (table[name].to_numpy() for name in ("train_class", "test_class", "contribution"))
    known = (rows >= 0) & (columns >= 0)
    rows, columns, values = rows[known], columns[known], values[known]
    if not len(values):
        return None
    down, across = np.unique(rows), np.unique(columns)
    matrix = np.full((len(down), len(across)), np.nan)
    matrix[np.searchsorted(down, rows), np.searchsorted(across, columns)] = values
    return Interclass(train_classes=down.tolist(), test_classes=across.tolist(), values=matrix)
