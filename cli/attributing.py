"""The command ``attribute``, and the options by which ``run`` adds estimators too."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ..storage.errors import SpecError
from .options import debug_option, format_option, quiet_option
from .output import emit_json, emit_tables
from .progress import watching
from .views import summary_tables

F = TypeVar("F", bound=Callable[..., Any])
Methods = dict[str, dict[str, Any]]


def estimator_options(function: F) -> F:
    """Add ``--method`` and ``--option``."""
    function = click.option(
        "--option",
        "estimator_options",
        multiple=True,
        metavar="[NAME.]KEY=VALUE",
        help="Option of the estimators that have it, or of NAME alone; repeatable.",
    )(function)
    return click.option(
        "--method",
        "estimators",
        multiple=True,
        metavar="NAME",
        help="Estimator to add beside HyDRA, such as influence-cg, tracin, relatif; repeatable. "
        "docs/estimators.md has them all.",
    )(function)


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


@click.command(short_help="Add estimators' contributions to RUN.")
@click.argument("run")
@click.argument("recipe", required=False, metavar="[RECIPE]")
@estimator_options
@click.option("--overwrite", is_flag=True, help="Do a method again whose options differ from RUN's.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="Do so for K seeds and average: NAME-seedsK. Records that are missing are made.",
)
@click.option("--executor", type=click.Choice(["ray", "serial"]), help="Where blocks run.  [default: RUN's]")
@click.option("--address", metavar="ADDRESS", help="Ray cluster to use, as for run.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Actors at a time.")
@click.option("--gpus-per-actor", type=click.FloatRange(min=0), metavar="X", help="GPUs an actor asks for.")
@click.option(
    "--cpus-per-actor", type=click.FloatRange(min=0), metavar="X", help="CPU cores an actor asks for."
)
@click.option("--memory", metavar="SIZE", help="Memory an actor may use, such as 4GiB.  [default: measured]")
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
    from ..pipeline.attribute import attribute as add
    from ..pipeline.spec import averaged

    with watching(quiet) as observer:
        finished = add(run, methods, recipe, observer=observer, overwrite=overwrite, seeds=seeds, **placement)
    last = list(methods)[-1]
    found = finished.summary(averaged(last, seeds) if seeds > 1 else last)
    if output_format == "json":
        emit_json(found)
    else:
        emit_tables(*summary_tables(found))
