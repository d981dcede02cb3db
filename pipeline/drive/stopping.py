"""Asking the command that writes to a run to end, and waiting until it has."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ...storage.lock import LOOK_SECONDS, STALE_SECONDS, Holder, ask_to_stop, clock, read_holder
from ...storage.rundir import RunDirectory
from ...storage.uri import is_local
from ..reading.run_info import read_info

REMOTE_LOOK_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """What became of a request to stop.

    Attributes:
        run: Address of the run.
        holder: Who was asked; None: nobody writes to the run.
        ended: Whether it has ended; None: nobody waited.
    """

    run: str
    holder: Holder | None
    ended: bool | None


def stop(uri: str, *, wait: bool = True, tell: Callable[[str], None] = lambda text: None) -> Stopped:
    """Ask whoever writes to a run to finish the units in work, commit them, and end.

    Args:
        uri: The run.
        wait: Until it has ended, or has given no sign of life for so long that it counts as dead.
        tell: Hears for whom is waited.

    Raises:
        RunNotFound: There is no run, and nobody about to make one.
    """
    directory = RunDirectory(uri)
    holder = read_holder(directory.uri)
    if holder is None:
        read_info(directory)  # says that there is no run, where there is none
        return Stopped(run=directory.uri, holder=None, ended=None)
    ask_to_stop(directory.uri, holder)
    if not wait:
        return Stopped(run=directory.uri, holder=holder, ended=None)
    tell(f"asked {holder} to finish the units in work and end; waiting for it")
    return Stopped(run=directory.uri, holder=holder, ended=_ended(directory.uri, holder))


def _ended(uri: str, asked: Holder) -> bool:
    """Wait; return whether the holder has ended, and not only fallen silent."""
    last, since = asked, clock()
    while True:
        found = read_holder(uri)
        if found is None or found.owner != asked.owner:
            return True
        if found != last:
            last, since = found, clock()
        elif clock() - since > STALE_SECONDS:
            return False
        time.sleep(LOOK_SECONDS if is_local(uri) else REMOTE_LOOK_SECONDS)
