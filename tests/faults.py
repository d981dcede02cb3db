"""Faults as scripted data: which unit fails how, at which attempt.

``FaultPlan(directory=d, script={"unit-3": ["kill", "kill"]})`` makes the first two attempts of
``unit-3`` end in SIGKILL and the third go well. Attempts are counted in files, so exactly, over all
processes that ever tried, those that were killed included.

Actions: ``kill`` before any work; ``kill@K`` when progress is reported the K-th time; ``kill>S`` S
seconds after the start, wherever the work is then; ``kill-after`` when the work is done but not yet
answered for; ``exit:CODE``; ``memory`` takes memory without end; ``hang`` sleeps for good; ``stop`` has the whole
process stand still; ``wait:FILE`` goes on once that file is there; ``raise:TEXT`` a ValueError; ``hydra:TEXT`` a
NonFiniteLoss; ``odd`` an exception that cannot be unpickled; ``ok`` nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_pipe.pipeline.executors.base import Handler, Report, Unit, side_by_side
from hydra_pipe.pipeline.executors.events import Event
from hydra_pipe.storage.errors import NonFiniteLoss


class OddError(Exception):
    """Pickles, and cannot be unpickled: its constructor wants more than its arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPlan:
    """What goes wrong: by unit name, one action an attempt; attempts beyond the list go well."""

    directory: str
    script: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def begin(self, unit: str) -> str:
        """Count an attempt and return its action."""
        number = 1
        while True:
            try:
                with open(Path(self.directory, f"{unit}.{number}.attempt"), "x") as file:
                    file.write(str(os.getpid()))
                break
            except FileExistsError:
                number += 1
        actions = self.script.get(unit, ())
        return actions[number - 1] if number <= len(actions) else "ok"

    def attempts(self, unit: str) -> int:
        """Return how often the unit was begun."""
        return len(list(Path(self.directory).glob(f"{unit}.*.attempt")))

    def pids(self) -> set[int]:
        """Return every process that began a unit."""
        return {int(path.read_text() or 0) for path in Path(self.directory).glob("*.attempt")} - {0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Faulty:
    """A handler with faults; pickles with its plan."""

    plan: FaultPlan
    handler: Handler

    @property
    def side_by_side(self) -> bool:
        """As the handler itself says."""
        return side_by_side(self.handler)

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        action = self.plan.begin(unit.name)
        reports = 0

        def watched(done: int, total: int) -> None:
            nonlocal reports
            reports += 1
            report(done, total)
            if action == f"kill@{reports}":
                die()

        _before(action)
        values = self.handler(unit, watched)
        if action == "kill-after":
            die()
        return values


def spoiled(run: Callable[..., Any], plan: FaultPlan) -> Callable[..., Any]:
    """Return an executor's ``run`` that does every unit with faults."""

    def spoiled_run(
        self: Any, stage: str, units: Sequence[Unit], handler: Handler, *others: Any, **more: Any
    ) -> Any:
        return run(self, stage, units, Faulty(plan=plan, handler=handler), *others, **more)

    return spoiled_run


def _before(action: str) -> None:
    kind, _, rest = action.partition(":")
    if kind == "kill":
        die()
    elif kind.startswith("kill>"):
        threading.Timer(float(kind.removeprefix("kill>")), die).start()
    elif kind == "exit":
        sys.exit(int(rest))
    elif kind == "memory":
        held = []
        while True:  # ends when somebody ends it: Ray's monitor or the kernel
            held.append(os.urandom(1 << 20) * 32)
            time.sleep(0.02)
    elif kind == "hang":
        time.sleep(10_000)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "wait":
        while not Path(rest).exists():
            time.sleep(0.02)
    elif kind == "raise":
        raise ValueError(rest)
    elif kind == "hydra":
        raise NonFiniteLoss(rest)
    elif kind == "odd":
        raise OddError("one", "two")
    else:
        assert kind.startswith(("kill@", "kill-after", "ok")), f"no such fault: {action}"


def die() -> None:
    """End this process as the kernel's OOM killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """A harmless handler: ``steps`` steps of ``pause`` seconds, then a small result on disk.

    With ``until`` it ends sooner, once that file is there. ``side_by_side``: two workers may do the same unit.

    Returns the sum of the steps' numbers plus ``unit.arguments["add"]``, and who did it.
    """

    directory: str
    steps: int = 4
    pause: float = 0.005
    until: str = ""
    side_by_side: bool = False

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        Path(self.directory, f"{os.getpid()}.pid").touch()
        total = int(unit.arguments.get("add", 0))
        for step in range(1, self.steps + 1):
            time.sleep(self.pause)
            total += step
            report(step, self.steps)
            if self.until and Path(self.until).exists():
                break
        Path(self.directory, f"{unit.name}.done").write_text(str(total))
        return {
            "total": total,
            "pid": os.getpid(),
            "thread": threading.get_ident(),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "omp": os.environ.get("OMP_NUM_THREADS"),
        }

    def pids(self) -> set[int]:
        """Return every process that ever worked with this handler."""
        return {int(path.stem) for path in Path(self.directory).glob("*.pid")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unloadable:
    """A handler that pickles and cannot be unpickled, as a recipe that a node lacks."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return (__import__, ("no_such_module_anywhere",))

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        raise AssertionError


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowToLoad:
    """A handler that takes seconds to unpickle, as a recipe with much data."""

    handler: Callable[[Unit, Report], dict[str, Any]]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, float]]:
        return (after, (self.handler, 3.0))

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        raise AssertionError


def after(handler: Any, seconds: float) -> Any:
    """Return ``handler``, late."""
    time.sleep(seconds)
    return handler


def units(count: int, stage: str = "test") -> list[Unit]:
    """Return ``count`` units ``unit-0``, ``unit-1``, ..."""
    return [Unit(stage=stage, name=f"unit-{n}", arguments={"add": n}) for n in range(count)]


class Recorder:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        """Return the events of one kind, in order."""
        return [event for event in self.events if type(event) is kind]


def totals(results: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return the sums that ``Count`` computed."""
    return {name: values["total"] for name, values in results.items()}
