"""What ``run.json`` says of a run: what it was asked for, how it was cut, how close the plan was."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from importlib import metadata
from typing import Any

from ...storage import layout
from ...storage.rundir import RunDirectory
from ...storage.trajectory import open_trajectory
from ..plan.compatibility import chosen
from ..plan.plan import Plan
from ..plan.provenance import made_of_notes
from ..plan.survey import Survey
from ..reading.run_info import LayoutEntry, RunInfo, SummaryEntry
from ..reading.unit_values import RecordValues, UnitValues, values_of
from ..spec.method_options import CurvatureOptions
from ..spec.spec import RunSpec, is_open
from ..spec.targets import TargetSet
from ..vocabulary import ASKED, RECORD, SAMPLES, SEEDS, TRAJECTORY


def run_notes(spec: RunSpec, surveyed: Survey, plan: Plan, stored: RunInfo | None) -> RunInfo:
    """Return ``run.json`` of a run that begins or goes on.

    Args:
        spec: What was asked for.
        surveyed: What the recipe came to.
        plan: How the work is cut.
        stored: ``run.json`` so far; None: a new run.
    """
    before = stored or RunInfo()
    # What a method was asked for by `record` alone binds nobody: it gives way to what is asked now.
    kept = {name: entry for name, entry in before.methods.items() if entry.state != ASKED}
    recipe = surveyed.recipe
    info = RunInfo(
        method=None if spec.at_checkpoint else spec.method,
        n_train=plan.n_train,
        n_test=plan.n_test,
        n_tracked=plan.n_tracked,
        n_test_tracked=plan.n_tested,
        dimension=plan.dimension,
        steps=plan.steps,
        conservation=surveyed.conservation,
        identity=spec.identity() if is_open(before.identity) else before.identity or spec.identity(),
        spec=_spec_dict(spec),
        chosen=chosen(surveyed),
        made_of=made_of_notes(stored, surveyed.made_of),
        layout=LayoutEntry(
            shards=len(plan.shards),
            chunk_rows=plan.chunk_rows,
            test_chunk_rows=plan.test_chunk_rows,
            reduce_memory=plan.reduce_memory,
        ),
        methods=kept,
        stages=before.stages,
        seeds=before.seeds,
        trust=before.trust,
        summary=before.summary,
        rest={
            "format": 1,
            "recipe": {
                "name": recipe.name,
                "class": f"{type(recipe).__module__}:{type(recipe).__qualname__}",
                "arguments": dict(spec.recipe_args) or dict(recipe.arguments()),
                "epochs": recipe.epochs,
                "batch_size": recipe.batch_size,
                "seed": recipe.seed,
            },
            "strategies": surveyed.strategies,
            "versions": versions(),
            "plan": plan.as_dict(),
        },
    )
    notes, options = target_notes(plan.targets), CurvatureOptions.asked_by(spec).to_json()
    asked = () if spec.at_checkpoint else (spec.base_method, spec.method)  # HyDRA has nothing to follow there
    for method in dict.fromkeys(asked):  # in this order, which readers see
        state = kept[method].state if method in kept else ASKED
        info = info.with_method(
            method, state=state, mode=spec.mode, options=options, store_dtype=spec.narrow_dtype, **notes
        )
    if spec.seeds > 1:
        seeds = [recipe.seed + k for k in range(spec.seeds)]
        state = kept[spec.averaged].state if spec.averaged in kept else ASKED
        info = info.with_method(spec.averaged, state=state, **average_notes(spec.method, seeds), **notes)
    return info


def target_notes(targets: TargetSet) -> dict[str, Any]:
    """Return what a method's entry says of its targets; nothing where they are the test samples."""
    return {} if targets.kind == SAMPLES else {"targets": targets.kind, "n_targets": len(targets)}


def average_notes(source: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Return what a method's entry says where it is the average of ``source`` over ``seeds``."""
    return {"mode": SEEDS, "source": source, "seeds": tuple(seeds)}


def closing_notes(directory: RunDirectory, plan: Plan) -> Callable[[RunInfo], RunInfo]:
    """Return what adds to ``run.json`` what the stages came to: losses, sizes, seconds, memory beside the plan's."""
    manifests = [m for stage in directory.stages() for m in directory.manifests(stage)]
    record = directory.manifest(RECORD, TRAJECTORY)
    closing = values_of(RecordValues, record).closing if record else {}
    summary = SummaryEntry(
        peak_bytes=max((values_of(UnitValues, m).peak_bytes or 0 for m in manifests), default=0),
        predicted_bytes=plan.memory.largest,
        disk_bytes=sum(entry.bytes for m in manifests for entry in m.files),
        predicted_disk_bytes=plan.disk["total"],
        predicted_seconds=plan.seconds.get("total"),
        closing={k: v for k, v in closing.items() if k.endswith(("_accuracy", "_loss"))},
    )
    attrs = open_trajectory(directory.path(layout.TRAJECTORY), directory.vouched).attrs if record else None

    def note(info: RunInfo) -> RunInfo:
        seconds = sum(entry.seconds or 0.0 for entry in info.stages.values())
        rest = info.rest if attrs is None else {**info.rest, "environment": attrs.get("environment", {})}
        return replace(info, summary=replace(summary, seconds=seconds), rest=rest)

    return note


def _spec_dict(spec: RunSpec) -> dict[str, Any]:
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values["recipe"] = spec.recipe_reference
    values["recipe_args"] = dict(spec.recipe_args)
    for name in ("track", "test"):
        if not isinstance(values[name], str):
            values[name] = [int(v) for v in values[name]]
    return values


def versions() -> dict[str, str | None]:
    """Return the versions of what a run is made with."""
    names = ("hydra-pipe", "torch", "ray", "zarr", "numcodecs", "pyarrow", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


@functools.cache
def _version(name: str) -> str | None:
    """Return a package's version; None where it is not installed: the serial executor needs no Ray."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
