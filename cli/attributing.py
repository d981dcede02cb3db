"""The command ``attribute``, and the options by which ``run`` adds estimators too."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ..storage.errors import SpecError
from .headings import HeadedCommand
from .options import debug_option, format_option, quiet_option
from .output import emit_json, emit_tables
from .progress import watching
from .spec_options import OF_THE_RUN, PLACEMENT, pick, recipe_argument
from .views import summary_tables

F = TypeVar("F", bound=Callable[..., Any])
Methods = dict[str, dict[str, Any]]


def estimator_options(more: str = "") -> Callable[[F], F]:
    """Return what adds ``--method`` and ``--option``.

    Args:
        more: What else ``--option`` is for.
    """

    def add(function: F) -> F:
        function = click.option(
            "--option",
            "estimator_options",
            multiple=True,
            metavar="[NAME.]KEY=VALUE",
            help=f"Option of the estimators that have it, or of NAME alone; repeatable. {more}".strip(),
        )(function)
        return click.option(
            "--method",
            "estimators",
            multiple=True,
            metavar="NAME",
            help="Estimator to add beside HyDRA, such as influence-cg, tracin, relatif; repeatable. "
            "docs/estimators.md has them all.",
        )(function)

    return add


def read_methods(names: Sequence[str], pairs: Sequence[str]) -> Methods:
    """Return checked options by estimator.

    Raises:
        SpecError: An unknown estimator or option, or a wrong value.
    """
    if not names:
        if pairs:
            raise click.UsageError(f"--option {pairs[0]}: needs a --method that has it")
        return {}
    from ..workers.estimators import make, option_names

    known = {name: option_names(name) for name in dict.fromkeys(names)}
    found: Methods = {name: {} for name in known}
    for pair in pairs:
        left, equals, text = pair.partition("=")
        method, _, key = left.rpartition(".")
        if not equals or not key:
            raise click.UsageError(f"--option {pair}: write KEY=VALUE or NAME.KEY=VALUE")
        if method and method not in known:
            raise SpecError(f"--option {pair}: there is no --method {method}; add it, or leave it out")
        takers = [method] if method else [name for name in known if key in known[name]]
        if not takers:
            if len(known) == 1:
                make(next(iter(known)), {key: text})  # says which options there are
            raise SpecError(
                f"--option {pair}: none of {', '.join(known)} has an option {key!r}; see docs/estimators.md"
            )
        for name in takers:
            found[name][key] = _scalar(text)
    for name, options in found.items():
        make(name, options)
    return found


def _scalar(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, (list, dict)) else value


@click.command(cls=HeadedCommand, short_help="Add estimators' contributions to RUN.")
@click.argument("run")
@recipe_argument
@estimator_options()
@click.option("--overwrite", is_flag=True, help="Do a method again whose options differ from RUN's.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="Do so for K seeds and average: NAME-seedsK. Records that are missing are made.",
)
@pick((*PLACEMENT, "memory"), of_the_run=OF_THE_RUN)
@format_option("table", "json")
@quiet_option
@debug_option
def attribute(
    run: str,
    recipe: str | None,
    estimators: tuple[str, ...],
    estimator_options: tuple[str, ...],
    overwrite: bool,
    seeds: int,
    output_format: str,
    quiet: bool,
    **placement: Any,
) -> None:
    """Add the contributions of other estimators to RUN, beside HyDRA's.

    RUN must hold its record and test gradients. RECIPE is needed where it is not a built-in one: what
    a stored run names is never imported unasked. The same command again resumes.

    Example: hydra-pipe attribute runs/digits --method influence-cg --option damping=0.1
    """
    if not estimators:
        raise click.UsageError("name an estimator with --method, such as --method influence-cg")
    methods = read_methods(estimators, estimator_options)
    from ..pipeline.drive.attribute import attribute as add
    from ..pipeline.spec.spec import averaged

    with watching(quiet) as observer:
        finished = add(run, methods, recipe, observer=observer, overwrite=overwrite, seeds=seeds, **placement)
    last = list(methods)[-1]
    found = finished.summary(averaged(last, seeds) if seeds > 1 else last)
    if output_format == "json":
        emit_json(found)
    else:
        emit_tables(*summary_tables(found))
