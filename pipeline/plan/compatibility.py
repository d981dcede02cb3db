"""May this run start here? What differs from a run that is there, and what would be lost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ...storage.errors import SpecError, SpecMismatch
from ...storage.place import check_place
from ...storage.rundir import RunDirectory
from ...workers.determinism import resolve_device
from ..executors.raysetup import inside_ray_job
from ..spec.spec import RunSpec
from ..vocabulary import ASKED, KINDS
from .provenance import adopt, recipe_differences
from .survey import Survey


def refuse_unsupported(spec: RunSpec) -> None:
    """Refuse what this machine cannot do.

    Raises:
        DeviceMissing: A GPU is asked for, here, and there is none.
    """
    if spec.executor == "serial":  # with Ray the workers' machines decide
        resolve_device(spec.device)


def place(spec: RunSpec, surveyed: Survey) -> str:
    """Return where the run goes.

    Raises:
        SpecError: Its results would be lost there.
    """
    out = spec.out or f"runs/{surveyed.recipe.name}"
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


def method_differences(spec: RunSpec, methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Compare what belongs to one method of a run, not to the run, as ``RunSpec.differences`` does.

    Methods of one form share its curvature, so their options must be the same.
    """
    lines = []
    stored = begun(methods).get(spec.base_method, {})
    if stored.get("mode", spec.mode) != spec.mode:
        lines.append(f"mode: stored {stored['mode']!r}, asked {spec.mode!r}")
    before = stored_options(spec, methods) or method_options(spec)
    if before != method_options(spec):
        lines.append(f"options: stored {before}, asked {method_options(spec)}")
    shards = stored.get("shards")
    if shards and spec.shards not in ("auto", shards, stored.get("asked_shards")):
        lines.append(f"shards: stored {shards}, asked {spec.shards}")
    return [f"{line} (method {spec.base_method})" for line in lines]


def begun(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the methods of a run of which something has been computed."""
    return {name: entry for name, entry in methods.items() if entry.get("state") != ASKED}


def stored_options(spec: RunSpec, methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the `method_options` with which a run has this spec's form; empty where it has none."""
    own = [spec.base_method, *_of_the_form(spec)]
    there = begun(methods)
    return next((dict(there[name]["options"]) for name in own if there.get(name, {}).get("options")), {})


def _of_the_form(spec: RunSpec) -> list[str]:
    return [spec.form, *(f"{spec.form}-{kind}" for kind in KINDS)]


def method_options(spec: RunSpec) -> dict[str, Any]:
    """Return what a method depends on beyond the run's identity."""
    if spec.hessian != "ekfac":
        return {}
    at = {} if spec.curvature_at is None else {"at": list(spec.curvature_at)}
    return {
        **at,
        "checkpoints": spec.curvature_checkpoints,
        "samples": spec.curvature_samples,
        "core": spec.curvature_core,
    }


def chosen(surveyed: Survey) -> dict[str, Any]:
    """Return what the recipe and the selections came to: a changed index file or dataset shows here."""
    return {
        "n_train": surveyed.n_train,
        "n_test": surveyed.n_test,
        "dimension": surveyed.dimension,
        "steps": surveyed.steps,
        "tracked": hashlib.sha256(surveyed.tracked.tobytes()).hexdigest()[:16],
        "tested": hashlib.sha256(surveyed.tested.tobytes()).hexdigest()[:16],
    }


def stored_run(directory: RunDirectory, spec: RunSpec, surveyed: Survey) -> dict[str, Any] | None:
    """Return run.json of a run to go on with, None for a fresh start (maybe in place of another run)."""
    if not directory.exists():
        check_place(directory.uri)
        return None
    stored = directory.read()
    adopt(directory, stored, surveyed.made_of)
    differing = spec.differences(stored.get("identity", {}))
    before = stored.get("chosen", {})
    differing += [
        f"{name}: stored {before[name]}, now {value}"
        for name, value in chosen(surveyed).items()
        if name in before and before[name] != value
    ]
    differing += method_differences(spec, stored.get("methods", {}))
    differing += recipe_differences(stored, surveyed.made_of)
    if not differing:
        return stored
    if not spec.overwrite:
        raise SpecMismatch(
            f"{directory.uri} holds a run of another specification ({'; '.join(differing)}); "
            "use another --out, the stored values, or --overwrite to replace it"
        )
    return None
