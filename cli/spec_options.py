"""The RECIPE argument and the options of a run, who takes which, and how they become a `RunSpec`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ..pipeline.spec.groups import KEPT, BudgetSpec, CurvatureSpec, PlacementSpec
from ..pipeline.spec.method_options import CURVATURE_FIELDS
from ..pipeline.spec.setting import Decides, names
from ..pipeline.spec.spec import RunSpec, load_toml
from .option_table import SPEC_OPTIONS

F = TypeVar("F", bound=Callable[..., Any])

PLACEMENT = names(PlacementSpec, Decides.NOTHING)
"""Options that say where the work is done."""

BUDGET = names(BudgetSpec, Decides.NOTHING)
"""What the work may use there."""

CURVATURE = CURVATURE_FIELDS
"""Given by ``--option`` and in files. Options of their own too, which ``--help`` does not show."""

METHOD = tuple(name for name in names(RunSpec, Decides.METHOD) if name != "segments")
"""What `replay` chooses; the record is the same whatever these are. (It keeps more states for segments.)"""

ELSEWHERE = ("at_checkpoint",)
"""Fields that a run may have and that another command is for: `attribute`."""

OF_THE_RUN = (*KEPT, *names(PlacementSpec, Decides.RUN))
"""Options that the run's own values stand for, where there is a run."""


def field_of(option: Callable[[Any], Any]) -> str:
    """Return the field of `RunSpec` that an option is for, or ``config``."""

    def probe() -> None: ...

    return str(option(probe).__click_params__[-1].name)


def pick(
    shown: Collection[str],
    *,
    hidden: Collection[str] = (),
    of_the_run: Collection[str] = (),
    only_with: str = "",
) -> Callable[[F], F]:
    """Return what adds some of the options, in their order, to a command.

    Args:
        shown: Fields of the options.
        hidden: Fields of options that are understood and that ``--help`` does not show.
        of_the_run: Fields whose default is the value of the run that the command is about.
        only_with: What the help begins with, such as ``With --every``.
    """

    def add(function: F) -> F:
        for option in reversed(SPEC_OPTIONS):
            name = field_of(option)
            if name not in shown and name not in hidden:
                continue
            function = option(function)
            added = function.__click_params__[-1]  # type: ignore[attr-defined]
            added.hidden = name not in shown
            if name in of_the_run:
                added.help = re.sub(r"\[default: .*\]$", "[default: the run's]", added.help)
            if only_with:
                first = added.help[0] if added.help[1].isupper() else added.help[0].lower()
                added.help = f"{only_with}: {first}{added.help[1:]}"
        return function

    return add


recipe_argument = click.argument("recipe", required=False, metavar="[RECIPE]")

_FIELDS = [field_of(option) for option in SPEC_OPTIONS]


def spec_options(function: F) -> F:
    """Add the RECIPE argument and every option of a `RunSpec`; those of the curvature are hidden."""
    hidden = (*CURVATURE, *ELSEWHERE)
    return recipe_argument(pick([name for name in _FIELDS if name not in hidden], hidden=hidden)(function))


def record_options(function: F) -> F:
    """Add what decides a record, and where it is made."""
    hidden = (*METHOD, *ELSEWHERE)
    return recipe_argument(pick([name for name in _FIELDS if name not in hidden], hidden=hidden)(function))


def stage_options(*own: str) -> Callable[[F], F]:
    """Return what adds the options of a stage that goes on with a stored run.

    What the run has fixed need not be given. It still may be, hidden, and then has to agree.

    Args:
        own: Fields that this stage chooses, beside where it works.
    """
    shown = {"out", "seeds", "config", *own, *PLACEMENT, *BUDGET}
    hidden = [name for name in _FIELDS if name not in shown and name != "overwrite"]

    def add(function: F) -> F:
        return recipe_argument(pick(shown, hidden=hidden, of_the_run=OF_THE_RUN)(function))

    return add


