"""What every command does that writes into a run: hold its lock, keep its log, stop when it is asked or has lost it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...storage.errors import RunLost
from ...storage.lock import RunLock, fenced, holding, holding_here
from ...storage.place import check_place
from ...storage.rundir import RunDirectory
from ..executors.base import Handler, Report, Unit, side_by_side
from ..executors.events import Event, Observer, warn
from .journal import Journal


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """Passes events on to the log and to who listens, while the run is ours."""

    inner: Observer
    lock: RunLock
    journal: Journal

    def __call__(self, event: Event) -> None:
        self.lock.check()
        self.journal(event)
        self.inner(event)


@contextmanager
def writing(
    directory: RunDirectory, observer: Observer, *, command: str, wait: bool = False
) -> Iterator[Observer]:
    """Hold a run while something is written into it; yields who is to be told instead of ``observer``.

    A command that is part of another which holds the run already goes on under its lock.

    Args:
        directory: The run; it need not be there.
        observer: Hears of everything that happens, also for whom is waited.
        command: What others are told is being done.
        wait: Wait for another command that has the run.

    Raises:
        RunLocked: Another command has it.
        StoreError: Something else is in that place, or a run of a later version.
        CorruptStore: Its ``run.json`` is damaged.
    """
    if holding_here(directory.uri) is not None:
        yield observer
        return
    if directory.exists():
        directory.read()  # what is no run of ours gets neither lock nor log
    else:
        check_place(directory.uri)
    lock, journal = RunLock(directory.uri, f"hydra-pipe {command}"), Journal(directory)
    lock.standing, lock.on_beat = journal.standing, journal.flush

    def tell(text: str) -> None:
        warn(observer, text)
        journal.say("Note", message=text)

    lock.acquire(wait=wait, tell=tell)
    try:
        journal.say("Begun", command=command, host=lock.process.host, pid=lock.process.pid)
        yield _Told(observer, lock, journal)
    except BaseException as error:
        journal.say("Ended", command=command, by=type(error).__name__, reason=str(error))
        if not isinstance(error, RunLost):
            journal.flush()
        raise
    else:
        journal.say("Ended", command=command, by=None)
        journal.flush()
    finally:
        lock.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fenced:
    """A handler, in whatever process, that commits nothing once the run is not its command's any more.

    Attributes:
        handler: Does the units.
        uri: The run.
        owner: Of its lock.
    """

    handler: Handler
    uri: str
    owner: str

    @property
    def side_by_side(self) -> bool:
        """As the handler itself says."""
        return side_by_side(self.handler)

    def __call__(self, unit: Unit, report: Report) -> dict[str, object]:
        """Do a unit."""
        with fenced(self.uri, self.owner):
            return self.handler(unit, report)


def fence(directory: RunDirectory, handler: Handler) -> Handler:
    """Return a handler that works for the lock which is held here, if one is."""
    lock = holding(directory.uri)
    return handler if lock is None else Fenced(handler=handler, uri=directory.uri, owner=lock.owner)
