"""The driver of one run: record, test gradients, replay, reduce; resume; refuse what cannot work.

A run flows one way and every unit commits its own results, so driving is: find which units have no
valid manifest, have the executor do those, and note the state in ``run.json``. Running the same
specification again therefore resumes, whatever killed the last attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ...storage import layout
from ...storage.errors import SpecError, SpecMismatch
from ...storage.files import used_bytes
from ...storage.rundir import RunDirectory
from ...storage.space import free_bytes, require_free
from ...workers.training.recorded import is_recorded
from ..executors.base import Executor
from ..executors.events import Observer, RunStarted
from ..plan.compatibility import place, stored_run
from ..plan.moment import check_moment
from ..plan.plan import Plan, cut
from ..plan.provenance import adopted, say_cosmetic
from ..plan.survey import Survey, compute_of
from ..reading.run_info import MethodEntry, RunInfo, update_info
from ..spec.spec import RunSpec
from ..units.reduce import ReduceWork
from ..vocabulary import (
    ADJOINT,
    ASKED,
    COMPLETE,
    INDEX,
    INTERCLASS,
    PARTIAL,
    RECORD,
    REDUCE,
    REPLAY,
    SAMPLES,
    STAGES,
    TEST_GRADIENTS,
    stage_of,
)
from .gradients import RECORDED, TESTED, record, test_gradients
from .notes import closing_notes, run_notes
from .reduce import reduce_job, reduce_method
from .replay import collect_stage, replay
from .stages import Needed, Session, Stages, run_stages


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A run that may start: all that speaks against it was looked for.

    Attributes:
        session: What it is driven with.
        plan: How it is cut.
    """

    session: Session
    plan: Plan

    def note(self, stages: Sequence[str]) -> None:
        """Note in ``run.json``, as it is now, what is begun."""
        directory, surveyed = self.session.directory, self.session.surveyed
        there = directory.exists()

        def begun(noted: RunInfo) -> RunInfo:
            stored = adopted(directory, noted, surveyed.made_of) if there else None
            info = run_notes(self.session.spec, surveyed, self.plan, stored)
            if {REPLAY, REDUCE} & set(stages):
                for name, entry in info.methods.items():
                    if entry.state == ASKED:
                        info = info.with_method(name, state=PARTIAL)
            return info

        update_info(directory, begun)


def begin(spec: RunSpec, surveyed: Survey, executor: Executor, observer: Observer) -> Begun:
    """Find what speaks against starting, or going on with, a run.

    Raises:
        SpecMismatch: The directory holds a run of another specification (and not ``overwrite``).
        DoesNotFit: See ``make_plan``.
    """
    directory = RunDirectory(place(spec, surveyed))
    if spec.at is not None:
        check_moment(spec, directory.uri, surveyed.made_of)
    session = Session(spec=spec, surveyed=surveyed, directory=directory, executor=executor, observer=observer)
    stored = stored_run(directory, spec, surveyed)
    replaced = stored is None and directory.exists()
    if replaced and not spec.overwrite:  # a program without the lock was quicker
        raise SpecMismatch(
            f"{directory.uri}: a run appeared there while this one was prepared; run the same command again"
        )
    if replaced and is_recorded(surveyed.recipe):
        raise SpecMismatch(
            f"{directory.uri} holds what a loop of its own recorded, which no command can make again; use another --out, or "
            "leave out what differs"
        )
    # A resumed run keeps the cut it began with, whatever `auto` would choose today.
    before = stored.entry(spec.base_method) if stored else MethodEntry()
    # One that is begun and says nothing of segments has one.
    segments = before.segments or (1 if before.shards else None)
    plan = cut(
        replace(spec, seeds=1),
        surveyed,
        executor.capacity(start=False),
        shards=before.shards,
        segments=segments,
        reduce_memory=stored.reduce_memory if stored else None,
    )
    if replaced:  # only now: what cannot be done must not cost the run that is there
        directory.delete_results()
        session.note(f"replaced the run at {directory.uri}")
    observer(RunStarted(uri=directory.uri, recipe=surveyed.recipe.name, resumed=stored is not None))
    say_cosmetic(stored or RunInfo(), surveyed.made_of, observer)
    return Begun(session=session, plan=plan)


