"""The door: one specification in, a run out, with one seed or several."""

from __future__ import annotations

from collections.abc import Sequence

from ..workers.determinism import restored_process
from .drive.drive import begin, drive
from .drive.seeds import run_seeds
from .executors.events import Note, Observer, RunFinished, null, warn
from .executors.ray import make_executor
from .opened_run import Run, open_run
from .plan.compatibility import place, refuse_unsupported
from .plan.survey import survey
from .spec.spec import RunSpec
from .vocabulary import STAGES

__all__ = ["STAGES", "run"]


def run(spec: RunSpec, *, observer: Observer | None = None, stages: Sequence[str] | None = None) -> Run:
    """Do, or go on with, the run that ``spec`` asks for.

    Args:
        spec: What to run and where.
        observer: Hears of everything that happens.
        stages: Only these stages of ``STAGES``; what they need must have been committed. Default: all.

    Returns:
        The run, opened for reading.

    Raises:
        SpecMismatch: The directory holds a run of another specification (and not ``overwrite``).
        IncompleteStage: A stage was asked for whose input is not there.
        HydraError: Whatever went wrong on the way; committed work is kept.
    """
    with restored_process():
        return _run(spec, observer or null, tuple(stages or STAGES))


def _run(spec: RunSpec, observer: Observer, stages: Sequence[str]) -> Run:
    refuse_unsupported(spec)
    surveyed = survey(spec)
    for note in surveyed.notes:
        warn(observer, note)
    for text in surveyed.warnings:
        observer(Note(message=f"warning: {text}"))
    executor = make_executor(spec)
    try:
        if spec.seeds > 1:
            run_seeds(spec, surveyed, executor, observer, stages)
        else:
            drive(begin(spec, surveyed, executor, observer), stages)
    finally:
        executor.close()
    finished = open_run(place(spec, surveyed))
    observer(RunFinished(summary=finished.summary()))
    return finished
