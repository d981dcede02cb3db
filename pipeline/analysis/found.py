"""How a ranking finds what is known to be wrong: the curve of share found over share inspected."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

AT = (0.05, 0.1, 0.2)
"""Shares inspected at which recall is told."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """What a ranking of n samples finds of those k that are wrong.

    Attributes:
        inspected: (n + 1,) share of the samples looked at, most suspicious first.
        found: (n + 1,) share of the wrong ones among them.
        wrong: k.
        recall: Share found at `AT`.
        auroc: Probability that a wrong sample ranks before a right one.
    """

    inspected: npt.NDArray[np.float64]
    found: npt.NDArray[np.float64]
    wrong: int
    recall: dict[float, float]
    auroc: float


def found_curve(ranking: npt.NDArray[np.int64], wrong: Collection[int]) -> Found | None:
    """Return what a ranking finds, most suspicious first; None where all or none of it is wrong."""
    hit = np.isin(ranking, np.fromiter(wrong, np.int64, len(wrong)))
    total, n = int(hit.sum()), len(hit)
    if total in (0, n):
        return None
    found = np.concatenate([[0.0], np.cumsum(hit) / total])
    before = np.cumsum(hit)[~hit].sum()  # of each right sample: wrong ones before it
    return Found(
        inspected=np.arange(n + 1) / n,
        found=found,
        wrong=total,
        recall={share: float(found[int(np.ceil(share * n))]) for share in AT},
        auroc=float(before / (total * (n - total))),
    )
