"""The last units of a stage, where one takes much longer than the others did: it holds up all that comes after."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from .events import Observer, UnitStraggles

TIMES = 2.0
"""A unit straggles that takes longer than so many times the median of the finished ones,"""
LEAST_SECONDS = 30.0
"""and longer than this."""


class Stragglers:
    """How long units of a stage took, and which of those in work take much longer.

    Args:
        stage: Name of the stage.
        observer: Hears of each straggler, once an attempt.
        clock: Returns seconds that only grow.
    """

    def __init__(self, stage: str, observer: Observer, *, clock: Callable[[], float]) -> None:
        self._stage, self._observer, self._clock = stage, observer, clock
        self._took: list[float] = []
        self._began: dict[str, float] = {}
        self._said: set[str] = set()

    def begin(self, name: str) -> None:
        """Note that an attempt at a unit is begun."""
        self._began[name] = self._clock()
        self._said.discard(name)

    def finish(self, name: str, seconds: float) -> None:
        """Note that a unit is done, and how long that took."""
        self._began.pop(name, None)
        self._took.append(seconds)

    def lose(self, name: str) -> None:
        """Note that an attempt at a unit came to nothing."""
        self._began.pop(name, None)

    def straggles(self, name: str) -> bool:
        """Tell whether a unit in work takes much longer than others did; ask only of the last ones of a stage."""
        if not self._took or name not in self._began:
            return False
        usual, so_far = median(self._took), self._clock() - self._began[name]
        if so_far <= max(LEAST_SECONDS, TIMES * usual):
            return False
        if name not in self._said:
            self._said.add(name)
            self._observer(UnitStraggles(stage=self._stage, unit=name, seconds=so_far, usual=usual))
        return True
