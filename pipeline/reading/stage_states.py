"""How far the stages of a run have come, read from ``run.json`` and the manifests alone.

Older or partial runs are read as far as they go: see `StageEntry` (``units``, ``seconds``), `LayoutEntry`
(``shards``) and `UnitValues` (``rows``, ``seconds``) for what is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...storage.errors import IncompleteStage
from ...storage.rundir import Manifest, RunDirectory
from ..vocabulary import (
    ADJOINT,
    ATTRIBUTE,
    BY_EPOCH,
    CLEAN_RETRAIN,
    CLOSING_UNITS,
    COMPLETE,
    CORRECTION,
    CURVATURE,
    DECIDING,
    DIRECTIONS,
    INDEX,
    INTERCLASS,
    MISSING,
    PARTIAL,
    PREFLIGHT,
    PREPARE,
    RECORD,
    REDUCE,
    REPLAY,
    RETRAIN,
    SAMPLES,
    SEEDS,
    SEGMENTS,
    SINGLE,
    TARGET_GRADIENTS,
    TEST_GRADIENTS,
    WAYS,
    State,
)
from .run_info import RunInfo, StageEntry
from .unit_values import UnitValues, values_of

Number = TypeVar("Number", int, float)

_FREE = (RETRAIN, CLEAN_RETRAIN)
"""Stages of retrainings: no unit closes them."""


def _is_free(stage: str) -> bool:
    return (
        stage in (*_FREE, *DECIDING)
        or stage.startswith(f"{BY_EPOCH}/")
        or stage.endswith((f"/{SEGMENTS}", f"/{WAYS}"))
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageState:
    """One stage of a run.

    Attributes:
        stage: Such as ``record`` or ``<method>/replay``.
        state: ``complete``, ``partial`` or ``missing``.
        done: Units committed: shards, blocks of test samples, blocks of tracked samples.
        units: Units the stage has in all; None where the run does not say.
        rows: Rows committed: test samples for ``test-gradients``, targets where those are made and
            in adjoint mode, else tracked samples; None where unknown.
        bytes: Bytes of the committed files.
        seconds: Wall time of the stage, or where that is unknown the sum over its units.
    """

    stage: str
    state: State
    done: int
    units: int | None
    rows: int | None
    bytes: int
    seconds: float | None


def stage_state(directory: RunDirectory, info: RunInfo, stage: str) -> StageState:
    """Return the state of ``stage`` from its manifests.

    Args:
        directory: The run.
        info: Its ``run.json``, read.
        stage: Such as ``record`` or ``<method>/replay``.
    """
    manifests = directory.manifests(stage)
    noted = info.stages.get(stage, StageEntry())
    work = [m for m in manifests if m.unit not in CLOSING_UNITS]
    units = len(work) or None if stage in DECIDING else _units(info, stage, noted.units)
    values = [values_of(UnitValues, manifest) for manifest in work]
    rows = _sum([one.rows for one in values])
    single = stage == RECORD or stage.endswith(SINGLE)
    free = _is_free(stage)
    needed = None if single or free else INTERCLASS if stage.endswith(f"/{REDUCE}") else INDEX
    closed = needed is None or any(m.unit == needed for m in manifests)
    expected = _expected_rows(info, stage)
    whole = rows == expected if expected is not None else units is not None and len(work) >= units
    complete = closed and (whole or (needed == INTERCLASS and expected is None))
    if units is None and complete:
        units = len(work)
    seconds = noted.seconds
    if stage.endswith(
        f"/{REPLAY}"
    ):  # the segments that it added up are gone from the list, and not their time
        cut = stage.removesuffix(REPLAY) + SEGMENTS
        gone = None if directory.units(cut) else info.stages.get(cut, StageEntry()).seconds
        seconds = _sum([seconds, gone])
    return StageState(
        stage=stage,
        state=COMPLETE if complete else PARTIAL if manifests else MISSING,
        done=len(work),
        units=units,
        rows=rows,
        bytes=sum(entry.bytes for manifest in manifests for entry in manifest.files),
        seconds=_sum([one.seconds for one in values]) if seconds is None else seconds,
    )


def stage_states(directory: RunDirectory, info: RunInfo) -> list[StageState]:
    """Return the state of every stage that the run has or is asked to have, in running order."""
    names = [RECORD, TEST_GRADIENTS]
    known = directory.stages()
    names += [stage for stage in TARGET_GRADIENTS if stage in known or stage in info.stages]
    for method in info.method_names():
        # Estimators that need no replay commit none: list what their run or run.json mentions.
        replay, reduce = f"{method}/{REPLAY}", f"{method}/{REDUCE}"
        adjoint = f"{method}/{ADJOINT}"
        before = (CURVATURE, PREFLIGHT, WAYS, SEGMENTS)
        names += [f"{method}/{part}" for part in before if f"{method}/{part}" in known]
        mode = info.entry(method).mode
        if mode == SEEDS:
            pass
        elif mode == ATTRIBUTE:
            names += [f"{method}/{PREPARE}"] if f"{method}/{PREPARE}" in known else []
            names.append(f"{method}/{ATTRIBUTE}")
        elif adjoint in known or adjoint in info.stages:
            names.append(adjoint)
        elif f"{method}/{CORRECTION}" in known or f"{method}/{DIRECTIONS}" in info.stages:
            names += [f"{method}/{DIRECTIONS}", f"{method}/{CORRECTION}"]
        elif info.kind_of(method) != SAMPLES:
            names.append(adjoint)
        elif replay in known or replay in info.stages or reduce not in known:
            names.append(replay)
        names.append(reduce)
    names += [stage for stage in known if stage not in names]
    return [stage_state(directory, info, stage) for stage in names]


def _units(info: RunInfo, stage: str, noted: int | None) -> int | None:
    """Return how many units of work a stage has; the one that closes it is not counted."""
    if stage == RECORD or stage.endswith(SINGLE):
        return 1
    if noted is not None:
        return int(noted) - 1
    if stage.endswith((f"/{REPLAY}", f"/{ADJOINT}")):
        return info.layout.shards
    return None


def _expected_rows(info: RunInfo, stage: str) -> int | None:
    """Return the rows that a stage's units sum to; reduce units count tracked samples, too."""
    if stage in (RECORD, *TARGET_GRADIENTS) or stage.endswith((*SINGLE, f"/{CORRECTION}")) or _is_free(stage):
        return None
    if stage.endswith((f"/{ADJOINT}", f"/{ATTRIBUTE}")):
        return info.target_count(stage.rsplit("/", 1)[0])
    return info.n_test_tracked if stage == TEST_GRADIENTS else info.n_tracked


def _sum(values: Sequence[Number | None]) -> Number | None:
    """Return the sum of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known[1:], start=known[0]) if known else None


def refuse_outdated(directory: RunDirectory, units: Sequence[Manifest]) -> None:
    """Refuse units that were made from another version of what the run holds.

    Raises:
        IncompleteStage: Names the unit and what it was made from.
    """
    why = directory.ledger.outdated(units)
    if why:
        raise IncompleteStage(
            f"{directory.uri}: {why}; `hydra-pipe status {directory.uri}` shows the command that does it again"
        )
