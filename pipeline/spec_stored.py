"""The specification of a stored run, for going on with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

REPEATED = ("recipe", "recipe_args", "device", "threads")
"""What may be named otherwise where training must give the recorded weights again in any case."""


def stored_spec(
    run: Run,
    recipe: Recipe | str | None,
    given: Mapping[str, Any],
    *,
    command: str,
    free: Collection[str] = (),
) -> RunSpec:
    """Return the specification of a stored run, to go on with it.

    What decides its numbers comes from ``run.json``; where the work is done does not, since a run
    that came from elsewhere must not choose the machines that get our code.

    Args:
        run: The run.
        recipe: What it was made from. Needed unless that is built in: code that a stored run names
            is never imported unasked.
        given: Fields of ``RunSpec`` the caller chooses, of ``PLACEMENT`` and ``free``; None: not given.
        command: What is being done, for the message that asks for the recipe.
        free: Fields that may differ from the run's, ``REPEATED`` or none.

    Raises:
        InputError: The recipe is not built in and has to be named.
        SpecError: A field is given that is the run's own.
        SpecMismatch: What is named is not what the run was made from.
    """
    identity = dict(run.info.get("identity", {}))
    reference = str(identity.get("recipe", ""))
    if recipe is None:
        if reference not in BUILT_IN:
            raise InputError(
                f"the recipe {reference!r} of {run.uri} is not imported unasked, since it is code that a stored "
                f"run names; name it yourself: hydra-pipe {command} {run.uri} {reference or 'RECIPE'}"
            )
        recipe = reference
    allowed = (*PLACEMENT, *(name for name in free if name != "recipe"))
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise SpecError(f"{unknown[0]} is the run's own and cannot be chosen; {', '.join(allowed)} can")
    names = {field.name for field in fields(RunSpec)}
    values = {name: value for name, value in identity.items() if name in names}
    spoken = run.info.get("spec", {})
    values |= {k: spoken[k] for k in ("executor", "cpus_per_actor") if spoken.get(k) is not None}
    chosen = {name: value for name, value in given.items() if value is not None}
    if isinstance(recipe, str):
        arguments = {**values.pop("recipe_args", {}), **chosen.pop("recipe_args", {})}
        chosen["recipe_args"] = arguments
    else:
        values.pop("recipe_args", None)
    spec = RunSpec(**{**values, **chosen, "recipe": recipe, "out": run.uri})
    asked = spec.identity()
    differing = spec.differences({**identity, **{name: asked[name] for name in free}})
    if differing:
        raise SpecMismatch(
            f"{run.uri} was made with another specification ({'; '.join(differing)}); "
            "name the recipe it was made from"
        )
    return spec
