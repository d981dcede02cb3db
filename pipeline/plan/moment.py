"""A run as of a recorded moment: the record of another run, cut off at one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...storage import layout
from ...storage.errors import RunNotFound, SpecError, SpecMismatch
from ...storage.rundir import RunDirectory
from ...storage.trajectory import open_trajectory
from ..reading.run_info import read_info
from ..spec.spec import RunSpec
from ..vocabulary import RECORD, TRAJECTORY
from .provenance import recipe_differences


def place_at(out: str, step: int) -> str:
    """Return where the run as of a step lies: beside the run that it is of."""
    ending = f"-at-{step}"
    return out if out.endswith(ending) else f"{out.rstrip('/')}{ending}"


def recorded_at(out: str, step: int) -> str:
    """Return where the run lies that one as of a step is of."""
    return out.removesuffix(f"-at-{step}")


def check_moment(spec: RunSpec, out: str, made_of: Mapping[str, object] | None = None) -> None:
    """Refuse a moment that the run at ``out`` has not recorded, or that is asked of another recipe.

    Args:
        spec: What is asked, with ``at``.
        out: Where the recorded run is, or the one as of the moment.
        made_of: Of the recipe; None: not looked at yet.

    Raises:
        RunNotFound: There is no run, or it is not recorded.
        SpecError: No checkpoint is there; names the nearest.
        SpecMismatch: The run is of another specification or recipe.
    """
    at = spec.at
    assert at is not None
    directory = RunDirectory(recorded_at(out, at))
    if not directory.exists() or directory.manifest(RECORD, TRAJECTORY) is None:
        raise RunNotFound(
            f"no recorded run at {directory.uri}, whose checkpoint at step {at} is asked for; record it first: the same "
            "command without --at"
        )
    steps = open_trajectory(directory.path(layout.TRAJECTORY), directory.vouched).checkpoint_steps.tolist()
    if at not in steps:
        near = sorted((step for step in steps if step), key=lambda step: abs(step - at))[:2]
        raise SpecError(
            f"at {at}: {directory.uri} has no checkpoint at this step; the nearest: {', '.join(map(str, sorted(near)))} (a record "
            "with another --checkpoint-every has others)"
        )
    info = read_info(directory)
    asked = replace(spec, at=None, out=directory.uri)
    chosen = {
        name: asked.identity()[name] for name in ("track", "test")
    }  # of a record whatever samples may be asked
    differing = asked.differences({**info.identity, **chosen})
    differing += recipe_differences(info, made_of) if made_of else []
    if differing:
        raise SpecMismatch(
            f"{directory.uri} holds a run of another specification ({'; '.join(differing)}); use the stored values with --at"
        )


def is_of_this_record(spec: RunSpec, directory: RunDirectory) -> bool:
    """Whether a run as of a moment still has the weights of the record that it is of."""
    assert spec.at is not None
    if directory.manifest(RECORD, TRAJECTORY) is None:
        return True
    parent = RunDirectory(recorded_at(directory.uri, spec.at))
    own, other = (
        open_trajectory(place.path(layout.TRAJECTORY), place.vouched) for place in (directory, parent)
    )
    k = other.checkpoint_steps.tolist().index(spec.at)
    return bool((own.checkpoint(-1).weights == other.checkpoint(k).weights).all())
