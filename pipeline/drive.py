"""The driver: record, test gradients, replay, reduce; resume; refuse what cannot work.

A run flows one way and every unit commits its own results, so driving is: find which units have no
valid manifest, have the executor do those, and note the state in ``run.json``. Running the same
specification again therefore resumes, whatever killed the last attempt.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from importlib import metadata
from typing import Any

import numpy as np

from ..storage.errors import CorruptStore, IncompleteStage, SpecError, SpecMismatch
from ..storage.place import check_place
from ..storage.rows import RowStore
from ..storage.rundir import RunDirectory
from ..storage.trajectory import open_trajectory
from ..storage.uri import is_local
from ..workers.determinism import resolve_device, restored_process
from ..workers.training import Compute
from .events import (
    Note,
    Observer,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    UnitSkipped,
    null,
)
from .executors import make_executor
from .handle import Run, open_run
from .plan import EXACT_TARGETS, Plan, Shard, cut, spans
from .raysetup import inside_ray_job
from .reduce import ReduceJob, interclass_table
from .spec import RunSpec
from .stores import rebuild
from .survey import Survey, compute_of, survey
from .tasks import (
    ADJOINT,
    CORRECTION,
    CURVATURE,
    DIRECTIONS,
    RECORD,
    REDUCE,
    REPLAY,
    STAGES,
    TEST_GRADIENTS,
    Tasks,
)
from .units import Executor, Unit

__all__ = ["STAGES", "run"]

logger = logging.getLogger(__name__)

INDEX = "index"
"""Unit that commits a store's metadata and per-row columns."""


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
    _refuse_unsupported(spec)
    looked = survey(spec)
    directory = RunDirectory(_place(spec, looked))
    stored = _stored(directory, spec, looked)
    replaced = stored is None and directory.exists()
    executor = make_executor(spec)
    try:
        # A resumed run keeps the cut it began with, whatever `auto` would choose today.
        before = stored.get("methods", {}).get(spec.base_method, {}) if stored else {}
        fixed = before.get("shards")
        plan = cut(spec, looked, executor.capacity(start=False), shards=fixed)
        if replaced:  # only now: what cannot be done must not cost the run that is there
            directory.delete_results()
            observer(Note(message=f"replaced the run at {directory.uri}"))
        observer(RunStarted(uri=directory.uri, recipe=looked.recipe.name, resumed=stored is not None))
        driver = _Driver(spec, looked, plan, directory, executor, observer, stored or {})
        driver.drive(stages)
    finally:
        executor.close()
    finished = open_run(directory.uri)
    observer(RunFinished(summary=finished.summary()))
    return finished


def _refuse_unsupported(spec: RunSpec) -> None:
    if spec.executor == "serial":  # with Ray the workers' machines decide
        resolve_device(spec.device)


def _place(spec: RunSpec, looked: Survey) -> str:
    out = spec.out or f"runs/{looked.recipe.name}"
    if inside_ray_job() and "://" not in out and not out.startswith("/"):
        raise SpecError(
            f"--out {out}: a relative path inside a submitted Ray job is lost with the job's working copy; "
            "use an absolute path on shared storage, or s3://, gs://"
        )
    if out.startswith("memory:") and spec.executor == "ray":
        raise SpecError(
            f"--out {out}: memory:// lives in one process and Ray workers are others; use --executor serial"
        )
    return out


def _method_differences(spec: RunSpec, stored: Mapping[str, Any]) -> list[str]:
    """Compare what belongs to one method of a run, not to the run, as ``RunSpec.differences`` does."""
    lines = []
    if stored.get("mode", spec.mode) != spec.mode:
        lines.append(f"mode: stored {stored['mode']!r}, asked {spec.mode!r}")
    if stored.get("options", method_options(spec)) != method_options(spec):
        lines.append(f"options: stored {stored['options']}, asked {method_options(spec)}")
    shards = stored.get("shards")
    if shards and spec.shards not in ("auto", shards, stored.get("asked_shards")):
        lines.append(f"shards: stored {shards}, asked {spec.shards}")
    return [f"{line} (method {spec.base_method})" for line in lines]


def method_options(spec: RunSpec) -> dict[str, Any]:
    """Return what a method depends on beyond the run's identity."""
    if spec.hessian != "ekfac":
        return {}
    return {"checkpoints": spec.curvature_checkpoints, "samples": spec.curvature_samples}


