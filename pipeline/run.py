"""The door: one specification in, a run out, with one seed or several, or of a model trained elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..storage.errors import SpecError
from ..storage.rundir import RunDirectory
from ..workers.determinism import restored_process
from ..workers.estimators import make
from ..workers.recipe import Recipe
from .drive.attribute import attribute
from .drive.drive import begin, drive
from .drive.seeds import run_seeds
from .drive.writing import writing
from .executors.events import Note, Observer, RunFinished, null, warn
from .executors.ray import make_executor
from .opened_run import Run, open_run
from .plan.compatibility import place, refuse_unsupported
from .plan.moment import check_moment
from .plan.stored_spec import PLACEMENT, stored_spec
from .plan.survey import resolve_recipe, survey
from .plan.untrained import check_methods, needs_training
from .spec.spec import RunSpec
from .vocabulary import RECORD, REDUCE, REPLAY, STAGES, TEST_GRADIENTS

__all__ = ["STAGES", "attribute_at", "attribute_checkpoint", "run"]


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
    asked = tuple(stages or STAGES)
    if spec.at_checkpoint and {REPLAY, REDUCE} & set(asked):
        raise needs_training(spec.method)
    with restored_process():
        return _run(spec, observer or null, asked)


def attribute_checkpoint(
    spec: RunSpec, methods: Mapping[str, Mapping[str, object]], *, observer: Observer | None = None
) -> Run:
    """Attribute a model that is trained already, from its weights alone, or go on doing so.

    The run has no steps: its record is one checkpoint, the weights in ``spec.at_checkpoint``. Estimators that
    look at the trained model alone work as ever, and so does everything that reads a run.

    Args:
        spec: Recipe, file, where to and with what.
        methods: Options by estimator name; those that follow the training are refused.
        observer: Hears of everything that happens.

    Returns:
        The run, opened for reading.

    Raises:
        SpecError: No file or no method is given, or a method follows the training.
        SpecMismatch: The directory holds another run.
    """
    if spec.at_checkpoint is None or not methods:
        missing = "methods" if spec.at_checkpoint else "at_checkpoint"
        raise SpecError(
            f"{missing} is missing: give the file of the trained weights and at least one estimator"
        )
    check_methods(methods)
    for name, options in methods.items():
        make(name, options)
    made = run(spec, observer=observer, stages=(RECORD, TEST_GRADIENTS))
    placement = {name: getattr(spec, name) for name in PLACEMENT}
    return attribute(made.uri, methods, spec.recipe, observer=observer, overwrite=spec.overwrite, **placement)


def attribute_at(
    uri: str,
    step: int,
    methods: Mapping[str, Mapping[str, object]],
    recipe: Recipe | str | None = None,
    *,
    observer: Observer | None = None,
    overwrite: bool = False,
    **placement: Any,
) -> Run:
    """Add estimators' contributions as of a recorded step, to the run ``URI-at-STEP`` beside the run, which is made.

    Args:
        uri: The recorded run.
        step: One of its checkpoints.
        methods: Options by estimator name.
        recipe: See ``attribute``; so the others.
        observer: So.
        overwrite: So.
        placement: So.

    Raises:
        SpecError: There is no such checkpoint; names the nearest.
    """
    for name, options in methods.items():
        make(name, options)
    stored = stored_spec(open_run(uri), recipe, placement, command="attribute")
    made = run(replace(stored, at=step), observer=observer, stages=(RECORD, TEST_GRADIENTS))
    return attribute(made.uri, methods, stored.recipe, observer=observer, overwrite=overwrite, **placement)


def _run(spec: RunSpec, observer: Observer, stages: Sequence[str]) -> Run:
    refuse_unsupported(spec)
    if spec.at is not None:  # a step that is not there is no training to look at
        check_moment(spec, spec.out or f"runs/{resolve_recipe(spec).name}")
    surveyed = survey(spec)
    for note in surveyed.notes:
        warn(observer, note)
    for text in surveyed.warnings:
        observer(Note(message=f"warning: {text}"))
    executor, directory = make_executor(spec), RunDirectory(place(spec, surveyed))
    with writing(directory, observer, command=_command(stages), wait=spec.wait) as told:
        try:
            if spec.seeds > 1:
                run_seeds(spec, surveyed, executor, told, stages)
            else:
                drive(begin(spec, surveyed, executor, told), stages)
        finally:
            executor.close()
        finished = open_run(directory.uri)
        told(RunFinished(summary=finished.summary()))
    return finished


def _command(stages: Sequence[str]) -> str:
    """Return what others are told is being done."""
    if set(stages) == set(STAGES):
        return "run"
    return stages[-1] if stages[-1] in (RECORD, REPLAY, REDUCE) else "attribute"
