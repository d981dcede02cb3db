"""Attribute: contributions by other estimators, added to a run that holds a record.

Stages ``<method>/prepare`` (where the estimator needs it), ``<method>/attribute`` (units are blocks
of test samples) and ``<method>/reduce``, with the driver's mechanics: idempotent, resumable, on any
executor. The tables lie beside HyDRA's under ``method=NAME``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ...storage import layout
from ...storage.errors import SpecError, SpecMismatch
from ...storage.rundir import RunDirectory
from ...workers.determinism import restored_process
from ...workers.estimators import ESTIMATORS, make
from ...workers.estimators.base import TARGETS, Estimator
from ...workers.recipe import Recipe
from ...workers.training.training import Compute
from ..executors.base import Executor
from ..executors.events import Note, Observer, RunFinished, RunStarted, null
from ..executors.ray import make_executor
from ..opened_run import Run, open_run
from ..plan.compatibility import place, refuse_unsupported, stored_run
from ..plan.plan import Plan, cut
from ..plan.provenance import check_recipe
from ..plan.sharding import EXACT_TARGETS, spans
from ..plan.stored_spec import PLACEMENT, stored_spec
from ..plan.survey import Survey, survey
from ..spec.spec import RunSpec, averaged
from ..units.estimate import AttributeTasks
from ..units.tasks import Tasks
from ..vocabulary import (
    ADJOINT,
    ATTRIBUTE,
    INDEX,
    INTERCLASS,
    PREPARE,
    RECORD,
    REDUCE,
    TEST_GRADIENTS,
    TRAJECTORY,
)
from .drive import _Driver
from .seeds import announce, average, check_data, drive_members, naming, seeds_of
from .stages import units_of

MOST_TARGETS = 64
"""Test samples of a block, at most: also what a killed worker loses."""

VECTOR_SHARE = 0.25
"""Of a worker's memory, for the vectors that an estimator holds."""

PREPARE_ROWS = 512
"""Tracked samples prepared in a unit, at most."""

__all__ = ["PLACEMENT", "attribute"]

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
        placement: Fields of ``RunSpec`` named in ``PLACEMENT``; the rest is the run's.

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
    spec = replace(stored_spec(found, recipe, placement, command="attribute"), seeds=seeds)
    # The mode of HyDRA's own fast method, so that going on beside it is no other specification.
    mode = found.info.get("methods", {}).get(spec.base_method, {}).get("mode", spec.mode)
    spec = replace(spec, mode=mode)
    refuse_unsupported(spec)
    surveyed = survey(spec, trial=False)
    place(spec, surveyed)
    check_recipe(found.uri, found.info, surveyed.made_of, observer)
    stored = stored_run(found.directory, spec, surveyed)
    assert stored is not None  # the run is there, and what differs has been refused
    data = check_data(spec, surveyed, found.directory) if seeds > 1 else {}
    executor = make_executor(spec)
    try:
        observer(RunStarted(uri=found.uri, recipe=surveyed.recipe.name, resumed=True))
        _add(spec, surveyed, found.directory, chosen, executor, observer, overwrite)
        if seeds > 1:
            for name in chosen:
                announce(found.directory, name, seeds_of(spec, surveyed))
            needed = (RECORD, TEST_GRADIENTS)
            members = drive_members(spec, surveyed, found.directory, data, executor, observer, needed)
            for m in members:
                with naming(m.seed):
                    place_of = found.directory.of_seed(m.seed)
                    _add(m.spec, m.surveyed, place_of, chosen, executor, observer, overwrite)
            for name in chosen:
                average(spec, surveyed, found.directory, name, executor, observer)
    finally:
        executor.close()
    finished = open_run(found.uri)
    last = list(chosen)[-1]
    observer(RunFinished(summary=finished.summary(averaged(last, seeds) if seeds > 1 else last)))
    return finished


def _add(
    spec: RunSpec,
    surveyed: Survey,
    directory: RunDirectory,
    chosen: Mapping[str, Estimator],
    executor: Executor,
    observer: Observer,
    overwrite: bool,
) -> None:
    """Do the estimators' stages in one run."""
    stored = directory.read()
    for name, estimator in chosen.items():
        _check_options(directory, stored, name, estimator, overwrite, observer)
    for estimator in chosen.values():
        capacity = executor.capacity(start=False)
        stored = directory.read()
        plan = _plan(spec, surveyed, stored, estimator, capacity)
        _Attribution(spec, surveyed, plan, directory, executor, observer, stored, estimator).drive()


def _check_options(
    directory: RunDirectory,
    stored: Mapping[str, Any],
    name: str,
    estimator: Estimator,
    overwrite: bool,
    observer: Observer,
) -> None:
    """Refuse options that differ from what is there; with ``overwrite`` forget what is there."""
    before = stored.get("methods", {}).get(name, {}).get("options")
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
        observer(Note(message=f"method {name} is done again with other options"))
    for stage in stages:
        directory.drop(stage)


