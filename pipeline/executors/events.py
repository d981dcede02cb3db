"""What a run tells whoever listens: small frozen events, and the functions that pass them on.

The pipeline never prints. A progress bar, a log or a test is an ``Observer``: a function that takes
one event. The driver of a run emits ``RunStarted``, ``StageStarted``, ``UnitSkipped``,
``StageFinished`` and ``RunFinished``; an executor emits the other unit events. All of them arrive
in the thread that called ``run``; an observer that raises ends the run. (``UnitStalled`` alone comes from another
thread where units are done in this process: the caller's is the one that does not move.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted(Event):
    """A run begins or resumes at ``uri``.

    Attributes:
        uri: The run directory.
        recipe: Name of the recipe.
        resumed: True when the directory already held committed work.
    """

    uri: str
    recipe: str
    resumed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted(Event):
    """A stage begins.

    Attributes:
        stage: Name of the stage, such as ``record``.
        units: How many units the stage has, those already done included.
        total: Steps, rows or pairs in the whole stage, None where unknown.
        unit_label: What one count of ``UnitProgress.done`` is: ``step``, ``row``, ``pair``.
    """

    stage: str
    units: int
    total: int | None = None
    unit_label: str = "step"


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitStarted(Event):
    """A worker begins a unit; ``attempt`` counts from 1."""

    stage: str
    unit: str
    attempt: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitProgress(Event):
    """A unit has done ``done`` of ``total`` steps or rows; restarts from 0 at another attempt."""

    stage: str
    unit: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitFinished(Event):
    """A unit is done and committed.

    Attributes:
        stage: Name of the stage.
        unit: Name of the unit.
        seconds: Wall-clock seconds of the attempt that succeeded.
        values: What the handler returned; JSON-able.
    """

    stage: str
    unit: str
    seconds: float
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitSkipped(Event):
    """A unit was committed by an earlier run and is not done again."""

    stage: str
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitRetried(Event):
    """The worker of a unit died; the unit is queued again.

    Attributes:
        stage: Name of the stage.
        unit: Name of the unit.
        attempt: Number of the attempt to come, from 2.
        reason: Why the last attempt was lost, one line.
    """

    stage: str
    unit: str
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitStalled(Event):
    """A unit has made no progress for ``seconds``; said once a minute while that lasts."""

    stage: str
    unit: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitStraggles(Event):
    """One of the last units of a stage takes much longer than the others did.

    Attributes:
        stage: Name of the stage.
        unit: Name of the unit.
        seconds: How long it takes so far.
        usual: Median of the seconds that the finished ones took.
    """

    stage: str
    unit: str
    seconds: float
    usual: float


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitBackedUp(Event):
    """A unit that straggles is begun a second time, on a worker that has nothing to do; the first to finish counts."""

    stage: str
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFinished(Event):
    """Every unit of a stage is done, after ``seconds`` of wall-clock time."""

    stage: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Note(Event):
    """One line worth knowing that is no error."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFinished(Event):
    """The run is complete; ``summary`` is what the command line shows at the end."""

    summary: Mapping[str, Any]


Observer = Callable[[Event], None]
"""Whoever listens to a run."""


def null(event: Event) -> None:
    """Listen to nothing."""


def listener(observer: Observer) -> Observer:
    """Return who listens in the end, behind those that pass on what they hear (to their ``inner``)."""
    while hasattr(observer, "inner"):
        observer = observer.inner
    return observer


def warn(observer: Observer, message: str) -> None:
    """Say something that nobody should miss: where no one listens it goes to the log."""
    observer(Note(message=message))
    if listener(observer) is null:
        logger.warning("%s", message)