def _chosen(looked: Survey) -> dict[str, Any]:
    """Return what the recipe and the selections came to: a changed index file or dataset shows here."""
    return {
        "n_train": looked.n_train,
        "n_test": looked.n_test,
        "dimension": looked.dimension,
        "steps": looked.steps,
        "tracked": hashlib.sha256(looked.tracked.tobytes()).hexdigest()[:16],
        "tested": hashlib.sha256(looked.tested.tobytes()).hexdigest()[:16],
    }


def _stored(directory: RunDirectory, spec: RunSpec, looked: Survey) -> dict[str, Any] | None:
    """Return run.json of a run to go on with, None for a fresh start (maybe in place of another run)."""
    if not directory.exists():
        check_place(directory.uri)
        return None
    stored = directory.read()
    differing = spec.differences(stored.get("identity", {}))
    before = stored.get("chosen", {})
    differing += [
        f"{name}: stored {before[name]}, now {value}"
        for name, value in _chosen(looked).items()
        if name in before and before[name] != value
    ]
    differing += _method_differences(spec, stored.get("methods", {}).get(spec.base_method, {}))
    if not differing:
        return stored
    if not spec.overwrite:
        raise SpecMismatch(
            f"{directory.uri} holds a run of another specification ({'; '.join(differing)}); "
            "use another --out, the stored values, or --overwrite to replace it"
        )
    return None


