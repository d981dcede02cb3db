"""The driver: record, test gradients, replay, reduce; resume; refuse what cannot work.

A run flows one way and every unit commits its own results, so driving is: find which units have no
valid manifest, have the executor do those, and note the state in ``run.json``. Running the same
specification again therefore resumes, whatever killed the last attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...storage import layout
from ...storage.errors import SpecError
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...storage.trajectory import open_trajectory
from ...workers.determinism import restored_process
from ...workers.training.training import Compute
from ..analysis.zeros import zero_warning
from ..executors.base import Executor, Unit
from ..executors.events import (
    Note,
    Observer,
    RunFinished,
    RunStarted,
    null,
    warn,
)
from ..executors.ray import make_executor
from ..opened_run import Run, open_run
from ..plan.compatibility import ASKED, place, refuse_unsupported, stored_run
from ..plan.plan import Plan, cut
from ..plan.provenance import say_cosmetic
from ..plan.survey import Survey, compute_of, survey
from ..spec.method_options import CurvatureOptions
from ..spec.spec import RunSpec
from ..units.reduce import ReduceJob, interclass_table
from ..units.tasks import Tasks
from ..vocabulary import (
    ADJOINT,
    EKFAC,
    EXACT,
    FAST,
    INDEX,
    INTERCLASS,
    RECORD,
    REDUCE,
    REPLAY,
    SAMPLES,
    STAGES,
    TEST_GRADIENTS,
    TRAJECTORY,
    stage_of,
)
from .curvature_stages import CurvatureStages
from .gradient_stages import GradientStages
from .run_info import closing_notes, run_notes
from .stages import units_of
from .trust import trust_of

__all__ = ["STAGES", "run"]

logger = logging.getLogger(__name__)


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
            from .seeds import run_seeds

            run_seeds(spec, surveyed, executor, observer, stages)
        else:
            make_driver(spec, surveyed, executor, observer).drive(stages)
    finally:
        executor.close()
    finished = open_run(place(spec, surveyed))
    observer(RunFinished(summary=finished.summary()))
    return finished


def make_driver(spec: RunSpec, surveyed: Survey, executor: Executor, observer: Observer) -> _Driver:
    """Return what drives one run, after all that speaks against starting it was found.

    Raises:
        SpecMismatch: See `run`.
        DoesNotFit: See ``make_plan``.
    """
    directory = RunDirectory(place(spec, surveyed))
    stored = stored_run(directory, spec, surveyed)
    replaced = stored is None and directory.exists()
    # A resumed run keeps the cut it began with, whatever `auto` would choose today.
    before = stored.get("methods", {}).get(spec.base_method, {}) if stored else {}
    fixed = before.get("shards")
    plan = cut(replace(spec, seeds=1), surveyed, executor.capacity(start=False), shards=fixed)
    if replaced:  # only now: what cannot be done must not cost the run that is there
        directory.delete_results()
        observer(Note(message=f"replaced the run at {directory.uri}"))
    observer(RunStarted(uri=directory.uri, recipe=surveyed.recipe.name, resumed=stored is not None))
    say_cosmetic(stored or {}, surveyed.made_of, observer)
    return _Driver(spec, surveyed, plan, directory, executor, observer, stored or {})


class _Driver(GradientStages, CurvatureStages):
    """One pass over the stages of one run."""

    def __init__(
        self,
        spec: RunSpec,
        surveyed: Survey,
        plan: Plan,
        directory: RunDirectory,
        executor: Executor,
        observer: Observer,
        stored: Mapping[str, Any],
    ) -> None:
        self.spec, self.surveyed, self.plan = spec, surveyed, plan
        self.method: str = spec.method
        adjoint = spec.mode == ADJOINT
        self.base: str = spec.base_method
        self.form: str = spec.form
        self.collect_stage = f"{self.base}/{ADJOINT if adjoint else REPLAY}"
        self.reduce_stage = f"{self.method}/{REDUCE}"
        self.options = CurvatureOptions.asked_by(spec).to_json()
        super().__init__(directory, executor, observer, self._info(stored))

    def drive(self, stages: Sequence[str]) -> None:
        """Do the given stages in order."""
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown:
            raise SpecError(f"stage {unknown[0]!r} is not one of {', '.join(STAGES)}")
        self.directory.clear_litter()
        if set(stages) != {RECORD}:
            for entry in self.info["methods"].values():
                entry["state"] = "partial" if entry["state"] == ASKED else entry["state"]
        self.directory.write(self.info)
        steps: dict[str, Callable[[], None]] = {
            RECORD: self._record,
            TEST_GRADIENTS: self._test_gradients,
            REPLAY: self._adjoint if self.spec.mode == ADJOINT else self._replay,
            REDUCE: self._reduce,
        }
        for stage in STAGES:
            if stage in stages:
                steps[stage]()
        self._close()

    # ------------------------------------------------------------------ stages

    def _record(self) -> None:
        units = [Unit(stage=RECORD, name=TRAJECTORY, arguments={})]
        self._stage(RECORD, units, self.plan.steps, "step")

    def _replay(self) -> None:
        self._needs(RECORD, TRAJECTORY, "record")
        plan = self.plan
        base = layout.hypergradients(self.base)
        store = self._make_store(
            self.collect_stage,
            base,
            name="hypergradient",
            rows=plan.n_tracked,
            columns=plan.dimension,
            dtype=self.spec.dtype,
            chunk_rows=plan.chunk_rows,
            dimensions=("train_index", "parameter"),
            row_columns={"train_index": self.surveyed.tracked.astype(np.int32)},
            attrs={"n_train": plan.n_train, "method": self.base},
        )
        self._collect(base, store)

    def _adjoint(self) -> None:
        self._needs(TEST_GRADIENTS, INDEX, "replay")
        if self.spec.targets != SAMPLES:
            self._target_gradients()
        plan = self.plan
        base = layout.by_test(self.base)
        store = self._make_store(
            self.collect_stage,
            base,
            name="contribution",
            rows=len(plan.targets),
            columns=plan.n_tracked,
            dtype=self.spec.dtype,
            chunk_rows=plan.chunk_rows,
            dimensions=(plan.targets.axis, "tracked"),
            row_columns=self._by_test_columns(),
            attrs={"n_train": plan.n_train, "method": self.base},
        )
        self._collect(base, store)

    def _by_test_columns(self) -> dict[str, np.ndarray]:
        columns = self.plan.targets.columns()
        return columns if self.spec.targets != SAMPLES else {"test_index": columns["test_index"]}

    def _collect(self, base: str, store: RowStore) -> None:
        """Fill a store shard by shard: hypergradients, or in adjoint mode contributions by target."""
        if self.form == EKFAC and self._curvature():
            for later in (self.collect_stage, self.reduce_stage):
                self.directory.drop(later)  # made with another basis
        if not self._valid(self.collect_stage, INDEX):
            self._commit_index(self.collect_stage, base, store)
        units = units_of(self.collect_stage, self.plan.shards)
        entry = self.info["methods"][self.base]
        entry["shards"] = len(units)
        entry.setdefault("asked_shards", self.spec.shards)
        vectors = sum(shard.stop - shard.start for shard in self.plan.shards)
        exact = self.form == EXACT
        self._preflight(self.base, self.collect_stage, [unit.name for unit in units], vectors, exact)
        self._stage(self.collect_stage, units, self.plan.steps * len(units), "step", extra=1)
        self._trust()
        if self.spec.exact_rank:
            self._correct()

    def _trust(self) -> None:
        """Note what speaks for the numbers; a run whose hypergradients do not add up ends here."""
        plan, reason = self.plan, None
        if self.form != FAST:
            reason = "it is that of the form without the Hessian"
        elif plan.n_tracked != plan.n_train:
            reason = f"{plan.n_tracked} of {plan.n_train} samples are tracked; whole batches were added up in the trials"
        elif not self.surveyed.conservation:
            reason = "batch statistics are held constant"
        found = trust_of(self.directory, self.collect_stage, n_train=plan.n_train, lawful=reason)
        self.info.setdefault("trust", {})[self.base] = found
        self.directory.write(self.info)

    def _reduce(self) -> None:
        self._needs(RECORD, TRAJECTORY, "record")
        self._needs(TEST_GRADIENTS, INDEX, "replay")
        if self.spec.targets != SAMPLES:
            self._needs(stage_of(self.spec.targets), INDEX, "replay")
        for shard in self.plan.shards:
            self._needs(self.collect_stage, shard.name, "replay")
        for method in dict.fromkeys((self.base, self.method)):
            self._reduce_method(method)

    def _reduce_method(self, method: str) -> None:
        stage = f"{method}/{REDUCE}"
        units = units_of(stage, self.plan.reduce_blocks)
        done = self._stage(stage, units, self.plan.n_tracked, "row", extra=1)
        if not done and self._valid(stage, INTERCLASS):
            return
        from ...storage import contributions as parquet

        manifests = [self.directory.manifest(stage, unit.name) for unit in units]
        table = interclass_table([m.values["interclass"] for m in manifests if m is not None])
        relative = layout.table_part("interclass", method, "00000")
        parquet.write_table(self.directory.path(relative), table, parquet.INTERCLASS)
        self.directory.commit(stage, INTERCLASS, [relative], {})
        zero = zero_warning(self.directory, method)
        if zero:
            self.observer(Note(message=f"warning: {zero}"))

    def _tasks(self, stage: str) -> Tasks:
        surveyed, plan = self.surveyed, self.plan
        visits = np.zeros(plan.n_tracked, dtype=np.int64)
        if stage.endswith(f"/{REDUCE}"):
            batches = open_trajectory(self.directory.path(layout.TRAJECTORY)).batches
            counts = np.bincount(batches[batches >= 0], minlength=plan.n_train)
            visits = counts[surveyed.tracked]
        if self.spec.mode == ADJOINT:  # shards are blocks of targets: every sample was in all of them
            shard_of = np.full(plan.n_tracked, -1, dtype=np.int64)
        else:
            shard_of = np.concatenate(
                [np.full(s.stop - s.start, k, dtype=np.int64) for k, s in enumerate(plan.shards)]
            )
        return Tasks(
            uri=self.directory.uri,
            recipe=surveyed.recipe,
            compute=self._compute(stage),
            method=self.base,
            form=self.form,
            final=self.method,
            tracked=surveyed.tracked,
            tested=surveyed.tested,
            test_labels=surveyed.test_labels,
            checkpoint_every=self.spec.checkpoint_every,
            options=self.options,
            job=ReduceJob(
                method=stage.rsplit("/", 1)[0] if stage.endswith(f"/{REDUCE}") else self.method,
                base=self.base,
                mode=self.spec.mode,
                tracked=surveyed.tracked,
                tiles=plan.reduce,
                n_train=plan.n_train,
                train_labels=surveyed.train_labels[surveyed.tracked],
                visits=visits,
                shard_of=shard_of,
                targets=plan.targets.kind,
            ),
        )

    def _compute(self, stage: str) -> Compute:
        """The exact form differentiates through batch statistics; nothing else changes by stage."""
        compute = compute_of(self.spec)
        exact = self.form == EXACT and stage == self.collect_stage
        return replace(compute, batch_norm="coupled") if exact else compute

    def _info(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        return run_notes(self.spec, self.surveyed, self.plan, stored)

    def _close(self) -> None:
        """Note states and how close the plan was."""
        for method in (self.base, self.method):
            if self.directory.manifest(f"{method}/{REDUCE}", INTERCLASS) is not None:
                self.info["methods"][method]["state"] = "complete"
        closing_notes(self.directory, self.plan, self.info)
        self.directory.write(self.info)
