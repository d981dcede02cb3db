"""What an estimator is: options in, contributions of the tracked samples to a block of tests out.

Shape letters: N training samples, n tracked of them, Q test samples of a block, D parameters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ...storage.errors import SpecError
from ...storage.trajectory import Trajectory
from ..training.training import Training

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
Report = Callable[[int, int], None]

TARGETS = 8
"""Test samples multiplied at a time, padded: a contribution's bits do not depend on the others."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ground:
    """What every estimator may build on.

    Attributes:
        training: A fresh ``Training`` of the recipe; its weights may be moved.
        trajectory: The record.
        tracked: Train indices, (n,).
        prepared: What ``prepare`` gave for each tracked sample, (n,); None where nothing is prepared.
    """

    training: Training
    trajectory: Trajectory
    tracked: Integers
    prepared: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Targets:
    """A block of test samples: ``index`` (Q,) and ``gradient`` (Q, D), d loss_j / d w at w_T."""

    index: Integers
    gradient: Floats


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """Contributions (Q, n) (or prepared values), and JSON-able notes for the unit's manifest."""

    values: npt.NDArray[np.float64]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """Base of all estimators; the fields of a subclass are its options.

    Values have the sign of C(i, j), positive = helpful: removing i raises the loss of j. Where the
    theory predicts the change of the loss, they have its scale too; otherwise the subclass says
    what its scale is. Results of a test sample must not depend on the block it is in.
    """

    NAME: ClassVar[str]
    PREPARES: ClassVar[bool] = False
    """Whether ``prepare`` must have been done for every tracked sample first."""
    FOLLOWS_TRAINING: ClassVar[bool] = False
    """Whether it looks at the steps of the record, and not at the trained model alone."""
    BATCH_NORM: ClassVar[str | None] = None
    """How ``Training`` must treat batch statistics; None: as the run does."""
    VECTORS: ClassVar[int] = 4
    """Vectors of D float64 numbers held a test sample; decides how many are worked on together."""

    @abstractmethod
    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Return contributions of all tracked samples to the block's test samples, (Q, n).

        Args:
            ground: Recipe and record.
            targets: The block.
            report: Told of (done, total) in whatever counts, now and then.

        Raises:
            HydraError: The method does not apply here; says what to do.
        """

    def prepare(self, ground: Ground, rows: slice, report: Report) -> Found:
        """Return one number a tracked sample of ``rows``, (R,), which every block needs."""
        raise NotImplementedError(f"{self.NAME} prepares nothing")

    def options(self) -> dict[str, Any]:
        """Return the options as JSON-able values, defaults included."""
        return asdict(self)


_MOST = 10**9
"""Iterations and samples that an option may ask for."""


def whole(name: str, value: object, least: int = 1) -> None:
    """Raise SpecError unless ``value`` is a whole number of at least ``least``."""
    most = 2**63 - 1 if name == "seed" else _MOST
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"option {name} is {value!r:.60}; use a whole number of at least {least}")
    if value > most:
        raise SpecError(f"option {name} is larger than {most:,}; use a whole number of at most that")


def number(
    name: str,
    value: object,
    *,
    least: float = 0.0,
    most: float = math.inf,
    open_least: bool = False,
) -> None:
    """Raise SpecError unless ``value`` is a finite number from ``least`` (excluded if open) to ``most``."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if good:
        assert isinstance(value, (int, float))
        good = (value > least if open_least else value >= least) and value <= most
    if not good:
        limit = f"{'above' if open_least else 'of at least'} {least:g}"
        limit += f" and at most {most:g}" if math.isfinite(most) else ""
        raise SpecError(f"option {name} is {value!r}; use a number {limit}")


def one_of(name: str, value: object, *known: str) -> None:
    """Raise SpecError unless ``value`` is one of ``known``."""
    if value not in known:
        raise SpecError(f"option {name} is {value!r}; use one of {', '.join(known)}")


def flag(name: str, value: object) -> None:
    """Raise SpecError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise SpecError(f"option {name} is {value!r}; use true or false")
