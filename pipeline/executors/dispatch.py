"""Which unit is next, and how often each was tried: the bookkeeping of a stage, without Ray."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from ...storage.errors import WorkerLost
from . import raysetup
from .base import Stopping, Unit, never, stopped
from .events import Observer, UnitBackedUp, UnitFinished, UnitProgress, UnitRetried, UnitStarted
from .stalls import Stalls
from .stragglers import Stragglers


class Dispatch:
    """The units of one stage between queue, work and done.

    Args:
        stage: Name of the stage.
        units: What is to be done; names are unique.
        observer: Hears of starts, progress, retries and ends.
        max_attempts: How often a unit is tried when workers die.
        clock: Returns seconds that only grow.
        timeout: Seconds that an attempt at a unit may take; None: any.
        stopping: Whether no further unit is to be begun.
    """

    def __init__(
        self,
        stage: str,
        units: Sequence[Unit],
        observer: Observer,
        *,
        max_attempts: int,
        clock: Callable[[], float],
        timeout: float | None = None,
        stopping: Stopping = never,
    ) -> None:
        self.stalls = Stalls(stage, observer, clock=clock, timeout=timeout)
        self._stopping = stopping
        self._stage, self._units, self._observer = stage, list(units), observer
        self._max_attempts, self._clock = max_attempts, clock
        self._queue = deque(self._units)
        self._attempts: Counter[str] = Counter()
        self._began: dict[str, float] = {}
        self._backed_up: dict[str, float] = {}
        self._stragglers = Stragglers(stage, observer, clock=clock)
        self._seen: dict[str, tuple[int, int]] = {}
        self._results: dict[str, dict[str, Any]] = {}
        assert len({unit.name for unit in units}) == len(self._units), "unit names must be unique"

    @property
    def waiting(self) -> int:
        """Units in the queue that may be begun."""
        return 0 if self._stopping() else len(self._queue)

    @property
    def unfinished(self) -> int:
        """Units not yet done, those in work included."""
        return len(self._units) - len(self._results)

    def check_stop(self) -> None:
        """Raise where no further unit is to be begun and none is in work.

        Raises:
            RunStopped: So it is.
        """
        if self._stopping() and self._queue and len(self._queue) == self.unfinished:
            raise stopped(self._stage, self.unfinished)

    def start(self) -> Unit:
        """Take the next unit from the queue into work."""
        unit = self._queue.popleft()
        self._attempts[unit.name] += 1
        self._began[unit.name] = self._clock()
        self._stragglers.begin(unit.name)
        self.stalls.begin(unit.name)
        self._seen.pop(unit.name, None)
        self._observer(UnitStarted(stage=self._stage, unit=unit.name, attempt=self._attempts[unit.name]))
        return unit

    def progress(self, name: str, done: int, total: int) -> None:
        """Pass on how far a unit is, where that is news."""
        seen = self._seen.get(name)
        if name in self._backed_up and seen is not None and done <= seen[0]:
            return  # the worker behind
        if seen != (done, total) and name not in self._results:
            self._seen[name] = (done, total)
            self.stalls.moved(name)
            self._observer(UnitProgress(stage=self._stage, unit=name, done=done, total=total))

    def straggles(self, unit: Unit) -> bool:
        """Tell whether a unit in work is one of the last and takes much longer than the others did."""
        return not self._queue and self._stragglers.straggles(unit.name)

    def may_back_up(self, unit: Unit) -> bool:
        """Tell whether a unit was not yet begun a second time beside the first."""
        return unit.name not in self._backed_up

    def back_up(self, unit: Unit) -> None:
        """Note that a unit in work is begun a second time, while the first attempt goes on."""
        self._backed_up[unit.name] = self._clock()
        self._observer(UnitBackedUp(stage=self._stage, unit=unit.name))

    def finish(self, unit: Unit, values: dict[str, Any], *, second: bool = False) -> None:
        """Note that a unit is done, by its attempt or by the ``second`` beside it."""
        self._results[unit.name] = values
        self.stalls.end(unit.name)
        seconds = self._clock() - (self._backed_up if second else self._began)[unit.name]
        self._stragglers.finish(unit.name, seconds)
        self._observer(UnitFinished(stage=self._stage, unit=unit.name, seconds=seconds, values=values))

    def lose(self, unit: Unit, reason: str) -> None:
        """Queue a unit again whose worker died; it goes first, so that a hopeless one shows early.

        Raises:
            WorkerLost: It was tried ``max_attempts`` times.
        """
        self.stalls.end(unit.name)
        self._stragglers.lose(unit.name)
        tried = self._attempts[unit.name]
        if tried >= self._max_attempts:
            raise WorkerLost(
                f"{self._stage} {unit.name}: its worker was lost {tried} time(s), the limit is "
                f"{self._max_attempts}; last: {reason}; {_remedy(reason)}"
            )
        self._queue.appendleft(unit)
        self._observer(UnitRetried(stage=self._stage, unit=unit.name, attempt=tried + 1, reason=reason))

    def results(self) -> dict[str, dict[str, Any]]:
        """Return the values by unit name, in the order the units were given."""
        return {unit.name: self._results[unit.name] for unit in self._units}


def _remedy(reason: str) -> str:
    """Return what helps against what a worker died of."""
    again = "run the same command again: finished work is kept"
    if reason.startswith(raysetup.OUT_OF_MEMORY):
        return (
            f"use fewer --workers or more --cpus-per-actor, so that fewer share a machine, then {again}; if one alone "
            "is too much, begin anew with more --shards or a smaller --memory"
        )
    return f"if memory is short use fewer --workers or more --shards, then {again}"
