"""Attribute: contributions by other estimators, added to a run that holds a record.

Stages ``<method>/prepare`` (where the estimator needs it), ``<method>/attribute`` (units are blocks
of test samples) and ``<method>/reduce``, with the driver's mechanics: idempotent, resumable, on any
executor. The tables lie beside HyDRA's under ``method=NAME``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...storage import layout
from ...storage.errors import SpecError, SpecMismatch
from ...workers.determinism import restored_process
from ...workers.estimators import ESTIMATORS, make
from ...workers.estimators.base import TARGETS, Estimator
from ...workers.recipe import Recipe
from ..executors.events import Observer, RunFinished, RunStarted, null
from ..executors.ray import make_executor
from ..opened_run import Run, open_run
from ..plan.compatibility import place, refuse_unsupported, stored_run
from ..plan.plan import cut_reduce
from ..plan.provenance import check_recipe
from ..plan.sharding import EXACT_TARGETS, USUAL_MEMORY, Cut, cut_targets, itemsize_of, spans
from ..plan.stored_spec import stored_spec
from ..plan.survey import compute_of, survey
from ..plan.untrained import check_methods
from ..reading.kept_rows import refuse_parts
from ..reading.run_info import RunInfo
from ..spec.spec import averaged
from ..units.estimate import EstimateWork, PrepareWork
from ..units.reduce import ReduceWork
from ..vocabulary import (
    ADJOINT,
    ATTRIBUTE,
    COMPLETE,
    INDEX,
    PARTIAL,
    PREPARE,
    RECORD,
    REDUCE,
    SAMPLES,
    TEST_GRADIENTS,
)
from .gradients import RECORDED, TESTED
from .reduce import reduce_job, reduce_method
from .seeds import announce, average, check_data, drive_members, held, naming
from .stages import Session, Stage, Stages, run_stages, units_of
from .stores import StoreOf
from .writing import writing

MOST_TARGETS = 256
"""Test samples of a block, at most: each runs all tracked samples. Also what a killed worker loses."""

VECTOR_SHARE = 0.25
"""Of a worker's memory, for the vectors that an estimator holds."""

PREPARE_ROWS = 512
"""Tracked samples prepared in a unit, at most."""

assert EXACT_TARGETS % TARGETS == 0, "blocks must be whole tiles of test samples"


def attribute(
    uri: str,
    methods: Mapping[str, Mapping[str, Any]],
    recipe: Recipe | str | None = None,
    *,
    observer: Observer | None = None,
    overwrite: bool = False,
    seeds: int = 1,
    **placement: Any,
) -> Run:
    """Add estimators' contributions to a run, or go on doing so.

    Args:
        uri: The run directory; its record and test gradients must be there.
        methods: Options by estimator name, see ``workers.estimators``.
        recipe: What the run was made from. Needed unless that is a built-in recipe: code that a
            stored run names is never imported unasked.
        observer: Hears of everything that happens.
        overwrite: Do a method again whose options differ from what the run holds.
        seeds: Do so for as many seeds and average: the ensemble ``NAME-seedsK``. Records that are
            missing are made.
        placement: Fields of ``RunSpec`` named in ``plan.stored_spec.PLACEMENT``; the rest is the run's.

    Returns:
        The run, opened for reading.

    Raises:
        SpecError: Unknown estimator or option, or a value outside its limits.
        InputError: The recipe must be named.
        SpecMismatch: The recipe is not the run's, or the run holds the method with other options.
        IncompleteStage: The record or the test gradients are not there.
        HydraError: What an estimator raised; committed work is kept.
    """
    if not methods:
        raise SpecError(f"no estimator is named; use one of {', '.join(ESTIMATORS)}")
    chosen = {name: make(name, options) for name, options in methods.items()}
    with restored_process():
        return _attribute(uri, chosen, recipe, observer or null, overwrite, seeds, placement)


def _attribute(
    uri: str,
    chosen: Mapping[str, Estimator],
    recipe: Recipe | str | None,
    observer: Observer,
    overwrite: bool,
    seeds: int,
    placement: Mapping[str, Any],
) -> Run:
    found = open_run(uri)
    with writing(found.directory, observer, command=ATTRIBUTE, wait=bool(placement.get("wait"))) as told:
        # Opened once more: another command may have had the run until now.
        return _attribute_held(open_run(uri), chosen, recipe, told, overwrite, seeds, placement)


