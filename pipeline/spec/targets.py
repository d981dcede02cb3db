"""Targets: what adjoint mode carries backwards. A test sample, a class, or the mean over the test samples.

The loss of a class is the mean over its test samples, so its gradient, and everything that is linear
in it, is the mean of theirs. Letters: M test samples, Q targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...storage import layout
from ...storage.errors import SpecError
from ..vocabulary import KINDS, MEAN, SAMPLES

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetSet:
    """The targets of a method, in the order of its rows.

    Attributes:
        kind: One of ``KINDS``.
        test_index: Test position of each, (Q,); -1 where it is not one test sample.
        label: Its label, (Q,); -1: none, or the mean over all.
        count: Over how many test samples it is the mean, (Q,).
    """

    kind: str
    test_index: Integers
    label: Integers
    count: Integers

    def __len__(self) -> int:
        return len(self.count)

    @property
    def weight(self) -> Floats:
        """Share of the test samples that each target stands for, (Q,), summing to 1."""
        found: Floats = self.count / self.count.sum()
        return found

    @property
    def axis(self) -> str:
        """Name of the axis that runs over them; ``test_index`` labels it where that column tells them apart."""
        return "test_index" if self.kind == SAMPLES else "target"

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return the columns of a store with one row a target."""
        return {
            "test_index": self.test_index.astype(np.int32),
            "label": self.label.astype(np.int16),
            "count": self.count.astype(np.int32),
        }


def target_set(kind: str, test_index: npt.ArrayLike, label: npt.ArrayLike) -> TargetSet:
    """Group test samples into targets; classes in ascending order.

    Args:
        kind: One of ``KINDS``.
        test_index: Test positions, (M,).
        label: Their labels, (M,); -1: none.

    Raises:
        SpecError: Classes are asked for and test samples have no label.
    """
    index, labels = (np.asarray(values, dtype=np.int64) for values in (test_index, label))
    if kind == SAMPLES:
        return TargetSet(kind=kind, test_index=index, label=labels, count=np.ones_like(index))
    if kind == MEAN:
        none = np.full(1, -1, dtype=np.int64)
        return TargetSet(kind=kind, test_index=none, label=none, count=np.array([len(index)]))
    if (labels < 0).any():
        raise SpecError(
            f"targets {kind!r}: {int((labels < 0).sum()):,} of {len(labels):,} test samples have no label, so they "
            "are of no class; give the recipe a labels() method, or use targets='mean' or 'samples'"
        )
    classes, count = np.unique(labels, return_counts=True)
    return TargetSet(kind=kind, test_index=np.full_like(classes, -1), label=classes, count=count)


def coarsened(fine: TargetSet, kind: str) -> tuple[TargetSet, Floats | None]:
    """Return the coarser targets, and the weights (Q fine, Q coarse) that make them from ``fine``.

    Contributions to the coarse targets are those to the fine ones times these weights; None: they
    are the same targets.
    """
    if kind == fine.kind:
        return fine, None
    if KINDS.index(kind) < KINDS.index(fine.kind):
        raise ValueError(f"{kind} are finer than {fine.kind}")  # callers ask for the coarsest of all
    coarse = target_set(kind, fine.test_index, fine.label)
    member = np.ones((len(fine), 1), bool) if kind == MEAN else fine.label[:, None] == coarse.label
    weight = member * fine.count[:, None].astype(np.float64)
    total = weight.sum(0)
    found = TargetSet(
        kind=kind, test_index=coarse.test_index, label=coarse.label, count=total.astype(np.int64)
    )
    return found, weight / total


def store_of(kind: str) -> str:
    """Return where the gradients of the targets lie in a run."""
    return layout.TEST_GRADIENTS if kind == SAMPLES else layout.target_gradients(kind)


def target_of_each(target_Q: npt.ArrayLike, label_M: npt.ArrayLike, start: int, stop: int) -> Integers:
    """Return which of the targets ``start`` to ``stop`` each test sample belongs to, (M,); -1: none.

    Args:
        target_Q: Labels of all targets, ascending; -1: the only one, the mean over all.
        label_M: Labels of the test samples.
        start: First target.
        stop: One past the last.
    """
    known, labels = (np.asarray(values, dtype=np.int64) for values in (target_Q, label_M))
    if known[0] < 0:
        return np.zeros(len(labels), dtype=np.int64)
    place = np.searchsorted(known, labels) - start
    return np.where((place >= 0) & (place < stop - start), place, -1)