def _plan(
    spec: RunSpec,
    surveyed: Survey,
    stored: Mapping[str, Any],
    estimator: Estimator,
    capacity: Mapping[str, Any],
) -> Plan:
    """Cut the test samples into blocks by memory and workers; a resumed method keeps its cut."""
    before = stored.get("methods", {}).get(estimator.NAME, {})
    count = before.get("shards")
    if count is None:
        tested, slots = len(surveyed.tested), int(capacity.get("slots") or 1)
        memory = spec.memory or int(capacity.get("memory_per_worker") or 0) or 4 << 30
        held = estimator.VECTORS * surveyed.dimension * 8
        each = min(MOST_TARGETS, int(VECTOR_SHARE * memory) // held // TARGETS * TARGETS)
        each = max(TARGETS, each)
        count = max(math.ceil(tested / each), min(slots, math.ceil(tested / TARGETS)))
    # Blocks of targets are the exact adjoint's shards; how many fit was decided here.
    shaped = replace(spec, mode=ADJOINT, hessian="exact", exact_rank=0, memory=None, seeds=1)
    return cut(shaped, surveyed, {**capacity, "memory_per_worker": 0}, shards=count)


class _Attribution(_Driver):
    """One estimator's stages, with the driver's mechanics."""

    def __init__(
        self,
        spec: RunSpec,
        surveyed: Survey,
        plan: Plan,
        directory: RunDirectory,
        executor: Executor,
        observer: Observer,
        stored: Mapping[str, Any],
        estimator: Estimator,
    ) -> None:
        self.estimator = estimator
        shaped = replace(spec, mode=ADJOINT, hessian="exact", exact_rank=0)
        super().__init__(shaped, surveyed, plan, directory, executor, observer, stored)
        self.method = self.base = self.form = estimator.NAME
        self.options = estimator.options()
        self.prepare_stage = f"{self.method}/{PREPARE}"
        self.collect_stage = f"{self.method}/{ATTRIBUTE}"
        self.reduce_stage = f"{self.method}/{REDUCE}"

    def drive(self, stages: Sequence[str] = ()) -> None:
        """Prepare, attribute, reduce."""
        self._needs(RECORD, TRAJECTORY, "record")
        self._needs(TEST_GRADIENTS, INDEX, "replay")
        self.directory.clear_litter()
        self.directory.write(self.info)
        if self.estimator.PREPARES:
            self._prepare()
        self._fill(layout.by_test(self.method))
        self._reduce()
        self._close()

    def _prepare(self) -> None:
        plan = self.plan
        entry = self.info["methods"][self.method]
        slots = int(plan.capacity.get("slots") or 1)
        rows = math.ceil(plan.n_tracked / slots / TARGETS) * TARGETS
        rows = entry.setdefault("prepare_rows", min(PREPARE_ROWS, rows))
        base = layout.prepared(self.method)
        store = self._make_store(
            self.prepare_stage,
            base,
            name="value",
            rows=plan.n_tracked,
            columns=1,
            dtype="float64",
            chunk_rows=rows,
            dimensions=("train_index", "column"),
            row_columns={"train_index": self.surveyed.tracked.astype("int32")},
            attrs={"method": self.method},
        )
        if not self._valid(self.prepare_stage, INDEX):
            self._commit_index(self.prepare_stage, base, store)
        units = units_of(self.prepare_stage, spans(plan.n_tracked, rows, "rows"))
        if self._stage(self.prepare_stage, units, plan.n_tracked, "row", extra=1):
            # Blocks made with other lengths than these are void.
            for stage in (self.reduce_stage, self.collect_stage):
                self.directory.drop(stage)

    def _fill(self, base: str) -> None:
        plan = self.plan
        store = self._make_store(
            self.collect_stage,
            base,
            name="contribution",
            rows=plan.n_tested,
            columns=plan.n_tracked,
            dtype=self.spec.dtype,
            chunk_rows=plan.chunk_rows,
            dimensions=("test_index", "tracked"),
            row_columns={"test_index": self.surveyed.tested.astype("int32")},
            attrs={"n_train": plan.n_train, "method": self.method},
        )
        if not self._valid(self.collect_stage, INDEX):
            self._commit_index(self.collect_stage, base, store)
        units = units_of(self.collect_stage, plan.shards)
        self._stage(self.collect_stage, units, plan.n_tested, "row", extra=1)

    def _tasks(self, stage: str) -> Tasks:
        given = super()._tasks(stage)
        values = {field.name: getattr(given, field.name) for field in fields(given)}
        return AttributeTasks(**values, estimator=self.estimator)

    def _compute(self, stage: str) -> Compute:
        compute = super()._compute(stage)
        kind = self.estimator.BATCH_NORM
        return replace(compute, batch_norm=kind) if kind and stage == self.collect_stage else compute

    def _info(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return the run's own notes with this method among them: its plan stays HyDRA's."""
        info = {**stored, "methods": {k: dict(v) for k, v in stored.get("methods", {}).items()}}
        info["stages"] = {k: dict(v) for k, v in stored.get("stages", {}).items()}
        entry = info["methods"].setdefault(self.estimator.NAME, {"state": "partial"})
        if entry.get("options") != self.estimator.options():  # done again: also its state
            entry["state"] = "partial"
        entry.update(mode=ATTRIBUTE, options=self.estimator.options(), shards=len(self.plan.shards))
        return info

    def _close(self) -> None:
        if self.directory.manifest(self.reduce_stage, INTERCLASS) is not None:
            self.info["methods"][self.method]["state"] = "complete"
        self.directory.write(self.info)