def given_values(ctx: click.Context, pairs: Sequence[str] = ()) -> dict[str, Any]:
    """Join configuration file and command line (which wins) to fields of a specification.

    Args:
        ctx: The command's context.
        pairs: Words ``KEY=VALUE`` of ``--option``, KEY being one of ``CURVATURE``.

    Raises:
        SpecError: A key of the file is wrong.
        click.UsageError: A field is given as an option and by ``--option``.
    """
    known = names(RunSpec)
    config = ctx.params.get("config")
    values: dict[str, Any] = dict(load_toml(config)) if config else {}
    given = {
        name: value
        for name, value in ctx.params.items()
        if name in known and ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)
    }
    arguments = given.pop("recipe_args", ())
    for pair in pairs:
        key, _, text = pair.partition("=")
        name = key.replace("-", "_")
        if name in given:
            raise click.UsageError(f"--option {pair}: {key} is given twice; keep one")
        given[name] = int(text) if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text) else text
    values |= given
    if arguments:
        values["recipe_args"] = {**values.get("recipe_args", {}), **parse_pairs(arguments)}
    return values


def build_spec(ctx: click.Context, pairs: Sequence[str] = ()) -> RunSpec:
    """Return the specification that configuration file and command line come to; see `given_values`.

    Raises:
        SpecError: A value, or a key of the file, is wrong.
    """
    return RunSpec(**given_values(ctx, pairs))


def hidden_given(ctx: click.Context) -> list[str]:
    """Return the options on the command line that ``--help`` does not show."""
    return [
        parameter.opts[-1]
        for parameter in ctx.command.params
        if isinstance(parameter, click.Option)
        and parameter.hidden
        and ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]


def curvature_pairs(pairs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the words of ``--option`` into those of the curvature and those of estimators."""
    own = [pair for pair in pairs if pair.partition("=")[0].replace("-", "_") in CURVATURE and "=" in pair]
    return own, [pair for pair in pairs if pair not in own]


def curvature_option(function: F) -> F:
    """Add ``--option`` where there are no estimators that it could be for."""

    def check(ctx: click.Context, parameter: click.Parameter, pairs: tuple[str, ...]) -> tuple[str, ...]:
        for pair in curvature_pairs(pairs)[1]:
            known = ", ".join(name.replace("_", "-") for name in CURVATURE)
            raise click.BadParameter(f"{pair}: write KEY=VALUE, KEY being one of {known}")
        return pairs

    return click.option(
        "--option",
        "curvature_options",
        multiple=True,
        callback=check,
        metavar="KEY=VALUE",
        help=f"How curvature is estimated; repeatable. {CURVATURE_HELP}",
    )(function)


CURVATURE_HELP = (
    f"With --hessian ekfac: curvature-checkpoints=N of the record ({CurvatureSpec.curvature_checkpoints}), or "
    "curvature-at=STEP,... for those nearest; curvature-samples=N training samples at most "
    f"({CurvatureSpec.curvature_samples}); curvature-core=C leading coordinates with their full curvature "
    f"({CurvatureSpec.curvature_core}); curvature-flat=S: eigenvalues that change no coefficient by more than this "
    f"share are 0 ({CurvatureSpec.curvature_flat}). With --hessian mixed: curvature-share=S of the Hessian "
    f"({CurvatureSpec.curvature_share})."
)


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` words; a value that is a JSON scalar or list is one, anything else is a string.

    Raises:
        click.UsageError: A word has no ``=``, or a value begins like a list and is none.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise click.UsageError(f"--set {pair}: write KEY=VALUE, KEY being a Python name")
        try:
            value = json.loads(text, parse_constant=_no_scalar)
        except ValueError as error:
            if text.lstrip().startswith("["):
                raise click.UsageError(
                    f"--set {pair}: {text} begins like a list and is not JSON ({error}); write {key}=[1,2] or "
                    f'{key}=["a","b"], or quote text: {key}="[..."'
                ) from None
            value = text
        found[key] = text if isinstance(value, dict) else value
    return found


def _no_scalar(text: str) -> None:
    # NaN and Infinity are no JSON, though Python reads them: they stay strings.
    raise ValueError(f"{text} is none")
