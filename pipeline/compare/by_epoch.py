"""Compare over training: the forms of the hypergradient held against the exact one epoch by epoch.

The paper's Figures 3, 4 and 5. Tracked samples are cut into shards, each a unit that replays every
form in lockstep and writes what it saw at the chosen epochs; influence functions are units of one
epoch. Committed work is kept: the same command goes on, and another question does what differs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...storage import layout
from ...storage.documents import dump, load
from ...storage.errors import DoesNotFit, IncompleteStage, SpecError, SpecMismatch
from ...storage.files import remove, write_bytes
from ...workers.determinism import restored_process
from ...workers.estimators import make
from ...workers.estimators.influence_after import INFLUENCE
from ...workers.recipe import Recipe
from ..drive.gradients import RECORDED
from ..drive.stages import Session, Stage, Stages, run_stages, units_of
from ..drive.writing import writing
from ..executors.base import Unit
from ..executors.events import Observer, null
from ..executors.ray import make_executor
from ..plan.compatibility import chosen, place, refuse_unsupported
from ..plan.provenance import check_recipe
from ..plan.sharding import USUAL_MEMORY, Shard, itemsize_of, spans
from ..plan.stored_spec import stored_spec
from ..plan.survey import Survey, compute_of, survey
from ..reading.kept_rows import refuse_parts
from ..reading.reader import Reader, open_reader
from ..reading.run_info import StageEntry
from ..reading.unit_values import ByEpochValues, all_values, values_of
from ..units.by_epoch import ByEpochWork, Epoch
from ..vocabulary import BY_EPOCH_SCORES, CURVATURE, EKFAC, EXACT, FAST, SUMMARY, by_epoch_stage
from .by_epoch_measures import FollowedForms, measure

METHODS = (FAST, EKFAC, *INFLUENCE)
"""What can be followed beside the exact form."""

MEMORY_SHARE = 0.8
"""Of a worker's memory, for a shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What is looked at over training, and when.

    Attributes:
        every: Epochs between two looks; the last epoch is always one.
        methods: Of ``METHODS``; None: ``hydra``, ``hydra-ekfac`` where the run has its curvature, and
            ``influence-lissa``.
        influence_from: First epoch at which influence functions are asked; None: half of training.
        options: Of the influence estimators, by name.
        by_test: Whether influence is asked for each test sample too, which costs as many solves.
        raw_decay: Whether to follow the forms with N times the weight decay in the recursion.

    Raises:
        SpecError: A value is out of its range.
    """

    every: int
    methods: Sequence[str] | None = None
    influence_from: int | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_test: bool = False
    raw_decay: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SpecError(f"every {self.every}: must be at least 1 epoch")
        if self.influence_from is not None and self.influence_from < 1:
            raise SpecError(f"influence_from {self.influence_from}: must be at least 1 epoch")
        for name in self.methods or ():
            if name not in METHODS:
                raise SpecError(
                    f"{name} cannot be followed over training; use some of {', '.join(METHODS)} "
                    f"({EXACT} is always there)"
                )
        for name, options in self.options.items():
            make(name, options)


def by_epoch(
    run: Reader | str,
    course: Course,
    recipe: Recipe | str | None = None,
    *,
    observer: Observer | None = None,
    **placement: Any,
) -> dict[str, Any]:
    """Follow the run's tracked samples through training; store the measures in the run and return them.

    Args:
        run: The run, or where it is; its record must be there.
        course: What to follow.
        recipe: What the run was made from. Needed unless that is a built-in recipe: code that a
            stored run names is never imported unasked.
        observer: Hears of everything that happens.
        placement: Fields of ``RunSpec`` that say where the work is done; the rest is the run's.

    Returns:
        What `by_epoch_measures.measure` returns.

    Raises:
        SpecError: Nothing to follow at these epochs.
        InputError: The recipe must be named.
        SpecMismatch: The recipe or its data are not the run's.
        IncompleteStage: There is no record, or EKFAC is asked for and the run has no curvature.
        DoesNotFit: A single sample is too large for a worker.
        EstimatorError: An influence function does not apply at some epoch; says what to change.
    """
    with restored_process():
        found = run if isinstance(run, Reader) else open_reader(run)
        waits = bool(placement.get("wait"))
        with writing(found.directory, observer or null, command="compare --every", wait=waits) as told:
            return _followed(open_reader(found.uri), course, recipe, told, placement)


def _followed(
    found: Reader,
    course: Course,
    recipe: Recipe | str | None,
    observer: Observer,
    placement: Mapping[str, object],
) -> dict[str, object]:
    refuse_parts(found, "compare --every")
    spec = stored_spec(found, recipe, placement, command="compare")
    refuse_unsupported(spec)
    surveyed = survey(spec, trial=False)
    place(spec, surveyed)
    _check_same(found, surveyed)
    check_recipe(found.uri, found.noted, surveyed.made_of, observer)
    executor = make_executor(spec)
    session = Session(
        spec=spec, surveyed=surveyed, directory=found.directory, executor=executor, observer=observer
    )
    try:
        session.require(RECORDED)
        asked = _asked(found, surveyed, course)
        session.directory.clear_litter()
        run_stages(session, _stages(session, asked))
        return _measured(found, asked)
    finally:
        executor.close()


def _check_same(run: Reader, surveyed: Survey) -> None:
    differing = run.noted.chosen.differences(chosen(surveyed))
    if differing:
        raise SpecMismatch(
            f"{run.uri} was made from other data ({'; '.join(differing)}); bring them back, or record anew"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A course, made out for one run.

    Attributes:
        forms: What is followed, and when.
        questions: By stage, what its units answer.
    """

    forms: FollowedForms
    questions: Mapping[str, Mapping[str, Any]]

    @property
    def replays(self) -> str:
        """The stage of the replays."""
        return by_epoch_stage(self.forms.stage)

    @property
    def late(self) -> list[int]:
        """Epochs after which influence functions are asked."""
        return [epoch for epoch in self.forms.epochs if epoch >= self.forms.influence_from]


