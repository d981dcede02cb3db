"""Which process this is, and whether one that was noted is still there."""

from __future__ import annotations

import functools
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

_GONE = ("Z", "X", "x")
"""States of a process that has ended and that nobody has asked about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process, as others can tell it from any other.

    Attributes:
        host: Name of its machine.
        machine: What tells the machine's boot and the container from others; empty where the system has no such names.
        pid: Its number there.
        started: When it was started, as the system counts; a number is given again to a later process.
    """

    host: str
    machine: str
    pid: int
    started: str


def this_process() -> Process:
    """Return this one."""
    return Process(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
    )


def is_gone(process: Process) -> bool:
    """Whether a process has surely ended: it was one of this machine and container, and is not there any more."""
    if not is_here(process):
        return False
    started = _started(process.pid)
    known = bool(started) and bool(process.started)
    return started is None or (known and started != process.started)


def is_here(process: Process) -> bool:
    """Whether a process is one of this machine and container, so that `is_gone` can tell."""
    here = this_process()
    return (process.host, process.machine) == (here.host, here.machine)


@functools.cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return when a process was started; None: there is none, or it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
        return _asked(pid)
    except OSError:
        return _asked(pid)
    fields = text[text.rindex(")") + 2 :].split()  # a name may hold blanks and brackets
    return None if fields[0] in _GONE else fields[19]


def _asked(pid: int) -> str | None:
    try:
        found = psutil.Process(pid)
        ended = found.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return None if ended else str(found.create_time())
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return ""