def _attribute_held(
    found: Run,
    chosen: Mapping[str, Estimator],
    recipe: Recipe | str | None,
    observer: Observer,
    overwrite: bool,
    seeds: int,
    placement: Mapping[str, object],
) -> Run:
    refuse_parts(found, "attribute")
    spec = replace(stored_spec(found, recipe, placement, command="attribute"), seeds=seeds)
    # The mode of HyDRA's own fast method, so that going on beside it is no other specification.
    mode = found.noted.entry(spec.base_method).mode
    spec = replace(spec, mode=ADJOINT if mode == ADJOINT else spec.mode)
    refuse_unsupported(spec)
    if spec.at_checkpoint:
        check_methods(chosen)
    surveyed = survey(spec, trial=False)
    place(spec, surveyed)
    check_recipe(found.uri, found.noted, surveyed.made_of, observer)
    stored = stored_run(found.directory, spec, surveyed)
    assert stored is not None  # the run is there, and what differs has been refused
    data = check_data(spec, surveyed, found.directory) if seeds > 1 else {}
    executor = make_executor(spec)
    session = Session(
        spec=spec, surveyed=surveyed, directory=found.directory, executor=executor, observer=observer
    )
    try:
        observer(RunStarted(uri=found.uri, recipe=surveyed.recipe.name, resumed=True))
        _add(session, chosen, overwrite)
        if seeds > 1:
            for name in chosen:
                announce(session, name)
            for member in drive_members(session, data, (RECORD, TEST_GRADIENTS)):
                with naming(member.surveyed.recipe.seed), held(member) as told:
                    _add(replace(member, observer=told), chosen, overwrite)
            for name in chosen:
                average(session, name)
    finally:
        executor.close()
    finished = open_run(found.uri)
    last = list(chosen)[-1]
    observer(RunFinished(summary=finished.summary(averaged(last, seeds) if seeds > 1 else last)))
    return finished


def _add(session: Session, chosen: Mapping[str, Estimator], overwrite: bool) -> None:
    """Do the estimators' stages in one run."""
    for estimator in chosen.values():
        _check_options(session, estimator, overwrite)
    for estimator in chosen.values():
        run_stages(session, _estimate(session, estimator))


def _stored_options(info: RunInfo, estimator: Estimator) -> dict[str, object] | None:
    """Return the options that a run has a method with; what it says nothing of was not there yet, and is the default."""
    stored = info.entry(estimator.NAME).options
    return None if stored is None else {**type(estimator)().options(), **stored}


def _check_options(session: Session, estimator: Estimator, overwrite: bool) -> None:
    """Refuse options that differ from what is there; with ``overwrite`` forget what is there."""
    directory, name = session.directory, estimator.NAME
    before = _stored_options(session.info(), estimator)
    asked = estimator.options()
    if before is None or before == asked:
        return
    stages = [f"{name}/{part}" for part in (REDUCE, ATTRIBUTE, PREPARE)]
    if any(unit != INDEX for stage in stages for unit in directory.units(stage)):
        if not overwrite:
            differing = [
                f"{key}: stored {before.get(key)!r}, asked {asked.get(key)!r}"
                for key in dict.fromkeys([*asked, *before])
                if before.get(key) != asked.get(key)
            ]
            raise SpecMismatch(
                f"{directory.uri} holds method {name} made with other options ({'; '.join(differing)}); "
                "use the stored ones, or --overwrite to do the method again"
            )
        session.note(f"method {name} is done again with other options")
    for stage in stages:
        directory.drop(stage)