class _Driver:
    """One pass over the stages of one run."""

    def __init__(
        self,
        spec: RunSpec,
        looked: Survey,
        plan: Plan,
        directory: RunDirectory,
        executor: Executor,
        observer: Observer,
        stored: Mapping[str, Any],
    ) -> None:
        self.spec, self.looked, self.plan = spec, looked, plan
        self.directory, self.executor, self.observer = directory, executor, observer
        self.method: str = spec.method
        adjoint = spec.mode == "adjoint"
        self.base: str = spec.base_method
        self.collect_stage = f"{self.base}/{ADJOINT if adjoint else REPLAY}"
        self.reduce_stage = f"{self.method}/{REDUCE}"
        self.options = method_options(spec)
        self.info = self._info(stored)

    def drive(self, stages: Sequence[str]) -> None:
        """Do the given stages in order."""
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown:
            raise SpecError(f"stage {unknown[0]!r} is not one of {', '.join(STAGES)}")
        self.directory.clear_litter()
        self.directory.write(self.info)
        steps: dict[str, Callable[[], None]] = {
            RECORD: self._record,
            TEST_GRADIENTS: self._test_gradients,
            REPLAY: self._adjoint if self.spec.mode == "adjoint" else self._replay,
            REDUCE: self._reduce,
        }
        for stage in STAGES:
            if stage in stages:
                steps[stage]()
        self._close()

    # ------------------------------------------------------------------ stages

    def _record(self) -> None:
        units = [Unit(stage=RECORD, name="trajectory", arguments={})]
        self._stage(RECORD, units, self.plan.steps, "step")

    def _test_gradients(self) -> None:
        self._needs(RECORD, "trajectory", "record")
        plan, looked = self.plan, self.looked
        unknown = np.full(plan.n_tested, -1, dtype=np.int16)
        store = self._make_store(
            TEST_GRADIENTS,
            "test_gradients.zarr",
            name="gradient",
            rows=plan.n_tested,
            columns=plan.dimension,
            dtype=self.spec.dtype,
            chunk_rows=plan.test_chunk_rows,
            row_columns={
                "test_index": looked.tested.astype(np.int32),
                "loss": np.full(plan.n_tested, np.nan),
                "label": unknown,
                "prediction": unknown.copy(),
            },
            attrs={"n_test": plan.n_test},
        )
        units = _units(TEST_GRADIENTS, plan.test_blocks)
        self._stage(TEST_GRADIENTS, units, plan.n_tested, "row", extra=1)
        if self._valid(TEST_GRADIENTS, INDEX):
            return
        for unit in units:
            manifest = self.directory.manifest(TEST_GRADIENTS, unit.name)
            assert manifest is not None
            for column, dtype in (("loss", np.float64), ("label", np.int16), ("prediction", np.int16)):
                values = np.asarray(manifest.values[column], dtype=dtype)
                store.write_column(column, values, start=int(manifest.values["start"]))
        self._commit_index(TEST_GRADIENTS, "test_gradients.zarr", store)

    def _replay(self) -> None:
        self._needs(RECORD, "trajectory", "record")
        plan = self.plan
        base = f"hypergradients/method={self.base}.zarr"
        store = self._make_store(
            self.collect_stage,
            base,
            name="hypergradient",
            rows=plan.n_tracked,
            columns=plan.dimension,
            dtype=self.spec.dtype,
            chunk_rows=plan.chunk_rows,
            row_columns={"train_index": self.looked.tracked.astype(np.int32)},
            attrs={"n_train": plan.n_train, "method": self.base},
        )
        self._collect(base, store)

    def _adjoint(self) -> None:
        self._needs(TEST_GRADIENTS, INDEX, "replay")
        plan = self.plan
        base = f"by_test/method={self.base}.zarr"
        store = self._make_store(
            self.collect_stage,
            base,
            name="contribution",
            rows=plan.n_tested,
            columns=plan.n_tracked,
            dtype=self.spec.dtype,
            chunk_rows=plan.chunk_rows,
            row_columns={"test_index": self.looked.tested.astype(np.int32)},
            attrs={"n_train": plan.n_train, "method": self.base},
        )
        self._collect(base, store)

    def _collect(self, base: str, store: RowStore) -> None:
        """Fill a store shard by shard: hypergradients, or in adjoint mode contributions by target."""
        if self.base == "hydra-ekfac":
            stage = f"{self.base}/{CURVATURE}"
            unit = Unit(stage=stage, name=CURVATURE, arguments={})
            if self._stage(stage, [unit], 2 * self.spec.curvature_checkpoints, "pass"):
                for later in (self.collect_stage, self.reduce_stage):
                    self.directory.drop(later)  # made with another basis
        if not self._valid(self.collect_stage, INDEX):
            self._commit_index(self.collect_stage, base, store)
        units = _units(self.collect_stage, self.plan.shards)
        entry = self.info["methods"][self.base]
        entry["shards"] = len(units)
        entry.setdefault("asked_shards", self.spec.shards)
        self._stage(self.collect_stage, units, self.plan.steps * len(units), "step", extra=1)
        if self.spec.exact_rank:
            self._correct()

    def _correct(self) -> None:
        """Correct EKFAC contributions exactly along the leading directions of the test gradients."""
        self._needs(TEST_GRADIENTS, INDEX, "replay")
        stage = f"{self.method}/{DIRECTIONS}"
        unit = Unit(stage=stage, name=DIRECTIONS, arguments={"rank": self.spec.exact_rank})
        self._stage(stage, [unit], 1, "set")
        found = RowStore.open(
            self.directory.path("corrections", f"method={self.method}", "directions.zarr"), "direction"
        )
        stage, base = f"{self.method}/{CORRECTION}", f"corrections/method={self.method}/contributions.zarr"
        store = self._make_store(
            stage,
            base,
            name="contribution",
            rows=found.rows,
            columns=self.plan.n_tracked,
            dtype=self.spec.dtype,
            chunk_rows=EXACT_TARGETS,
            row_columns={},
            attrs={"method": self.method},
        )
        if not self._valid(stage, INDEX):
            self._commit_index(stage, base, store)
        units = _units(stage, spans(found.rows, EXACT_TARGETS, "directions"))
        self._stage(stage, units, self.plan.steps * len(units), "step", extra=1)

    def _reduce(self) -> None:
        self._needs(RECORD, "trajectory", "record")
        self._needs(TEST_GRADIENTS, INDEX, "replay")
        for shard in self.plan.shards:
            self._needs(self.collect_stage, shard.name, "replay")
        for method in dict.fromkeys((self.base, self.method)):
            self._reduce_method(method)

    def _reduce_method(self, method: str) -> None:
        stage = f"{method}/{REDUCE}"
        units = _units(stage, self.plan.reduce_blocks)
        done = self._stage(stage, units, self.plan.n_tracked, "row", extra=1)
        if not done and self._valid(stage, "interclass"):
            return
        from ..storage import contributions as parquet

        manifests = [self.directory.manifest(stage, unit.name) for unit in units]
        table = interclass_table([m.values["interclass"] for m in manifests if m is not None])
        relative = f"interclass/method={method}/part-00000.parquet"
        parquet.write_table(self.directory.path(*relative.split("/")), table, parquet.INTERCLASS)
        self.directory.commit(stage, "interclass", [relative], {})

    # ------------------------------------------------------------------ mechanics

    def _stage(self, stage: str, units: Sequence[Unit], total: int, label: str, extra: int = 0) -> list[str]:
        """Do the units of a stage that have no valid manifest; return their names."""
        begun = time.monotonic()
        self.info["stages"].setdefault(stage, {})["units"] = len(units) + extra
        self.observer(StageStarted(stage=stage, units=len(units), total=total, unit_label=label))
        todo = []
        for unit in units:
            if self._valid(stage, unit.name):
                self.observer(UnitSkipped(stage=stage, unit=unit.name))
            else:
                todo.append(unit)
        if todo:
            if stage == RECORD:
                self._forget_what_followed()
            self.directory.write(self.info)
            self.executor.run(stage, todo, self._tasks(stage), self.observer)
        seconds = time.monotonic() - begun
        if todo:
            entry = self.info["stages"][stage]
            entry["seconds"] = entry.get("seconds", 0.0) + seconds
            self.directory.write(self.info)
        self.observer(StageFinished(stage=stage, seconds=seconds))
        return [unit.name for unit in todo]

    def _forget_what_followed(self) -> None:
        """A new record makes everything computed from an older one void."""
        for stage in self.directory.stages():
            if stage != RECORD:
                self.directory.drop(stage)
        for method in self.info["methods"].values():
            method["state"] = "partial"

    def _make_store(self, stage: str, base: str, **described: Any) -> RowStore:
        """Return a stage's store: as committed, made anew where its metadata are damaged, or fresh."""
        uri = self.directory.path(*base.split("/"))
        known = INDEX in self.directory.units(stage)
        if self._valid(stage, INDEX):
            return RowStore.open(uri, described["name"])
        return rebuild(uri, **described) if known else RowStore.create(uri, **described)

    def _valid(self, stage: str, unit: str) -> bool:
        """Whether a unit is committed and its files are what was committed; else forget it."""
        try:
            manifest = self.directory.manifest(stage, unit)
            if manifest is None:
                return False
            problems = self.directory.check(manifest, digests=is_local(self.directory.uri))
        except CorruptStore as error:
            problems = [str(error)]
        if not problems:
            return True
        self.observer(Note(message=f"{stage} {unit} is done again: {problems[0]}"))
        self.directory.drop(stage, unit)
        return False

    def _needs(self, stage: str, unit: str, command: str) -> None:
        if self.directory.manifest(stage, unit) is None:
            raise IncompleteStage(
                f"{self.directory.uri}: stage {stage} has not finished {unit}; "
                f"run `hydra-pipe {command}` with the same options first"
            )

    def _commit_index(self, stage: str, base: str, store: RowStore) -> None:
        self.directory.commit(stage, INDEX, [f"{base}/{name}" for name in store.metadata_files()], {})

    def _tasks(self, stage: str) -> Tasks:
        looked, plan = self.looked, self.plan
        visits = np.zeros(plan.n_tracked, dtype=np.int64)
        if stage.endswith(f"/{REDUCE}"):
            batches = open_trajectory(self.directory.path("trajectory.zarr")).batches
            counts = np.bincount(batches[batches >= 0], minlength=plan.n_train)
            visits = counts[looked.tracked]
        if self.spec.mode == "adjoint":  # shards are blocks of targets: every sample was in all of them
            shard_of = np.full(plan.n_tracked, -1, dtype=np.int64)
        else:
            shard_of = np.concatenate(
                [np.full(s.stop - s.start, k, dtype=np.int64) for k, s in enumerate(plan.shards)]
            )
        return Tasks(
            uri=self.directory.uri,
            recipe=looked.recipe,
            compute=self._compute(stage),
            method=self.base,
            final=self.method,
            tracked=looked.tracked,
            tested=looked.tested,
            checkpoint_every=self.spec.checkpoint_every,
            options=self.options,
            job=ReduceJob(
                method=stage.rsplit("/", 1)[0] if stage.endswith(f"/{REDUCE}") else self.method,
                base=self.base,
                mode=self.spec.mode,
                tracked=looked.tracked,
                tiles=plan.reduce,
                n_train=plan.n_train,
                train_labels=looked.train_labels[looked.tracked],
                visits=visits,
                shard_of=shard_of,
            ),
        )

    def _compute(self, stage: str) -> Compute:
        """The exact form differentiates through batch statistics; nothing else changes by stage."""
        compute = compute_of(self.spec)
        exact = self.base == "hydra-exact" and stage == self.collect_stage
        return replace(compute, batch_norm="coupled") if exact else compute

    def _info(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        spec, looked, plan = self.spec, self.looked, self.plan
        methods = {**stored.get("methods", {})}
        for method in {self.base, self.method}:
            methods.setdefault(method, {"state": "partial"})
            methods[method].update(mode=spec.mode, options=self.options)
        return {
            "format": 1,
            "spec": _spec_dict(spec),
            "identity": stored.get("identity") or spec.identity(),
            "recipe": {
                "name": looked.recipe.name,
                "class": f"{type(looked.recipe).__module__}:{type(looked.recipe).__qualname__}",
                "arguments": dict(spec.recipe_args) or dict(looked.recipe.arguments()),
                "epochs": looked.recipe.epochs,
                "batch_size": looked.recipe.batch_size,
                "seed": looked.recipe.seed,
            },
            "n_train": plan.n_train,
            "n_test": plan.n_test,
            "n_tracked": plan.n_tracked,
            "n_test_tracked": plan.n_tested,
            "dimension": plan.dimension,
            "steps": plan.steps,
            "method": self.method,
            "chosen": _chosen(looked),
            "conservation": looked.conservation,
            "strategies": looked.strategies,
            "versions": _versions(),
            "layout": {
                "shards": len(plan.shards),
                "chunk_rows": plan.chunk_rows,
                "test_chunk_rows": plan.test_chunk_rows,
            },
            "plan": plan.as_dict(),
            "methods": methods,
            "stages": {k: dict(v) for k, v in stored.get("stages", {}).items()},
            "summary": dict(stored.get("summary", {})),
        }

    def _close(self) -> None:
        """Note states and how close the plan was."""
        for method in (self.base, self.method):
            if self.directory.manifest(f"{method}/{REDUCE}", "interclass") is not None:
                self.info["methods"][method]["state"] = "complete"
        manifests = [m for stage in self.directory.stages() for m in self.directory.manifests(stage)]
        record = self.directory.manifest(RECORD, "trajectory")
        closing = dict(record.values) if record else {}
        predicted = self.plan.memory
        self.info["summary"] = {
            **{k: v for k, v in closing.items() if k.endswith(("_accuracy", "_loss"))},
            "peak_bytes": max((m.values.get("peak_bytes", 0) for m in manifests), default=0),
            "predicted_bytes": max(
                predicted["replay worker"],
                predicted["test-gradients worker"],
                predicted["reduce worker"],
            ),
            "disk_bytes": sum(e.bytes for m in manifests for e in m.files),
            "predicted_disk_bytes": self.plan.disk["total"],
            "seconds": sum(v.get("seconds", 0.0) for v in self.info["stages"].values()),
            "predicted_seconds": self.plan.seconds.get("total"),
        }
        if record is not None:
            trajectory = open_trajectory(self.directory.path("trajectory.zarr"))
            self.info["environment"] = trajectory.attrs.get("environment", {})
        self.directory.write(self.info)


def _units(stage: str, spans: Sequence[Shard]) -> list[Unit]:
    return [
        Unit(stage=stage, name=span.name, arguments={"start": span.start, "stop": span.stop})
        for span in spans
    ]


def _spec_dict(spec: RunSpec) -> dict[str, Any]:
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values["recipe"] = spec.recipe_reference
    values["recipe_args"] = dict(spec.recipe_args)
    for name in ("track", "test"):
        if not isinstance(values[name], str):
            values[name] = [int(v) for v in values[name]]
    return values


def _versions() -> dict[str, str]:
    names = ("hydra-pipe", "torch", "ray", "zarr", "numcodecs", "pyarrow", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
