"""The specification of a stored run, for going on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..storage.errors import InputError, SpecError, SpecMismatch
from ..workers.recipe import Recipe
from ..workers.recipes import BUILT_IN
from .handle import Run
from .spec import RunSpec

PLACEMENT = (
    "executor",
    "address",
    "workers",
    "gpus_per_actor",
    "cpus_per_actor",
    "memory",
    "max_attempts",
    "start_timeout",
)
"""Fields of ``RunSpec`` that say where the work is done and not what comes out."""


def spec_of(run: Run, recipe: Recipe | str | None, placement: Mapping[str, Any]) -> RunSpec:
    """Return the specification of a stored run, to go on with it.

    What decides its numbers comes from ``run.json``; where the work is done does not, since a run
    that came from elsewhere must not choose the machines that get our code.

    Raises:
        InputError: The recipe is not built in and has to be named.
        SpecMismatch: Another recipe than the run's is named.
    """
    identity = dict(run.info.get("identity", {}))
    reference = str(identity.get("recipe", ""))
    if recipe is None:
        if reference not in BUILT_IN:
            raise InputError(
                f"the recipe {reference!r} of {run.uri} is not imported unasked, since it is code that a "
                f"stored run names; name it yourself: hydra-pipe attribute {run.uri} {reference or 'RECIPE'}"
            )
        recipe = reference
    names = {field.name for field in fields(RunSpec)}
    values = {name: value for name, value in identity.items() if name in names}
    if not isinstance(recipe, str):
        del values["recipe_args"]
    unknown = [name for name in placement if name not in PLACEMENT]
    if unknown:
        raise SpecError(f"{unknown[0]} is the run's own and cannot be chosen; {', '.join(PLACEMENT)} can")
    spoken = run.info.get("spec", {})
    values |= {k: spoken[k] for k in ("executor", "cpus_per_actor") if spoken.get(k) is not None}
    values |= {name: value for name, value in placement.items() if value is not None}
    spec = RunSpec(**{**values, "recipe": recipe, "out": run.uri})
    differing = spec.differences(identity)
    if differing:
        raise SpecMismatch(
            f"{run.uri} was made with another specification ({'; '.join(differing)}); "
            "name the recipe it was made from"
        )
    return spec
