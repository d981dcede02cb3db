"""Drivers that start at once, to be signalled at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import ROOT

PAUSED = ("tests.end_to_end.slow_recipes:Paused", "--set", "pause=0.004")
OPTIONS = ("--executor", "serial", "--device", "cpu", "--shards", "4", "--quiet")


class Nursery:
    """A process that has imported everything and forks drivers from itself, so that each starts at once."""

    CODE = """
import os, sys, json, resource, signal
import hydra_pipe.pipeline.run, hydra_pipe.workers.training.record, hydra_pipe.pipeline.units.reduce
import hydra_pipe.storage.contributions, zarr, tests.end_to_end.slow_recipes
import torch._dynamo, rich.console, rich.table  # what a run imports late, so that a child need not
from hydra_pipe.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell started with &
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        asked = json.loads(line)
        if asked["said"]:
            os.dup2(os.open(asked["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        for name, value in asked["limits"].items():
            which = getattr(resource, name)
            resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
        main(asked["words"])
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

    def __init__(self, **more: str) -> None:
        """Start it; ``more`` are further variables of its environment."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.child: int | None = None
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def drive(
        self,
        words: Sequence[str],
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
        assert self.process.stdin is not None
        asked = {
            "words": list(words),
            "limits": dict(limits or {}),
            "said": None if said is None else str(said),
        }
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        self.child = child = int(self._line())
        if after is not None:
            deadline = time.monotonic() + 300
            while seen is not None and not seen.exists():
                assert time.monotonic() < deadline, f"{seen} never came"
                time.sleep(0.002)
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):  # through already
                os.kill(child, number)
        return int(self._line())

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

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(300)
