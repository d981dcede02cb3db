"""Removal curves: which samples go first, by each method, by plain training loss, by chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..units.retrain import removal
from ..vocabulary import Way
from .outcomes import Evidence
from .trials import Trial, draw

RANDOM_DRAWS = 3
"""Random orders that a curve is compared with."""

RANDOM, TRAINING_LOSS, WRONG_LABELS = "random", "training-loss", "wrong labels"
"""Rankings that need no method: by chance, by the loss at w_T, and (as a limit) by the known noise."""


def removals(
    evidence: Evidence, methods: Sequence[str], shares: Sequence[float], seed: int, way: Way
) -> list[Trial]:
    """Return the retrainings of the removal curves.

    Each method removes its most helpful and its most harmful samples by C(i); the training loss
    removes the samples of the highest loss. Where labels are known to be wrong, their share is one
    of the sizes, and removing exactly them is the limit to compare with.

    Args:
        evidence: Gives C(i), losses and known noise.
        methods: Whose rankings.
        shares: Shares of the tracked samples to remove; empty: no curves.
        seed: Of the random orders.
        way: How the rest is trained.
    """
    if not shares:
        return []
    tracked, wrong = evidence.tracked, evidence.wrong
    counts = {max(1, round(share * len(tracked))) for share in shares}
    if wrong is not None and 0 < wrong.sum() < len(tracked):
        counts.add(int(wrong.sum()))
    orders: list[tuple[str, str, int, npt.NDArray[np.int64]]] = []
    for method in methods:
        value = evidence.contribution(method)
        orders.append((method, "helpful", 0, tracked[np.argsort(-value, kind="stable")]))
        orders.append((method, "harmful", 0, tracked[np.argsort(value, kind="stable")]))
    by_loss = tracked[np.argsort(-evidence.final_loss, kind="stable")]
    orders.append((TRAINING_LOSS, "harmful", 0, by_loss))
    orders += [(RANDOM, "any", k, draw(seed, 4, k).permutation(tracked)) for k in range(RANDOM_DRAWS)]
    trials = [
        _trial(ranking, direction, index, order[:count], way)
        for ranking, direction, index, order in orders
        for count in sorted(counts)
        if count < len(tracked)
    ]
    if wrong is not None and 0 < wrong.sum() < len(tracked):
        trials.append(_trial(WRONG_LABELS, "harmful", 0, tracked[wrong], way))
    return trials


def _trial(ranking: str, direction: str, index: int, removed: npt.NDArray[np.int64], way: Way) -> Trial:
    labels = {"ranking": ranking, "direction": direction, "index": index, "removed": len(removed)}
    return Trial(kind="remove", labels=labels, change=removal(removed, way))
