"""What ``run.json`` says of a run: what it was asked for, how it was cut, how close the plan was."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from typing import Any

from ...storage import layout
from ...storage.rundir import RunDirectory
from ...storage.trajectory import open_trajectory
from ..plan.compatibility import ASKED, chosen
from ..plan.plan import Plan
from ..plan.provenance import made_of_notes
from ..plan.survey import Survey
from ..spec.method_options import CurvatureOptions
from ..spec.spec import RunSpec
from ..vocabulary import RECORD, SAMPLES, SEEDS, TRAJECTORY


def run_notes(spec: RunSpec, surveyed: Survey, plan: Plan, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``run.json`` of a run that begins or goes on.

    Args:
        spec: What was asked for.
        surveyed: What the recipe came to.
        plan: How the work is cut.
        stored: ``run.json`` so far; empty for a new run.
    """
    # What a method was asked for by `record` alone binds nobody: it gives way to what is asked now.
    methods = {
        name: entry for name, entry in stored.get("methods", {}).items() if entry.get("state") != ASKED
    }
    for method in dict.fromkeys((spec.base_method, spec.method)):  # in this order, which readers see
        methods.setdefault(method, {"state": ASKED})
        options = CurvatureOptions.asked_by(spec).to_json()
        methods[method].update(mode=spec.mode, options=options, **target_notes(spec, plan))
    if spec.seeds > 1:
        seeds = [surveyed.recipe.seed + k for k in range(spec.seeds)]
        entry = methods.setdefault(spec.averaged, {"state": ASKED})
        entry.update(average_entry(spec.method, seeds), **target_notes(spec, plan))
    return {
        "format": 1,
        "spec": _spec_dict(spec),
        "identity": stored.get("identity") or spec.identity(),
        "recipe": {
            "name": surveyed.recipe.name,
            "class": f"{type(surveyed.recipe).__module__}:{type(surveyed.recipe).__qualname__}",
            "arguments": dict(spec.recipe_args) or dict(surveyed.recipe.arguments()),
            "epochs": surveyed.recipe.epochs,
            "batch_size": surveyed.recipe.batch_size,
            "seed": surveyed.recipe.seed,
        },
        "n_train": plan.n_train,
        "n_test": plan.n_test,
        "n_tracked": plan.n_tracked,
        "n_test_tracked": plan.n_tested,
        "dimension": plan.dimension,
        "steps": plan.steps,
        "method": spec.method,
        "chosen": chosen(surveyed),
        **made_of_notes(stored, surveyed.made_of),
        "conservation": surveyed.conservation,
        "strategies": surveyed.strategies,
        "versions": _versions(),
        "layout": {
            "shards": len(plan.shards),
            "chunk_rows": plan.chunk_rows,
            "test_chunk_rows": plan.test_chunk_rows,
        },
        "plan": plan.as_dict(),
        "methods": methods,
        "trust": dict(stored.get("trust", {})),
        "stages": {k: dict(v) for k, v in stored.get("stages", {}).items()},
        "summary": dict(stored.get("summary", {})),
        **({"seeds": dict(stored["seeds"])} if "seeds" in stored else {}),
    }


def target_notes(spec: RunSpec, plan: Plan) -> dict[str, Any]:
    """Return what a method's entry says of its targets; nothing where they are the test samples."""
    return {} if spec.targets == SAMPLES else {"targets": spec.targets, "n_targets": len(plan.targets)}


def average_entry(source: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Return what ``methods`` says of the average of ``source`` over ``seeds``."""
    return {"mode": SEEDS, "source": source, "seeds": list(seeds)}


def closing_notes(directory: RunDirectory, plan: Plan, info: dict[str, Any]) -> None:
    """Add to ``info`` what the stages came to: losses, sizes, seconds, memory beside the plan's."""
    manifests = [m for stage in directory.stages() for m in directory.manifests(stage)]
    record = directory.manifest(RECORD, TRAJECTORY)
    closing = dict(record.values) if record else {}
    predicted = plan.memory
    info["summary"] = {
        **{k: v for k, v in closing.items() if k.endswith(("_accuracy", "_loss"))},
        "peak_bytes": max((m.values.get("peak_bytes", 0) for m in manifests), default=0),
        "predicted_bytes": max(size for name, size in predicted.items() if name.endswith(" worker")),
        "disk_bytes": sum(e.bytes for m in manifests for e in m.files),
        "predicted_disk_bytes": plan.disk["total"],
        "seconds": sum(v.get("seconds", 0.0) for v in info["stages"].values()),
        "predicted_seconds": plan.seconds.get("total"),
    }
    if record is not None:
        trajectory = open_trajectory(directory.path(layout.TRAJECTORY))
        info["environment"] = trajectory.attrs.get("environment", {})


def _spec_dict(spec: RunSpec) -> dict[str, Any]:
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values["recipe"] = spec.recipe_reference
    values["recipe_args"] = dict(spec.recipe_args)
    for name in ("track", "test"):
        if not isinstance(values[name], str):
            values[name] = [int(v) for v in values[name]]
    return values


def _versions() -> dict[str, str | None]:
    names = ("hydra-pipe", "torch", "ray", "zarr", "numcodecs", "pyarrow", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str | None:
    """Return a package's version; None where it is not installed: the serial executor needs no Ray."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
