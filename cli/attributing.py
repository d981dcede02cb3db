"""The command ``attribute``, and the options by which ``run`` adds estimators too."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..storage.errors import SpecError
from .headings import HeadedCommand
from .options import debug_option, format_option, quiet_option
from .output import emit_json, emit_tables
from .progress import watching
from .spec_options import OF_THE_RUN, PLACEMENT, given_values, pick, recipe_argument
from .views import summary_tables

if TYPE_CHECKING:
    from ..pipeline.opened_run import Run

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


CHECKPOINT = ("out", "track", "test", "dtype", "recipe_args", "threads", "device")
"""Options that say what a run of a trained model is; where there is a run, it has fixed them."""


@click.command(cls=HeadedCommand, short_help="Add estimators' contributions to RUN.")
@click.argument("run")
@recipe_argument
@estimator_options()
@click.option("--overwrite", is_flag=True, help="Do a method again whose options differ from RUN's.")
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    metavar="K",
    help="Do so for K seeds and average: NAME-seedsK. Records that are missing are made.",
)
@pick(("at_checkpoint",))
@click.option(
    "--at",
    type=click.IntRange(min=1),
    metavar="STEP",
    help="Do so as of a checkpoint of RUN's record, as if training had ended there: to the run RUN-at-STEP.",
)
@pick(CHECKPOINT, only_with="With --at-checkpoint")
@pick((*PLACEMENT, "memory"), of_the_run=OF_THE_RUN)
@format_option("table", "json")
@quiet_option
@debug_option
@click.pass_context
def attribute(
    ctx: click.Context,
    /,
    run: str,
    recipe: str | None,
    estimators: tuple[str, ...],
    estimator_options: tuple[str, ...],
    overwrite: bool,
    seeds: int,
    at: int | None,
    output_format: str,
    quiet: bool,
    **placement: Any,
) -> None:
    """Add the contributions of other estimators to RUN, beside HyDRA's.

    RUN must hold its record and test gradients. RECIPE is needed where it is not a built-in one: what
    a stored run names is never imported unasked. The same command again resumes.

    With --at-checkpoint there is no RUN yet: the first word is RECIPE, and the run at --out is made from
    the weights of a model that is trained already, for estimators that need no more.

    Example: hydra-pipe attribute runs/digits --method influence-cg --option damping=0.1
    """
    if not estimators:
        raise click.UsageError("name an estimator with --method, such as --method influence-cg")
    given = given_values(ctx)
    fixed = {name: placement.pop(name) for name in ("at_checkpoint", *CHECKPOINT)}
    if fixed["at_checkpoint"] is not None:
        if recipe is not None:
            raise click.UsageError(
                f"{recipe}: with --at-checkpoint the one word is RECIPE; the run goes to --out"
            )
        from ..pipeline.plan.untrained import check_methods
        from ..pipeline.run import attribute_checkpoint
        from ..pipeline.spec.spec import RunSpec

        check_methods(dict.fromkeys(estimators))
        methods = read_methods(estimators, estimator_options)
        spec = RunSpec(**{**given, "recipe": run})
        with watching(quiet) as observer:
            finished = attribute_checkpoint(spec, methods, observer=observer)
        _show(finished, list(methods)[-1], output_format)
        return
    unused = next((name for name in CHECKPOINT if name in given), None)
    if unused is not None:
        raise click.UsageError(
            f"--{unused.replace('_', '-')}: RUN has fixed it; only with --at-checkpoint it is asked"
        )
    methods = read_methods(estimators, estimator_options)
    if at is not None:
        if seeds > 1:
            raise click.UsageError(
                f"--seeds {seeds}: one training has the checkpoint --at {at}; leave --seeds out"
            )
        from ..pipeline.run import attribute_at

        with watching(quiet) as observer:
            finished = attribute_at(
                run, at, methods, recipe, observer=observer, overwrite=overwrite, **placement
            )
        _show(finished, list(methods)[-1], output_format)
        return
    from ..pipeline.drive.attribute import attribute as add
    from ..pipeline.spec.spec import averaged

    with watching(quiet) as observer:
        finished = add(run, methods, recipe, observer=observer, overwrite=overwrite, seeds=seeds, **placement)
    last = list(methods)[-1]
    _show(finished, averaged(last, seeds) if seeds > 1 else last, output_format)


def _show(finished: Run, method: str, output_format: str) -> None:
    found = finished.summary(method)
    if output_format == "json":
        emit_json(found)
    else:
        emit_tables(*summary_tables(found))