def _cut(session: Session, estimator: Estimator) -> Cut:
    """Cut the test samples into blocks by memory and workers; a resumed method keeps its cut."""
    spec, tested = session.spec, len(session.surveyed.tested)
    count = session.info().entry(estimator.NAME).shards
    if count is None:
        capacity = session.executor.capacity(start=False)
        memory = spec.memory or capacity.memory_per_worker or USUAL_MEMORY
        held = estimator.VECTORS * session.surveyed.dimension * 8
        each = min(MOST_TARGETS, int(VECTOR_SHARE * memory) // held // TARGETS * TARGETS)
        each = max(TARGETS, each)
        count = max(math.ceil(tested / each), min(capacity.slots or 1, math.ceil(tested / TARGETS)))
    return cut_targets(tested, EXACT_TARGETS, count)


def _estimate(session: Session, estimator: Estimator) -> Stages:
    """Prepare, attribute, reduce."""
    surveyed, directory, method = session.surveyed, session.directory, estimator.NAME
    session.require(RECORDED, TESTED)
    directory.clear_litter()
    blocks, options = _cut(session, estimator), estimator.options()

    def note(info: RunInfo) -> RunInfo:
        before = info.entry(method)
        # Done again: also its state.
        state = before.state if _stored_options(info, estimator) == options else PARTIAL
        return info.with_method(
            method, state=state, mode=ATTRIBUTE, options=options, shards=len(blocks.shards)
        )

    session.update(note)
    if estimator.PREPARES:
        yield _prepare(session, estimator)
    stage = f"{method}/{ATTRIBUTE}"
    compute = compute_of(session.spec)
    yield Stage(
        name=stage,
        units=units_of(stage, blocks.shards, len(surveyed.tracked) * itemsize_of(session.spec.dtype)),
        handler=lambda: EstimateWork(
            uri=directory.uri,
            recipe=surveyed.recipe,
            compute=replace(compute, batch_norm=estimator.BATCH_NORM) if estimator.BATCH_NORM else compute,
            method=method,
            estimator=estimator,
            tracked=surveyed.tracked,
            tested=surveyed.tested,
        ),
        total=len(surveyed.tested),
        label="row",
        store=StoreOf(
            base=layout.by_test(method),
            name="contribution",
            rows=len(surveyed.tested),
            columns=len(surveyed.tracked),
            dtype=session.spec.dtype,
            chunk_rows=blocks.chunk_rows,
            dimensions=("test_index", "tracked"),
            row_columns={"test_index": surveyed.tested.astype("int32")},
            attrs={"n_train": surveyed.n_train, "method": method},
        ),
    )
    row = surveyed.columns * itemsize_of(session.spec.dtype)
    cut = cut_reduce(len(surveyed.tracked), len(surveyed.tested), row, session.reduce_memory())
    yield from reduce_method(
        session,
        cut,
        method,
        lambda: ReduceWork(
            uri=directory.uri,
            compute=compute,
            job=reduce_job(session, cut, method=method, base=method, targets=SAMPLES, mode=ADJOINT),
        ),
    )
    session.update(lambda info: info.with_method(method, state=COMPLETE))


def _prepare(session: Session, estimator: Estimator) -> Stage:
    """Return the stage that prepares the tracked samples, once for all test samples."""
    surveyed, directory, method = session.surveyed, session.directory, estimator.NAME
    stage, tracked = f"{method}/{PREPARE}", len(surveyed.tracked)
    slots = session.executor.capacity(start=False).slots or 1
    rows = min(PREPARE_ROWS, math.ceil(tracked / slots / TARGETS) * TARGETS)
    before = session.info().entry(method).prepare_rows
    rows = rows if before is None else before
    session.update(lambda info: info.with_method(method, prepare_rows=rows))
    return Stage(
        name=stage,
        units=units_of(stage, spans(tracked, rows, "rows")),
        handler=lambda: PrepareWork(
            uri=directory.uri,
            recipe=surveyed.recipe,
            compute=compute_of(session.spec),
            method=method,
            estimator=estimator,
            tracked=surveyed.tracked,
        ),
        total=tracked,
        label="row",
        store=StoreOf(
            base=layout.prepared(method),
            name="value",
            rows=tracked,
            columns=1,
            dtype="float64",
            chunk_rows=rows,
            dimensions=("train_index", "column"),
            row_columns={"train_index": surveyed.tracked.astype("int32")},
            attrs={"method": method},
        ),
        # Blocks made with other values than these are void.
        voids=(f"{method}/{REDUCE}", f"{method}/{ATTRIBUTE}"),
    )
