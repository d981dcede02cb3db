"""Drivers one after the other, signalled at any moment."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.two_drivers import Drivers, wait_for

PAUSED = ("tests.end_to_end.slow_recipes:Paused", "--set", "pause=0.004")
OPTIONS = ("--executor", "serial", "--device", "cpu", "--shards", "4", "--quiet")


class Nursery(Drivers):
    """Starts one command, waits for its end, and may signal it meanwhile.

    Attributes:
        child: Process of the command that was started last.
    """

    child: int | None = None

    def drive(
        self,
        words: Sequence[object],
        *,
        seen: Path | None = None,
        after: float | None = None,
        number: int = signal.SIGKILL,
        limits: Mapping[str, int] | None = None,
        said: Path | None = None,
    ) -> int:
        """Run ``hydra-pipe`` with ``words``; signal it, if at all, ``after`` seconds once ``seen`` is there.

        Where this process gets no turn in time, the other may be through before: it ends with 0 then.

        Args:
            words: The command line.
            seen: A file to wait for.
            after: Seconds.
            number: The signal.
            limits: Soft limits of the process, by their names in `resource`.
            said: File for what it prints.

        Returns:
            Its exit code; -9 when it was killed.
        """
        driver = self.start(words, said=said, limits=limits)
        self.child = driver.pid
        if after is not None:
            if seen is not None:
                wait_for(seen, driver)
            time.sleep(after)
            driver.signal(number)
        return driver.wait()

    def stopped(self, place: Path, sight: str, *, after: float, number: int) -> tuple[Path, int]:
        """Run ``Paused`` below ``place`` and signal it ``after`` seconds after the first sight of a file.

        Returns:
            The run, and its exit code. Tried anew while runs are through before the signal comes.
        """
        for attempt in range(5):
            out = place / f"run-{attempt}"
            words = ["run", *PAUSED, *OPTIONS, "--out", str(out)]
            code = self.drive(words, seen=out / sight, after=after, number=number)
            if code != 0:
                break
        return out, code
