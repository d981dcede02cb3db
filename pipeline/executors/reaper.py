"""Ends what is left of a Ray that was started here once the process that started it is gone, whatever ended it.

Ray's own processes end with it, but for agents that a raylet was just starting: they watch a parent that they never saw, and stay
for good. A process that is killed cannot see to that, so a small one beside it does. It is run as a file of its own, and
imports nothing of this project.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_DONE = b"done"
_LOOK_SECONDS, _QUIET_SECONDS, _MOST_SECONDS = 0.2, 2.0, 30.0
"""Between two looks, without a process until all have ended, and in all."""
_END_SECONDS = 3.0


class Reaper:
    """Waits until this process is gone, then ends the processes of a session directory and removes it.

    Args:
        directory: Ray's, of one Ray alone.
    """

    def __init__(self, directory: str) -> None:
        # A session of its own: Ctrl-C at a terminal is not meant for it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Tell it that nothing is left."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(_DONE, timeout=5)


def wait_and_reap(directory: str) -> None:
    """Wait for the end of standard input, which is that of the other process or its word that all is well."""
    if sys.stdin.buffer.read() == _DONE:
        return
    begun = seen = time.monotonic()
    while time.monotonic() < min(begun + _MOST_SECONDS, seen + _QUIET_SECONDS):
        for process in processes_of_ray(directory):
            seen = time.monotonic()
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(_LOOK_SECONDS)
    shutil.rmtree(directory, ignore_errors=True)


def end_processes(directory: str) -> None:
    """See to it that the processes of a Ray which was shut down have ended; they have a moment to do so by themselves."""
    _, alive = psutil.wait_procs(list(processes_of_ray(directory)), timeout=_END_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()


def processes_of_ray(directory: str) -> Iterator[psutil.Process]:
    """Yield Ray's processes that name a session directory or have a file open below it: not who reads its logs."""
    below = str(Path(directory)) + "/"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, IndexError):
            words = process.cmdline()
            if not (words[0].startswith("ray::") or any("/ray/" in word for word in words)):
                continue
            named = any(below in word for word in words)
            if named or any(file.path.startswith(below) for file in process.open_files()):
                yield process


if __name__ == "__main__":
    wait_and_reap(sys.argv[1])
