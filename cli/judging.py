"""The commands that judge a run's methods: compare (with each other), evaluate (with retraining)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource

from .by_epoch import OWN, by_epoch_options, compare_by_epoch
from .headings import HeadedCommand
from .judging_views import COMPARED, LDS, comparison_tables, evaluation_rows, evaluation_tables
from .options import MANY, SEED, check_option, debug_option, format_option, quiet_option
from .output import emit_csv, emit_json, emit_tables
from .progress import reading, watching
from .spec_options import OF_THE_RUN, PLACEMENT, parse_pairs, pick

WHERE = (*PLACEMENT, "threads", "device")
"""Options of ``run`` that say where the work is done; the others are those of the record."""

SPOKEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
"""Where a value comes from that the user gave."""


def placed(ctx: click.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a command was told of `WHERE`, and the recipe's arguments; what it was not told is the run's."""
    given = {
        name: options[name] for name in WHERE if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if options["recipe_args"]:
        given["recipe_args"] = parse_pairs(options["recipe_args"])
    return given


_run_argument = click.argument("run")
_figures = click.option(
    "--figures", type=click.Path(file_okay=False), metavar="DIR", help="Also draw pictures (PNG) into DIR."
)


def _names(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


_methods = click.option(
    "--methods",
    callback=_names,
    metavar="A,B,...",
    help="Methods to look at.  [default: all that are complete]",
)


@click.command(cls=HeadedCommand, short_help="Compare the methods of RUN with each other.")
@_run_argument
@click.option("--reference", metavar="METHOD", help="What to compare with.  [default: hydra-exact]")
@_methods
@click.option("-k", type=MANY, default=10, show_default=True, metavar="K", help="Samples in the overlaps.")
@_figures
@by_epoch_options
@check_option
@format_option("table", "json", "csv")
@quiet_option
@debug_option
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    run: str,
    reference: str | None,
    methods: list[str] | None,
    k: int,
    figures: str | None,
    check: bool,
    output_format: str,
    quiet: bool,
    **given: Any,
) -> None:
    """Compare the methods of RUN with a reference: signs, ranks, sizes, extremes, cost.

    Memory stays bounded however many contributions there are. CSV has one row a method.

    With --every E the tracked samples are followed through training instead, and every E epochs the
    forms are held against the exact one as if training had ended there: error of the hypergradients,
    signs, ranks. That replays the training, RUN needs its record alone, and RECIPE is what RUN was made
    from (it can be left out for a built-in one). CSV has one row a (epoch, reference, method).

    Example: hydra-pipe compare runs/digits --reference hydra
    """
    spoken = [p for p in ctx.command.params if ctx.get_parameter_source(p.name or "") in SPOKEN]
    for parameter in spoken:
        flag = parameter.opts[-1] if parameter.opts[-1].startswith("-") else "RECIPE"
        if given["every"] is None and parameter.name in OWN:
            raise click.UsageError(f"{flag}: only with --every")
        if given["every"] is not None and parameter.name in ("reference", "k", "check"):
            raise click.UsageError(f"{flag}: not with --every, which compares with the exact form")
    if given["every"] is not None:
        compare_by_epoch(
            run,
            methods=methods,
            figures=figures,
            output_format=output_format,
            quiet=quiet,
            given=given,
        )
        return
    from ..pipeline.compare.compare import compare as look
    from ..pipeline.compare.figures import check_figures, comparison_figures
    from ..pipeline.opened_run import open_run

    if figures is not None:
        check_figures(figures)
    opened = open_run(run, check=check)
    with reading("comparing", quiet, unit="targets") as move:
        found = look(opened, reference=reference, methods=methods, k=k, progress=move)
    files = comparison_figures(opened, found, figures) if figures is not None else []
    if output_format == "json":
        emit_json({**found, "figures": files})
    elif output_format == "csv":
        emit_csv(COMPARED, found["methods"])
    else:
        emit_tables(*comparison_tables(found), *(f"wrote {name}" for name in files))


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    if value.strip().lower() == "none":
        return ()
    try:
        return tuple(dict.fromkeys(float(word) for word in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r}: write numbers with commas between, or none") from None


@click.command(cls=HeadedCommand, short_help="Retrain to measure which method of RUN to trust.")
@_run_argument
@click.argument("recipe", required=False, metavar="[RECIPE]")
@_methods
@click.option(
    "--subsets", default=120, show_default=True, metavar="N", help="Random subsets a fraction; 0: none."
)
@click.option(
    "--fractions",
    default="0.5,0.9,0.99",
    show_default=True,
    callback=_numbers,
    metavar="F,...",
    help="Shares of the tracked samples that subsets keep.",
)
@click.option(
    "--subset-seed", type=SEED, default=0, show_default=True, metavar="N", help="Of every random choice here."
)
@click.option(
    "--retraining",
    type=click.Choice(["rescaled", "weighted", "subset"]),
    default="rescaled",
    show_default=True,
    help="rescaled: the recorded steps, removed samples count 0 and the others N / (N - removed). "
    "weighted: the others count 1. subset: trained from scratch on what is left, in new batches.",
)
@click.option(
    "--leave-one-out", default=0, show_default=True, metavar="N", help="Remove N single samples, too."
)
@click.option(
    "--remove",
    default="0.02,0.1,0.3",
    show_default=True,
    callback=_numbers,
    metavar="F,...|none",
    help="Removal curves: shares of the most helpful and of the most harmful samples to remove.",
)
@click.option(
    "--perturb",
    default="0.03,0.1,0.3",
    show_default=True,
    callback=_numbers,
    metavar="S,...|none",
    help="Sizes of random changes of all sample weights; S is as large as removing a share of S*S.",
)
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    metavar="K",
    help="Retrain with K seeds of a run made with --seeds, and score against their mean loss.",
)
@_figures
@pick((*WHERE, "recipe_args"), of_the_run=OF_THE_RUN)
@format_option("table", "json", "csv")
@quiet_option
@debug_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    run: str,
    recipe: str | None,
    methods: list[str] | None,
    figures: str | None,
    output_format: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Train again without random subsets of samples, and score every method of RUN by what happens.

    RECIPE is what RUN was made from; it can be left out for a built-in one. It is your code and is
    never imported because a stored run names it. The retrainings are kept in RUN: the same
    command continues, and methods added later are scored by them. CSV has one row a
    (fraction, method) with the linear datamodelling score.

    Example: hydra-pipe evaluate runs/digits --subsets 40 --leave-one-out 20 --executor serial
    """
    from ..pipeline.compare.figures import check_figures, evaluation_figures
    from ..pipeline.evaluate.evaluate import Questions
    from ..pipeline.evaluate.evaluate import evaluate as measure

    if figures is not None:
        check_figures(figures)
    questions = Questions(
        methods=methods,
        subsets=options["subsets"],
        fractions=options["fractions"],
        seed=options["subset_seed"],
        retraining=options["retraining"],
        leave_one_out=options["leave_one_out"],
        remove=options["remove"],
        perturb=options["perturb"],
        seeds=options["seeds"],
    )
    given = placed(ctx, options)
    with watching(quiet) as observer:
        found = measure(run, recipe, questions=questions, observer=observer, **given)
    files = evaluation_figures(found, figures) if figures is not None else []
    if output_format == "json":
        emit_json({**found, "figures": files})
    elif output_format == "csv":
        emit_csv(LDS, evaluation_rows(found))
    else:
        emit_tables(*evaluation_tables(found), *(f"wrote {name}" for name in files))
