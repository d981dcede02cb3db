"""What a run tells those who do not listen to it: its log, and how far it is.

``log.jsonl`` in the run has one JSON document a line, the older part ``log.1.jsonl``; together they stay below
two times `MOST_BYTES`. An object store cannot append, so that there the whole log is written now and then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ...storage import files as disk
from ...storage import layout
from ...storage.documents import plain
from ...storage.errors import StoreError
from ...storage.lock import Standing, clock, now
from ...storage.rundir import RunDirectory
from ...storage.uri import is_local
from ..executors.events import (
    Event,
    Note,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    UnitBackedUp,
    UnitFinished,
    UnitProgress,
    UnitRetried,
    UnitSkipped,
    UnitStalled,
    UnitStarted,
    UnitStraggles,
)
from ..executors.pace import StageProgress, rate, time_left

MOST_BYTES = 4 << 20
"""Of a log; longer ones are moved away."""
MOST_REMOTE_BYTES = 1 << 20
"""Of a log on an object store, where all of it is written each time."""
LONGEST_TEXT = 2000
"""Letters of a message."""
_WRITE_SECONDS = (1.0, 30.0)
"""Between two writes of a log, local and remote."""

_LOGGED = (
    RunStarted,
    StageStarted,
    UnitStarted,
    UnitFinished,
    UnitRetried,
    UnitStalled,
    UnitStraggles,
    UnitBackedUp,
    StageFinished,
    Note,
    RunFinished,
)
_LEFT_OUT = frozenset({"values", "summary"})  # manifests hold the one, run.json the other


class Journal:
    """Writes the log of one command, and keeps how far it is. Called from the command's thread and the lock's.

    Args:
        directory: The run; nothing is written before it is one.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory, self._local = directory, is_local(directory.uri)
        self._lines: list[bytes] = []
        self._before: bytes | None = None  # of a remote log
        self._written = clock()
        self._stage: StageProgress | None = None
        self._moved = now()
        self._mutex = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        with self._mutex:
            self._follow(event)
        if isinstance(event, _LOGGED):
            fields = {
                field.name: getattr(event, field.name)
                for field in dataclasses.fields(event)
                if field.name not in _LEFT_OUT
            }
            self.say(type(event).__name__, **fields)

    def say(self, event: str, **fields: Any) -> None:
        """Add a line."""
        told = {
            name: value[:LONGEST_TEXT] if isinstance(value, str) else value for name, value in fields.items()
        }
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps(plain({"time": time, "event": event, **told}), ensure_ascii=False)
        with self._mutex:
            self._lines.append(f"{line}\n".encode())
        if clock() - self._written > _WRITE_SECONDS[not self._local]:
            self.flush()

    def standing(self) -> Standing | None:
        """Return how far the stage in work is; None: there is none."""
        with self._mutex:
            stage, moment = self._stage, clock()
            if stage is None:
                return None
            return Standing(
                stage=stage.stage,
                units=stage.units,
                finished=stage.finished_units,
                total=stage.total,
                amount=stage.amount,
                label=stage.label,
                rate=rate(stage, moment),
                left_seconds=time_left(stage, moment),
                moved=self._moved,
            )

    def flush(self) -> None:
        """Write what there is; a log that cannot be written ends no run."""
        with self._mutex, contextlib.suppress(OSError, StoreError):
            self._written = clock()
            if self._lines and self._directory.exists():
                (self._append if self._local else self._put)(b"".join(self._lines))
                self._lines.clear()

    def _append(self, data: bytes) -> None:
        path = self._directory.path(layout.LOG)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_size > MOST_BYTES:
                os.replace(path, self._directory.path(layout.LOG_BEFORE))
        # Not to wait for ever where somebody put a pipe in its place.
        how = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(path, how, 0o666), "ab", buffering=0) as file:
            file.write(data)

    def _put(self, data: bytes) -> None:
        path = self._directory.path(layout.LOG)
        if self._before is None:
            self._before = b""
            with contextlib.suppress(FileNotFoundError):
                self._before = disk.read_bytes(path)
        whole = self._before + data
        if len(whole) > MOST_REMOTE_BYTES:
            half = whole[-MOST_REMOTE_BYTES // 2 :]
            whole = half[half.index(b"\n") + 1 :]
        disk.write_bytes(path, whole)
        self._before = whole

    def _follow(self, event: Event) -> None:
        handler: Callable[[Any, StageProgress | None], None] | None = _FOLLOWED.get(type(event))
        if isinstance(event, StageStarted):
            label = event.unit_label
            self._stage = StageProgress(event.stage, event.units, event.total or 0, label, clock())
        elif isinstance(event, StageFinished):
            self._stage = None
        elif (
            handler is not None
            and self._stage is not None
            and self._stage.stage == getattr(event, "stage", None)
        ):
            handler(event, self._stage)
        else:
            return
        self._moved = now()


def _progressed(event: UnitProgress, stage: StageProgress) -> None:
    stage.advance(event.unit, event.done, event.total)


def _finished(event: UnitFinished, stage: StageProgress) -> None:
    stage.finish(event.unit)


def _skipped(event: UnitSkipped, stage: StageProgress) -> None:
    stage.skip(event.unit, clock())


def _retried(event: UnitRetried, stage: StageProgress) -> None:
    stage.done.pop(event.unit, None)


_FOLLOWED: dict[type, Callable[[Any, Any], None]] = {
    UnitProgress: _progressed,
    UnitFinished: _finished,
    UnitSkipped: _skipped,
    UnitRetried: _retried,
}
