"""One writer a run: the lock that every command holds while it writes.

``lock.json`` in the run says who holds it, and is rewritten every `BEAT_SECONDS`. It is taken over at once where
its holder was a process of this machine that is gone, and else when it has not changed for `STALE_SECONDS` by the
clock of who waits: clocks of two machines are never compared. Who finds another's name in the file stops.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from . import files as disk
from . import layout
from .documents import dump, load
from .errors import CorruptStore, RunLocked, RunLost, StoreError
from .lock_file import Seen, lock_file
from .processes import Process, is_gone, is_here, this_process
from .typed import from_json, to_json
from .uri import is_local, join, parent

BEAT_SECONDS = 10.0
"""Between two signs of life."""
STALE_SECONDS = 60.0
"""Without one, a holder is taken for dead."""
LOOK_SECONDS = 1.0
"""Between two looks: of who waits, and for a request to stop. On an object store only every sign of life looks."""

Tell = Callable[[str], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far a command is, as its lock tells others.

    Attributes:
        stage: The stage in work.
        units: Units of the stage in all.
        finished: Of them done, those of earlier commands included.
        total: Steps or rows of the stage; 0: not counted.
        amount: Of them done.
        label: What these are.
        rate: Of them a second, of this command; None: not known yet.
        left_seconds: Of the stage, at the pace so far; None: not known yet.
        moved: When something last happened, by the holder's clock.
    """

    stage: str
    units: int = 0
    finished: int = 0
    total: int = 0
    amount: int = 0
    label: str = ""
    rate: float | None = None
    left_seconds: float | None = None
    moved: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """What a lock says.

    Attributes:
        owner: Drawn by chance for each lock.
        command: What it does.
        process: Which process it is.
        since: When it took the run, by its own clock.
        beat: Signs of life so far.
        at: When the last was given, by its own clock.
        standing: How far it is.
    """

    owner: str
    command: str
    process: Process
    since: str
    beat: int = 0
    at: str = ""
    standing: Standing | None = None

    def __str__(self) -> str:
        process = self.process
        return f"{self.command} on {process.host}, process {process.pid}, since {self.since}"


