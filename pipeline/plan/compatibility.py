"""May this run start here? What differs from a run that is there, and what would be lost."""

from __future__ import annotations

import hashlib

from ...storage.errors import SpecError, SpecMismatch
from ...storage.place import check_place
from ...storage.rundir import RunDirectory
from ...workers.determinism import resolve_device
from ..executors.raysetup import inside_ray_job
from ..reading.run_info import Chosen, MethodEntry, RunInfo, read_info
from ..reading.unit_values import RecordValues, values_of
from ..spec.groups import PlacementSpec
from ..spec.method_options import CurvatureOptions
from ..spec.spec import RunSpec
from ..vocabulary import ASKED, KINDS, RECORD, TRAJECTORY
from .moment import place_at
from .provenance import adopted, recipe_differences
from .survey import Survey


def refuse_unsupported(spec: PlacementSpec) -> None:
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
    if spec.at is not None:
        out = place_at(out, spec.at)
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


def method_differences(spec: RunSpec, info: RunInfo) -> list[str]:
    """Compare what belongs to one method of a run, not to the run, as ``RunSpec.differences`` does.

    Methods of one form share its curvature, so their options must be the same.
    """
    lines = []
    stored = begun(info, spec.base_method) or MethodEntry()
    if stored.mode not in (None, spec.mode):
        lines.append(f"mode: stored {stored.mode!r}, asked {spec.mode!r}")
    before, asked = stored_options(spec, info), CurvatureOptions.asked_by(spec)
    if before is not None and before != asked:
        lines.append(f"options: stored {before.to_json()}, asked {asked.to_json()}")
    if stored.mode is not None and stored.store_dtype != spec.narrow_dtype:
        before_dtype, asked_dtype = stored.store_dtype or spec.dtype, spec.kept_dtype
        lines.append(f"store_dtype: stored {before_dtype!r}, asked {asked_dtype!r}")
    if stored.shards and spec.shards not in ("auto", stored.shards, stored.asked_shards):
        lines.append(f"shards: stored {stored.shards}, asked {spec.shards}")
    if stored.mode is not None and spec.segments not in (
        None,
        "auto",
        stored.segments or 1,
        stored.asked_segments,
    ):
        lines.append(f"segments: stored {stored.segments or 1}, asked {spec.segments}")
    return [f"{line} (method {spec.base_method})" for line in lines]


def begun(info: RunInfo, method: str) -> MethodEntry | None:
    """Return the entry of a method of which something has been computed; None where nothing has."""
    entry = info.methods.get(method)
    return None if entry is None or entry.state == ASKED else entry


def stored_options(spec: RunSpec, info: RunInfo) -> CurvatureOptions | None:
    """Return the options with which a run has the curvature of this spec's form; None where it has none.

    Raises:
        CorruptStore: They cannot be read.
    """
    for name in (spec.base_method, spec.form, *(f"{spec.form}-{kind}" for kind in KINDS)):
        entry = begun(info, name)
        if entry is not None and entry.options:
            return CurvatureOptions.from_json(entry.options, method=name)
    return None


def chosen(surveyed: Survey) -> Chosen:
    """Return what the recipe and the selections came to."""
    return Chosen(
        n_train=surveyed.n_train,
        n_test=surveyed.n_test,
        dimension=surveyed.dimension,
        steps=surveyed.steps,
        tracked=hashlib.sha256(surveyed.tracked.tobytes()).hexdigest()[:16],
        tested=hashlib.sha256(surveyed.tested.tobytes()).hexdigest()[:16],
    )


def _visits_differences(directory: RunDirectory, spec: RunSpec) -> list[str]:
    """Say that visits are asked for which the record did not keep; a record is never added to."""
    recorded = directory.manifest(RECORD, TRAJECTORY)
    if spec.visits != "on" or recorded is None or values_of(RecordValues, recorded).visits:
        return []
    return ["visits: stored none, asked 'on'"]


def stored_run(directory: RunDirectory, spec: RunSpec, surveyed: Survey) -> RunInfo | None:
    """Return ``run.json`` of a run to go on with, None for a fresh start (maybe in place of another run)."""
    if not directory.exists():
        check_place(directory.uri)
        return None
    stored = adopted(directory, read_info(directory), surveyed.made_of)
    differing = spec.differences(stored.identity)
    differing += stored.chosen.differences(chosen(surveyed))
    differing += method_differences(spec, stored)
    differing += recipe_differences(stored, surveyed.made_of)
    differing += _visits_differences(directory, spec)
    if not differing:
        return stored
    if not spec.overwrite:
        raise SpecMismatch(
            f"{directory.uri} holds a run of another specification ({'; '.join(differing)}); "
            "use another --out, the stored values, or --overwrite to replace it"
        )
    return None