def _asked(run: Reader, surveyed: Survey, course: Course) -> _Asked:
    """Make a course out for a run.

    Raises:
        IncompleteStage: EKFAC is to be followed and there is no curvature.
        SpecError: Options of what is not followed, or influence from after the last epoch on.
    """
    basis = run.directory.manifest(f"{EKFAC}/{CURVATURE}", CURVATURE)
    methods = tuple(dict.fromkeys(course.methods or _usual(basis is not None)))
    if EKFAC in methods and basis is None:
        raise IncompleteStage(
            f"{run.uri} has no curvature for {EKFAC}; add it: hydra-pipe run ... --hessian ekfac on the same "
            "--out, or leave it out of --methods"
        )
    noted = run.trajectory().optimizer
    if course.raw_decay and noted["family"] != "sgd":
        raise SpecError(
            f"raw decay is N times the weight decay of SGD, as the paper's first code had it, and the record is of "
            f"{noted['class']}; leave --decay-as-published out"
        )
    last = surveyed.recipe.epochs
    begin = course.influence_from if course.influence_from is not None else max(1, last // 2)
    influence = {
        name: dict(make(name, course.options.get(name, {})).options())
        for name in methods
        if name in INFLUENCE
    }
    for name in course.options:
        if name not in influence:
            raise SpecError(f"options of {name}, which is not among the methods; add it with --methods")
    if influence and begin > last:
        raise SpecError(f"influence_from {begin}: training has {last} epochs; use at most that")
    forms = FollowedForms(
        stage=_name_of(course, methods),
        methods=methods,
        raw_decay=course.raw_decay,
        epochs=(*range(course.every, last, course.every), last),
        influence_from=begin,
        influence=influence,
        by_test=course.by_test,
    )
    record = {"record": run.trajectory().epoch_digest[-1][:16]}
    questions: dict[str, dict[str, Any]] = {
        by_epoch_stage(forms.stage): {
            **record,
            "every": course.every,
            "curvature": basis.files[0].sha256[:16] if basis and EKFAC in methods else None,
        }
    }
    for name, options in influence.items():
        questions[by_epoch_stage(name)] = {**record, "options": options, "by_test": course.by_test}
    return _Asked(forms=forms, questions=questions)


def _usual(curvature: bool) -> list[str]:
    return [FAST, *([EKFAC] if curvature else []), INFLUENCE[0]]


def _name_of(course: Course, methods: Collection[str]) -> str:
    """Name the replays; what is carried is in the name, so that answers lie side by side."""
    words = [f"every-{course.every}"]
    words += ["ekfac"] if EKFAC in methods else []
    words += ["raw-decay"] if course.raw_decay else []
    return "-".join(words)


def _stages(session: Session, asked: _Asked) -> Stages:
    forms, surveyed = asked.forms, session.surveyed
    shards = _shards(session, asked)
    replays = 2 + (EKFAC in forms.methods) + forms.raw_decay  # of each shard, side by side
    steps = surveyed.steps * len(shards) * replays
    yield _stage(session, asked, asked.replays, units_of(asked.replays, shards), steps, "step")
    for name in forms.influence:
        stage = by_epoch_stage(name)
        units = [
            Unit(stage=stage, name=f"epoch-{epoch:05d}", arguments=Epoch(number=epoch))
            for epoch in asked.late
        ]
        yield _stage(session, asked, stage, units, 0, "")


def _stage(
    session: Session, asked: _Asked, name: str, units: Sequence[Unit], total: int, label: str
) -> Stage:
    """Return a stage, after forgetting what answered another question."""
    forms, surveyed, directory = asked.forms, session.surveyed, session.directory
    question = asked.questions[name]
    for manifest in directory.manifests(name):
        if values_of(ByEpochValues, manifest).question != question:
            session.note(f"{name} {manifest.unit} is done again: it was made with other options")
            directory.drop(name, manifest.unit)
            for entry in manifest.files:  # the new answer may have fewer
                remove(directory.path(entry.path))
    wanted = {unit.name for unit in units}
    return Stage(
        name=name,
        units=units,
        handler=lambda: ByEpochWork(
            uri=directory.uri,
            recipe=surveyed.recipe,
            compute=compute_of(session.spec),
            tracked=surveyed.tracked,
            tested=surveyed.tested,
            epochs=list(forms.epochs),
            ekfac=EKFAC in forms.methods,
            raw_decay=forms.raw_decay,
            influence=forms.influence,
            by_test=forms.by_test,
            question=question,
        ),
        total=total,
        label=label,
        kept=sum(unit not in wanted for unit in directory.units(name)),
    )


def _shards(session: Session, asked: _Asked) -> tuple[Shard, ...]:
    """Cut the tracked samples by memory and workers; a comparison that goes on keeps its cut."""
    spec, total = session.spec, len(session.surveyed.tracked)
    rows = session.info().stages.get(asked.replays, StageEntry()).rows
    if rows is None or not session.directory.units(asked.replays):
        capacity = session.executor.capacity(start=False)
        budget = spec.memory or capacity.memory_per_worker or USUAL_MEMORY
        fitting = samples_that_fit(session.surveyed, itemsize_of(spec.dtype), asked.forms, budget)
        rows = min(fitting, math.ceil(total / (capacity.slots or 1)))
    session.update(lambda info: info.with_stage(asked.replays, rows=rows))
    return spans(total, rows, "shard")


def samples_that_fit(surveyed: Survey, itemsize: int, forms: FollowedForms, budget: int) -> int:
    """Return how many samples a worker of ``budget`` bytes can follow.

    Raises:
        DoesNotFit: Not one.
    """
    # Two buffers a form; EKFAC rows are rotated into a third. Every replay has its own model.
    vectors = 4 + 3 * (EKFAC in forms.methods) + 4 * forms.raw_decay
    each = vectors * surveyed.dimension * itemsize
    room = MEMORY_SHARE * budget - surveyed.process_bytes
    if room < each:
        raise DoesNotFit(
            f"following one tracked sample needs {int((each + surveyed.process_bytes) / MEMORY_SHARE):,} "
            f"bytes in a worker of {budget:,} bytes; use workers with more memory (--memory, fewer --workers)"
        )
    return int(room // each)


def _measured(run: Reader, asked: _Asked) -> dict[str, Any]:
    """Measure what was followed, and commit that."""
    directory = run.directory
    reading = directory.ledger.remember()
    seconds = {
        stage: sum(unit.seconds or 0.0 for unit in all_values(ByEpochValues, directory, stage))
        for stage in (asked.replays, *map(by_epoch_stage, asked.forms.influence))
    }
    found = measure(run, asked.forms, seconds=seconds)
    directory.drop(BY_EPOCH_SCORES)
    write_bytes(directory.path(layout.BY_EPOCH_SUMMARY), dump(found))
    directory.commit(BY_EPOCH_SCORES, SUMMARY, [layout.BY_EPOCH_SUMMARY], {}, reading)
    return found


def read_by_epoch(run: Reader) -> dict[str, Any]:
    """Return what the last comparison over training of a run found.

    Raises:
        IncompleteStage: There was none.
    """
    if run.directory.manifest(BY_EPOCH_SCORES, SUMMARY) is None:
        raise IncompleteStage(
            f"{run.uri} was not compared over training yet; run `hydra-pipe compare {run.uri} --every 1`"
        )
    address = run.directory.path(layout.BY_EPOCH_SUMMARY)
    return load(run.directory.vouched(address), address)
