"""The specification of a stored run, for going on with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ...storage.errors import CorruptStore, InputError, RunNotFound, SpecError, SpecMismatch
from ...workers.recipe import Recipe
from ...workers.recipes import BUILT_IN
from ..reading.reader import Reader, open_reader
from ..spec.groups import FILES, KEPT, ExecutionSpec, TrainingSpec
from ..spec.setting import Decides, names
from ..spec.spec import RunSpec
from ..vocabulary import ADJOINT, REDUCE, REPLAY, SAMPLES
from .compatibility import begun, stored_options
from .survey import resolve_recipe
from .untrained import check_command

PLACEMENT = names(ExecutionSpec, Decides.NOTHING)
"""Fields of ``RunSpec`` that say where the work is done and not what comes out."""

REPEATED = ("recipe", "recipe_args", "device", "threads")
"""What may be named otherwise where training must give the recorded weights again in any case."""

STAGES = (REPLAY, REDUCE)
"""Commands that do a stage of a run which is there."""


def stage_spec(given: Mapping[str, Any], *, command: str) -> RunSpec:
    """Return the specification of one more stage of a run that is there.

    What the run has fixed comes from the run, and the mode and curvature of a method that was begun too.

    Args:
        given: Fields of ``RunSpec``. Those that the run has fixed must agree with it.
        command: Which of ``STAGES``.

    Raises:
        RunNotFound: There is no run.
        InputError: The recipe is not built in and has to be named.
        SpecMismatch: What is given is not what the run was made with.
    """
    recipe, out = given.get("recipe"), given.get("out")
    if out is None:
        named = {name: given[name] for name in ("recipe", "recipe_args") if given.get(name) is not None}
        out = f"runs/{resolve_recipe(TrainingSpec(**named)).name}"
    try:
        run = open_reader(out)
    except RunNotFound:
        raise RunNotFound(
            f"no run at {out}: {command} goes on with one that is recorded; "
            f"run `hydra-pipe record --out {out}` first, or correct --out"
        ) from None
    placed = {name: value for name, value in given.items() if name in (*PLACEMENT, *FILES)}
    spec = stored_spec(run, recipe, placed, command=command)
    own = {k: v for k, v in given.items() if k not in (*PLACEMENT, *FILES, "recipe", "out", "overwrite")}
    if "recipe_args" in own:
        own["recipe_args"] = {**spec.recipe_args, **own["recipe_args"]}
    # The mode that fits all targets, and nothing that it would refuse.
    asked = replace(spec, **{**own, "mode": ADJOINT, "project": None, "store_dtype": None})
    before = begun(run.noted, asked.base_method)
    kept: dict[str, Any] = {"mode": before.mode} if before and before.mode else {}
    if before and before.store_dtype:
        kept["store_dtype"] = before.store_dtype
    if before and before.segments:
        kept["segments"] = before.segments
    if command == REDUCE and asked.targets != SAMPLES:
        kept.setdefault("mode", ADJOINT)  # the only one; that it was not replayed is said later
    options = stored_options(asked, run.noted)
    kept |= options.as_fields() if options is not None else {}
    spec = replace(spec, **{**kept, **own})
    differing = spec.differences(run.noted.identity)
    if differing:
        raise SpecMismatch(
            f"{run.uri}: {command} goes on with a run of another specification ({'; '.join(differing)}); "
            "leave these options out, they are read from the run"
        )
    return spec


def stored_spec(
    run: Reader,
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
    identity = dict(run.noted.identity)
    check_command(identity, run.uri, command)
    reference = str(identity.get("recipe", ""))
    if recipe is None:
        if reference not in BUILT_IN:
            typed = f"{run.uri} {reference or 'RECIPE'}"
            if command in STAGES:
                typed = f"{reference or 'RECIPE'} --out {run.uri}"
            raise InputError(
                f"the recipe {reference!r} of {run.uri} is not imported unasked, since it is code that a stored "
                f"run names; name it yourself: hydra-pipe {command} {typed}"
            )
        recipe = reference
    allowed = (*PLACEMENT, *FILES, *(name for name in free if name != "recipe"))
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise SpecError(f"{unknown[0]} is the run's own and cannot be chosen; {', '.join(allowed)} can")
    values = {name: identity[name] for name in names(RunSpec, Decides.RUN) if name in identity}
    if not isinstance(values.get("recipe_args", {}), Mapping):
        raise CorruptStore(
            f"{run.uri}/run.json: identity.recipe_args is {values['recipe_args']!r:.60} and must be a mapping; "
            "restore the file"
        )
    spoken = run.noted.spec
    values |= {name: spoken[name] for name in KEPT if spoken.get(name) is not None}
    values |= {name: spoken.get(name) for name in FILES if name in identity}
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
