"""Units that do not move: a word when one has made no progress for a minute, an end when it takes too long."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from ...storage.errors import WorkerLost
from .events import Observer, UnitStalled

STALLED_SECONDS = 60.0
"""After so long without progress a unit is spoken of, and again after as long."""


class Stalls:
    """The units in work, and when each last moved.

    Args:
        stage: Name of the stage.
        observer: Hears of units that do not move.
        clock: Returns seconds that only grow.
        timeout: Seconds that a unit may take; None: any.
    """

    def __init__(
        self, stage: str, observer: Observer, *, clock: Callable[[], float], timeout: float | None
    ) -> None:
        self._stage, self._observer, self._clock, self._timeout = stage, observer, clock, timeout
        self._began: dict[str, float] = {}
        self._moved: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """Note that a unit is begun."""
        self._began[name] = self._moved[name] = self._said[name] = self._clock()

    def moved(self, name: str) -> None:
        """Note that a unit made progress."""
        if name in self._began:
            self._moved[name] = self._said[name] = self._clock()

    def end(self, name: str) -> None:
        """Note that a unit is no longer in work."""
        for held in (self._began, self._moved, self._said):
            held.pop(name, None)

    def say(self) -> None:
        """Tell the observer of units that have not moved for a while."""
        now = self._clock()
        for name, said in list(self._said.items()):
            if now - said >= STALLED_SECONDS:
                self._said[name] = now
                quiet = now - self._moved.get(name, now)
                self._observer(UnitStalled(stage=self._stage, unit=name, seconds=quiet))

    def overdue(self, name: str) -> str | None:
        """Return why the attempt at a unit is over; None: it may go on."""
        if self._timeout is None or self._clock() - self._began.get(name, self._clock()) <= self._timeout:
            return None
        return f"it took longer than {self._timeout:g} s (--unit-timeout)"


@contextlib.contextmanager
def listened(stalls: Stalls, every: float = 1.0) -> Iterator[None]:
    """Look for units that do not move from a thread of its own, for work that fills this one."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(every):
            stalls.say()

    watcher = threading.Thread(target=look, name="hydra-pipe-stalls", daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads: then nothing is said
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if watcher.is_alive():
            watcher.join()


@contextlib.contextmanager
def limited(seconds: float | None, error: Callable[[], WorkerLost]) -> Iterator[None]:
    """Raise ``error`` in this thread when what is within takes longer, also while it waits for something.

    A signal does that, so only in a main thread whose alarm nobody else has; elsewhere the unit's own reports
    of progress have to.
    """
    usable = (
        seconds is not None
        and hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    )
    if not usable:
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise error()

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def took_too_long(stage: str, name: str, why: str) -> WorkerLost:
    """Return what ends a run in this process whose unit took too long."""
    return WorkerLost(
        f"{stage} {name}: {why}; raise it or leave it out, or use --executor ray, which tries a unit again elsewhere; "
        "what is committed is kept"
    )