def now() -> str:
    """Return the time as text, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clock() -> float:
    """Return seconds that only grow, also while the machine sleeps where the system counts that."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class RunLock:
    """The lock of one run; `acquire`, then `release`.

    Args:
        uri: The run directory, checked.
        command: What is done, as others are told.
    """

    def __init__(self, uri: str, command: str) -> None:
        self.uri = uri
        self.standing: Callable[[], Standing | None] = lambda: None
        self.on_beat: Callable[[], None] = lambda: None
        self._file = lock_file(join(uri, layout.LOCK))
        self._me = Holder(owner=uuid.uuid4().hex, command=command, process=this_process(), since=now())
        self._thread_id = threading.get_ident()
        self._seen: Seen | None = None
        self._alive = clock()
        self._lost: str | None = None
        self._made: list[str] = []
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def owner(self) -> str:
        """What tells this lock from any other."""
        return self._me.owner

    @property
    def process(self) -> Process:
        """This process."""
        return self._me.process

    @property
    def stop_asked(self) -> bool:
        """Whether `ask_to_stop` was called for this holder."""
        return self._stop.is_set()

    def acquire(self, *, wait: bool = False, tell: Tell = lambda text: None) -> None:
        """Take the run.

        Args:
            wait: Wait for whoever has it.
            tell: Hears for whom is waited, and from whom the run was taken over.

        Raises:
            RunLocked: Another command has it.
            StoreError: Nothing can be written there.
        """
        self._made = _missing(self.uri) if is_local(self.uri) else []
        try:
            self._seen = self._taken(wait, tell)
        except BaseException:
            self._remove_made()
            raise
        self._alive = clock()
        with contextlib.suppress(OSError):
            disk.remove(join(self.uri, layout.STOP_ASKED))
        _HELD.append(self)
        self._thread = threading.Thread(target=self._beat_on, name="hydra-pipe lock", daemon=True)
        self._thread.start()

    def _taken(self, wait: bool, tell: Tell) -> Seen:
        waiting = _Waiting(self.uri, wait, tell)
        while True:
            data = self._document()
            seen = self._file.create(data)
            if seen is None:
                found = self._file.read()
                if found is None:
                    continue
                why = waiting.look(found)
                if why is None:
                    time.sleep(min(LOOK_SECONDS, STALE_SECONDS / 4))
                    continue
                seen = self._file.swap(data, found)
                if seen is not None:
                    tell(f"took {self.uri} over from {waiting.whom}: {why}")
            if seen is not None and (self._file.exact or self._settled(tell)):
                return seen

    def _settled(self, tell: Tell) -> bool:
        """Whether the file is still ours, where two may write it at the same moment."""
        tell(
            f"{self.uri}: this storage cannot make a lock that is safe against commands that start at the same moment; "
            "start one at a time"
        )
        time.sleep(2 * LOOK_SECONDS)
        found = self._file.read()
        return found is not None and _owner(found) == self.owner

    def release(self) -> None:
        """Give the run up; nothing happens where it was lost."""
        if self._me.process.pid != os.getpid():  # a copy that fork made
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self in _HELD:
            _HELD.remove(self)
        if self._seen is None or self._lost is not None:
            return
        try:
            self._file.remove(self._seen)
            disk.remove(join(self.uri, layout.STOP_ASKED))
        except (OSError, StoreError) as error:
            _log.warning("%s: its lock stays behind (%s)", self.uri, " ".join(str(error).split()))
        self._seen = None
        self._remove_made()

    def check(self) -> None:
        """Make sure that the run is still ours.

        Raises:
            RunLost: It is not, or nobody can tell: there was no sign of life for too long.
        """
        if self._lost is None and clock() - self._alive > 2.5 * BEAT_SECONDS:
            self._beat()  # the process was stopped for a while: who knows what happened
            if self._lost is None and clock() - self._alive > STALE_SECONDS:
                self._lost = (
                    f"the lock of {self.uri} could not be renewed for {STALE_SECONDS:.0f} s, so another command may have "
                    "taken the run; see whether the storage can be reached, then run the same command again"
                )
        if self._lost is not None:
            raise RunLost(self._lost)

    def _beat_on(self) -> None:
        look = LOOK_SECONDS if is_local(self.uri) else BEAT_SECONDS
        next_beat = clock() + BEAT_SECONDS
        while not self._ended.wait(min(look, BEAT_SECONDS)):
            self._look_for_stop()
            if clock() >= next_beat:
                next_beat = clock() + BEAT_SECONDS
                self._beat()
                if self._lost is None:
                    self.on_beat()

    def _look_for_stop(self) -> None:
        if not self._stop.is_set():
            # Whoever works finds out whether the storage is gone.
            with contextlib.suppress(OSError, StoreError):
                address = join(self.uri, layout.STOP_ASKED)
                if load(disk.read_bytes(address), address).get("owner") == self.owner:
                    self._stop.set()

    def _beat(self) -> None:
        """Give a sign of life, or find out that the run is lost."""
        with self._mutex:
            if self._seen is None or self._lost is not None or self._ended.is_set():
                return
            self._me = replace(self._me, beat=self._me.beat + 1, at=now(), standing=self.standing())
            try:
                seen = self._file.swap(self._document(), self._seen)
                found = None if seen is not None else self._file.read()
            except (OSError, StoreError) as error:
                _log.info("%s: no sign of life could be given: %s", self.uri, error)
                return
            if seen is None and found is not None and _owner(found) == self.owner:
                seen = found  # a put whose answer was lost
            if seen is not None:
                self._seen, self._alive = seen, clock()
                return
            by = "its lock was removed" if found is None else f"{_described(found)} has taken it over"
            self._lost = (
                f"{self.uri} is not this command's any more: {by}; it was silent for too long (suspended, or cut off from "
                "its storage) and has stopped. Run it again when the other has ended"
            )

    def _document(self) -> bytes:
        self._me = replace(self._me, at=now())
        return dump(to_json(self._me))

    def _remove_made(self) -> None:
        """Remove directories that were made for the lock, where nothing else came into them."""
        for directory in self._made:
            with contextlib.suppress(OSError):
                os.rmdir(directory)