def drive(begun: Begun, stages: Sequence[str]) -> None:
    """Do the given stages of ``STAGES``, in their order.

    Raises:
        SpecError: One is none of them.
        IncompleteStage: A stage was asked for whose input is not there.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise SpecError(f"stage {unknown[0]!r} is not one of {', '.join(STAGES)}")
    session, plan = begun.session, begun.plan
    session.directory.clear_litter()
    check_space(session, plan, stages)
    begun.note(stages)
    makers: dict[str, Callable[[Session, Plan], Stages]] = {
        RECORD: record,
        TEST_GRADIENTS: test_gradients,
        REPLAY: replay,
        REDUCE: reduce,
    }
    for stage in STAGES:
        if stage in stages:
            run_stages(session, makers[stage](session, plan))
    _close(session, plan)


def check_space(session: Session, plan: Plan, stages: Sequence[str]) -> None:
    """Hold what the plan says that stages write against what is free, less what they have written already.

    Raises:
        StorageFull: There is less.
    """
    spec, disk = session.spec, plan.disk
    stored = layout.by_test if spec.mode == ADJOINT else layout.hypergradients
    kind = layout.BY_TEST if spec.mode == ADJOINT else layout.HYPERGRADIENTS
    parts = {
        RECORD: (disk["trajectory"] + disk["visits"], layout.TRAJECTORY),
        TEST_GRADIENTS: (disk["test_gradients"], layout.TEST_GRADIENTS),
        REPLAY: (disk[kind] + plan.segments.bytes, stored(spec.base_method)),
        REDUCE: (disk["contributions"], layout.table("contributions", spec.method)),
    }
    free = free_bytes(session.directory.uri)
    chosen = [parts[stage] for stage in stages]
    if free is None or free >= sum(planned for planned, _ in chosen):
        return
    left = sum(max(0, planned - used_bytes(session.directory.path(at))) for planned, at in chosen)
    require_free(session.directory.uri, left, " and ".join(stages))


def reduce(session: Session, plan: Plan) -> Stages:
    """Write the tables of the method, and of the one that it corrects."""
    spec = session.spec
    collected = [
        Needed(stage=collect_stage(spec), unit=unit.name, command="replay") for unit in plan.collected
    ]
    if spec.targets != SAMPLES:
        collected.insert(0, Needed(stage=stage_of(spec.targets), unit=INDEX, command="replay"))
    session.require(RECORDED, TESTED, *collected)
    for method in dict.fromkeys((spec.base_method, spec.method)):
        yield from reduce_method(session, plan.reduce, method, partial(_reduce_work, session, plan, method))


def _reduce_work(session: Session, plan: Plan, method: str) -> ReduceWork:
    spec = session.spec
    job = reduce_job(
        session,
        plan.reduce,
        method=method,
        base=spec.base_method,
        targets=spec.targets,
        mode=spec.mode,
        shards=() if spec.mode == ADJOINT else plan.shards,
    )
    return ReduceWork(uri=session.directory.uri, compute=compute_of(spec), job=job)


def _close(session: Session, plan: Plan) -> None:
    """Note states and how close the plan was."""
    spec, directory = session.spec, session.directory
    done = [
        method
        for method in dict.fromkeys((spec.base_method, spec.method))
        if directory.manifest(f"{method}/{REDUCE}", INTERCLASS) is not None
    ]
    closing = closing_notes(directory, plan)  # reads all manifests: before the change, which must be short

    def note(info: RunInfo) -> RunInfo:
        for method in done:
            info = info.with_method(method, state=COMPLETE)
        return closing(info)

    session.update(note)
