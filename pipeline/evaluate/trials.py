"""Which retrainings an evaluation asks for: random subsets, single samples, random weights.

Letters: N training samples, n of them tracked (only those are ever removed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..units.retrain import Change, removal
from ..vocabulary import Way

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A retraining and why it is asked for.

    Attributes:
        kind: ``subset``, ``one``, ``remove`` or ``perturb``.
        labels: What tells it from others of its kind: fraction, index, ranking, direction, size.
        change: What is retrained.
    """

    kind: str
    labels: Mapping[str, Any] = field(default_factory=dict)
    change: Change


def draw(seed: int, *keys: int) -> np.random.Generator:
    """Return the generator of one draw: it depends on the seed and the keys alone."""
    return np.random.Generator(np.random.PCG64([seed, *keys]))


def subsets(tracked: Integers, fraction: float, count: int, seed: int, way: Way) -> list[Trial]:
    """Return ``count`` random subsets that keep ``fraction`` of the tracked samples.

    Subset k is the same whatever ``count`` is.
    """
    removed = len(tracked) - round(fraction * len(tracked))
    return [
        Trial(
            kind="subset",
            labels={"fraction": fraction, "index": k},
            change=removal(draw(seed, 1, round(fraction * 1e9), k).permutation(tracked)[:removed], way),
        )
        for k in range(count)
    ]


def leave_one_out(tracked: Integers, count: int, seed: int) -> list[Trial]:
    """Return the removals of ``count`` random samples, one at a time, as C(i, j) defines them."""
    chosen = np.sort(draw(seed, 2).permutation(tracked)[:count])
    return [
        Trial(kind="one", labels={"train_index": int(i)}, change=removal([i], "weighted")) for i in chosen
    ]


def perturbations(
    tracked: Integers, n_train: int, sizes: tuple[float, ...], seed: int, directions: int = 2
) -> list[Trial]:
    """Return retrainings whose weights are 1 +- size, the signs drawn at random.

    In norm a size s is the removal of a share s^2 of the samples.
    """
    trials = []
    for k in range(directions):
        signs = draw(seed, 3, k).choice([-1.0, 1.0], size=n_train)[tracked]
        for size in sizes:
            change = Change(way="weighted", index=tracked, weight=1 + size * signs)
            trials.append(Trial(kind="perturb", labels={"size": size, "index": k}, change=change))
    return trials