class _Waiting:
    """Whoever wants a lock that is taken: decides from one look to the next."""

    def __init__(self, uri: str, wait: bool, tell: Tell) -> None:
        self.uri, self.wait, self.tell = uri, wait, tell
        self.whom = "?"
        self._data: bytes | None = None
        self._changes = -1
        self._since = self._told = clock()
        self._said = False

    def look(self, found: Seen) -> str | None:
        """Return why the lock may be taken over; None: it may not yet.

        Raises:
            RunLocked: It may not, and nobody waits.
        """
        holder = _parsed(found)
        if found.data != self._data:
            self._data, self._since = found.data, clock()
            self._changes += 1
        self.whom = _described(found)
        if holder is not None and is_gone(holder.process):
            return "that process has ended"
        if clock() - self._since >= STALE_SECONDS:
            return f"it gave no sign of life for {STALE_SECONDS:.0f} s"
        alive = holder is not None and (is_here(holder.process) or self._changes > 0)
        if alive and not self.wait:
            assert holder is not None
            raise RunLocked(
                f"{self.uri} is in use by {holder}, last sign of life {holder.at}; wait for it with --wait, end it with "
                f"`hydra-pipe stop {self.uri}`, or use another --out"
            )
        self._say(alive)
        return None

    def _say(self, alive: bool) -> None:
        if self._said and clock() - self._told < STALE_SECONDS:
            return
        self._said, self._told = True, clock()
        if alive or self.wait:
            self.tell(f"waiting for {self.whom}")
        else:
            self.tell(
                f"{self.uri} is in use by {self.whom}; looking for a sign of life, at most {STALE_SECONDS:.0f} s"
            )


_HELD: list[RunLock] = []
"""What this process holds."""

_FENCED: dict[str, str] = {}
"""By run: the owner for whom this process, a worker, does units."""


def holding(uri: str) -> RunLock | None:
    """Return the lock that this process holds on a run; None: it holds none."""
    mine = (lock for lock in _HELD if lock.uri == uri and lock._me.process.pid == os.getpid())
    return next(mine, None)


def holding_here(uri: str) -> RunLock | None:
    """Return the lock that this thread took."""
    lock = holding(uri)
    return lock if lock is not None and lock._thread_id == threading.get_ident() else None


def stop_asked() -> bool:
    """Whether this thread's command was asked to stop, by any of the runs that it holds.

    Raises:
        RunLost: It has lost one of them.
    """
    mine = [lock for lock in _HELD if holding_here(lock.uri) is lock]
    for lock in mine:
        lock.check()
    return any(lock.stop_asked for lock in mine)


@contextlib.contextmanager
def fenced(uri: str, owner: str | None) -> Iterator[None]:
    """Work for the holder ``owner`` of a run: nothing is written when the run is another's; None: no one's."""
    if owner is None or holding(uri) is not None:
        yield
        return
    before = _FENCED.get(uri)
    _FENCED[uri] = owner
    try:
        yield
    finally:
        if before is None:
            _FENCED.pop(uri, None)
        else:
            _FENCED[uri] = before


def check_writable(uri: str) -> None:
    """Make sure, before something is written to a run, that it was not taken over.

    Raises:
        RunLost: It was.
    """
    lock = holding(uri)
    if lock is not None:
        lock.check()
    elif uri in _FENCED:
        try:
            found = lock_file(join(uri, layout.LOCK)).read()
        except (OSError, StoreError):  # whoever has the lock finds out whether the storage is gone
            return
        if found is None or _owner(found) != _FENCED[uri]:
            by = "nobody holds it" if found is None else f"{_described(found)} does"
            raise RunLost(
                f"{uri}: the command that this worker works for does not hold the run any more, {by}"
            )


def read_holder(uri: str) -> Holder | None:
    """Return who holds a run, as its lock says; None: nobody, or a process of this machine that is gone."""
    found = lock_file(join(uri, layout.LOCK)).read()
    holder = None if found is None else _parsed(found)
    return None if holder is None or is_gone(holder.process) else holder


def ask_to_stop(uri: str, holder: Holder) -> None:
    """Ask a holder to finish the units in work, and end."""
    request = {"owner": holder.owner, "asked": now(), "by": to_json(this_process())}
    disk.write_bytes(join(uri, layout.STOP_ASKED), dump(request))


def _parsed(found: Seen) -> Holder | None:
    """Return what a lock says; None: it is not complete (yet)."""
    try:
        return from_json(Holder, load(found.data, layout.LOCK), layout.LOCK)
    except CorruptStore:
        return None


def _owner(found: Seen) -> str | None:
    holder = _parsed(found)
    return None if holder is None else holder.owner


def _described(found: Seen) -> str:
    holder = _parsed(found)
    return "a command whose lock cannot be read" if holder is None else str(holder)


def _missing(uri: str) -> list[str]:
    """Return the directories from ``uri`` upwards that are not there."""
    found, directory = [], uri
    while directory != "/" and not os.path.lexists(directory):
        found.append(directory)
        directory = parent(directory)
    return found
