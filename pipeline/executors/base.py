"""A unit of work, the handler that does it, and what an executor promises.

A stage is a list of units. A unit is idempotent: the handler writes and commits its results
itself, so that a unit whose worker died half-way is simply done again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...storage.errors import RunStopped
from .events import Observer

Stopping = Callable[[], bool]
"""Whether no further unit is to be begun."""


def never() -> bool:
    """Stop for nobody."""
    return False


def stopped(stage: str, left: int) -> RunStopped:
    """Return what a stage raises that was asked to stop, with ``left`` units not begun."""
    return RunStopped(
        f"stopped as `hydra-pipe stop` asked, {left} units of {stage} are left; what is done is kept, and the same "
        "command continues where this one stopped"
    )


Report = Callable[[int, int], None]
"""What a handler calls with (done, total) now and then; cheap, from the handler's own thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One piece of a stage.

    Attributes:
        stage: Name of the stage.
        name: Name of the unit, unique in its stage.
        arguments: What the handler needs to know of it; a value that pickles, None where the name says all.
        disk_bytes: What it writes, at most; 0: not known. Looked for before it begins.
    """

    stage: str
    name: str
    arguments: object = None
    disk_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """The machines of an executor.

    Attributes:
        executor: Its name.
        nodes: Machines.
        cpus: Of all of them.
        gpus: Of all of them.
        slots: Units that can be in work at the same time; 0: no worker fits.
        memory_per_worker: Bytes of main memory that one worker may count on; 0: unknown.
    """

    executor: str
    nodes: int
    cpus: float
    gpus: float
    slots: int
    memory_per_worker: int


class Handler(Protocol):
    """Does units. Must pickle; one instance does many units in one process and may cache there."""

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        """Do and commit ``unit``; return JSON-able values about it."""
        ...


def side_by_side(handler: Handler) -> bool:
    """Tell whether two workers may do the same unit at the same time: one that says so of itself, ``side_by_side``.

    Such a handler writes whole files of the same bytes, each in one move, and clears nothing before.
    """
    return bool(getattr(handler, "side_by_side", False))


class Executor(Protocol):
    """Runs the units of a stage somewhere."""

    @property
    def slots(self) -> int:
        """How many units can be in work at the same time."""
        ...

    def capacity(self, *, start: bool = True) -> Capacity:
        """Describe the machines.

        Args:
            start: False asks for an estimate that starts nothing.
        """
        ...

    def run(
        self,
        stage: str,
        units: Sequence[Unit],
        handler: Handler,
        observer: Observer,
        *,
        gpus: float | None = None,
        cpus: float | None = None,
        label: str = "step",
        stopping: Stopping = never,
    ) -> dict[str, dict[str, Any]]:
        """Do all ``units``; return the handler's values by unit name, in the order of ``units``.

        Args:
            stage: Name of the stage, for events and messages.
            units: What to do; names must be unique.
            handler: What does it.
            observer: Hears of every start, progress, retry and end.
            gpus: GPUs a worker holds; None: as the executor was made.
            cpus: CPUs a worker holds; None: as the executor was made.
            label: What a count of progress is, ``step`` or ``row``.
            stopping: Asked before each unit; once it says so, those in work are finished and no other is begun.

        Raises:
            RunStopped: ``stopping`` said so, and not all is done.
            HydraError: What a handler raised, unchanged; other exceptions keep their type too.
            ClusterTooSmall: No worker can ever be placed, or none came up in time.
            WorkerLost: The workers of one unit died too often.
        """
        ...

    def close(self) -> None:
        """End all workers and whatever was started for them. May be called twice."""
        ...
