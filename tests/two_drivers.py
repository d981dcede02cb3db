"""Commands at the same time: a process that has imported everything forks one for each, so that all start at once.

    with Drivers() as drivers:
        first = drivers.start(["run", ...])
        second = drivers.start(["attribute", ...])
        first.wait(), second.wait(), first.said(), second.said()

``pair`` does so with two and a delay between. Used by ``end_to_end/test_two_drivers.py`` a few times, and by the torture
test many times.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[1]

_CODE = """
import os, sys, json, resource, signal
import hydra_pipe.pipeline.run, hydra_pipe.workers.training.record, hydra_pipe.pipeline.units.reduce
import hydra_pipe.pipeline.units.estimate, hydra_pipe.workers.estimators, hydra_pipe.workers.ekfac.curvature
import hydra_pipe.pipeline.decide.detect, hydra_pipe.pipeline.evaluate.evaluate
import hydra_pipe.storage.contributions, zarr, tests.end_to_end.slow_recipes
import torch._dynamo, rich.console, rich.table  # what a run imports late, so that a child need not
from hydra_pipe.cli import main
from hydra_pipe.storage import lock
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell started with &
ended = {}
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        while asked["wait"] not in ended:
            child, status = os.wait()
            ended[child] = os.waitstatus_to_exitcode(status)
        print(ended[asked["wait"]], flush=True)
        continue
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        os.dup2(os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        os.dup2(2, 1)
        for name, value in asked["seconds"].items():
            setattr(lock, name, value)
        for name, value in asked["limits"].items():
            which = getattr(resource, name)
            resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
        main(asked["words"])
        os._exit(0)
    print(child, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Driver:
    """A command that was started.

    Attributes:
        drivers: What started it.
        pid: Its process.
        log: File of what it says.
    """

    drivers: Drivers
    pid: int
    log: Path

    def signal(self, number: int) -> None:
        """Send it a signal; one that has ended gets none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Return its exit code, once it has ended."""
        return int(self.drivers.ask({"wait": self.pid}))

    def said(self) -> str:
        """Return what it has written so far."""
        return self.log.read_text() if self.log.exists() else ""


class Drivers:
    """Starts commands; ends those that are left when it is closed."""

    def __init__(self) -> None:
        self._logs = tempfile.TemporaryDirectory()
        self._started: list[Driver] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert self._line() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        for driver in self._started:
            driver.signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(300)
        self._logs.cleanup()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, document: Mapping[str, object]) -> str:
        """Ask the process, return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(document) + "\n")
        self._process.stdin.flush()
        return self._line()

    def start(
        self,
        words: Sequence[object],
        *,
        said: Path | None = None,
        limits: Mapping[str, int] | None = None,
        **seconds: float,
    ) -> Driver:
        """Start ``hydra-pipe`` with these words.

        Args:
            words: Of the command line.
            said: File for what it writes; None: one of its own.
            limits: Soft limits of its process, by their names in `resource`.
            seconds: Constants of ``storage.lock`` that are others for it.
        """
        log = said or Path(self._logs.name, f"{len(self._started)}.log")
        asked = {
            "words": [str(word) for word in words],
            "log": str(log),
            "limits": dict(limits or {}),
            "seconds": seconds,
        }
        driver = Driver(self, int(self.ask(asked)), log)
        self._started.append(driver)
        return driver

    def pair(
        self, first: Sequence[object], second: Sequence[object], *, after: float = 0.0
    ) -> tuple[tuple[int, str], tuple[int, str]]:
        """Start two commands, the second ``after`` seconds after the first; return exit code and words of each."""
        one = self.start(first)
        time.sleep(after)
        other = self.start(second)
        codes = one.wait(), other.wait()
        return (codes[0], one.said()), (codes[1], other.said())


def wait_for(path: Path, driver: Driver, *, seconds: float = 300) -> None:
    """Return once a file is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came: {driver.said()}"
        time.sleep(0.002)
