"""The commands that decide upon a run's samples: detect."""

from __future__ import annotations

from typing import Any

import click

from .deciding_views import DETECTED, detection_rows, detection_tables
from .headings import HeadedCommand
from .judging import WHERE, placed
from .options import MANY, SEED, debug_option, format_option, quiet_option
from .output import emit_csv, emit_json, emit_tables
from .progress import watching
from .spec_options import OF_THE_RUN, pick

_run_argument = click.argument("run")


@click.command(cls=HeadedCommand, short_help="Rank the suspicious training samples of RUN.")
@_run_argument
@click.argument("recipe", required=False, metavar="[RECIPE]")
@click.option(
    "--by",
    multiple=True,
    metavar="NAME|all",
    help="Detector; repeatable. all: every one that RUN can serve.  [default: the best that needs no choice]",
)
@click.option(
    "--method",
    metavar="NAME",
    help="Estimator whose contributions are looked at.  [default: hydra, or the only one]",
)
@click.option(
    "--split",
    is_flag=True,
    help="Look at one half of the test samples, stratified; the other is kept for judging what is decided.",
)
@click.option("--split-seed", default=0, show_default=True, metavar="N", help="Which half.")
@click.option(
    "--layer",
    default="last",
    show_default=True,
    metavar="last|all|NAME",
    help="outlier-gradient: whose gradients.",
)
@click.option(
    "--scorer",
    default="l2",
    show_default=True,
    metavar="l1|l2|iforest",
    help="outlier-gradient: what an outlier is.",
)
@click.option("--per-class", is_flag=True, help="outlier-gradient: within each given class.")
@click.option(
    "--normalise",
    default="none",
    show_default=True,
    metavar="none|unit",
    help="outlier-gradient: length of the gradients.",
)
@click.option(
    "--rows",
    default="gradients",
    show_default=True,
    metavar="gradients|hypergradients",
    help="outlier-gradient: what is looked at; hypergradients are those stored in RUN.",
)
@click.option(
    "--clusters",
    default="kmeans",
    show_default=True,
    metavar="kmeans|average",
    help="cluster: how each class is parted.",
)
@click.option(
    "--wrong-cluster",
    default="harm",
    show_default=True,
    metavar="harm|smaller|contribution",
    help="cluster: which part is called wrong: that of more harm, the smaller, or that of lower contribution to its "
    "own class.",
)
@click.option("--neighbours", type=MANY, default=10, show_default=True, metavar="K", help="knn: how many.")
@click.option(
    "--seed", type=SEED, default=0, show_default=True, metavar="N", help="Of every random choice here."
)
@click.option(
    "--flag",
    default="auto",
    show_default=True,
    metavar="RULE",
    help="How many are flagged: known (share), two-means, mixture, confident, none. auto: known where the share of "
    "wrong labels is, else none.",
)
@click.option("--share", type=float, metavar="R", help="Share of wrong labels, for known.")
@click.option(
    "--truth",
    metavar="FILE",
    help="Wrong samples, one train_index a line, to measure by.  [default: the recipe's label noise]",
)
@click.option(
    "-k", default=10, show_default=True, type=click.IntRange(1, 10**7), metavar="K", help="Samples shown."
)
@click.option(
    "--to", type=click.Path(), metavar="FILE.csv|FILE.parquet", help="Also write all rows into a file."
)
@click.option("--overwrite", is_flag=True, help="With --to: replace the file if it exists.")
@click.option(
    "--figures", type=click.Path(file_okay=False), metavar="DIR", help="Also draw pictures (PNG) into DIR."
)
@pick((*WHERE, "recipe_args"), of_the_run=OF_THE_RUN)
@format_option("table", "json", "csv")
@quiet_option
@debug_option
@click.pass_context
def detect(
    ctx: click.Context,
    /,
    run: str,
    recipe: str | None,
    by: tuple[str, ...],
    k: int,
    to: str | None,
    overwrite: bool,
    figures: str | None,
    output_format: str,
    quiet: bool,
    **given: Any,
) -> None:
    """Rank the training samples of RUN by how suspicious they are, and keep the rankings in RUN.

    RECIPE is what RUN was made from; it can be left out for a built-in one, and for detectors that
    only read what RUN holds. A score is in 0 to 1 and low = bad; rank 1 is the most suspicious.
    Where wrong labels are known, rankings are measured by them. JSON is one list, and CSV one
    table, of all judged samples by every detector.

    Example: hydra-pipe detect runs/digits --by harmed-class --by contribution
    """
    from ..pipeline.analysis.export import check_target, write_rows
    from ..pipeline.decide.case import Options
    from ..pipeline.decide.detect import detect as look

    if figures is not None:
        from ..pipeline.decide.figures import check_figures, detection_figures

        check_figures(figures)
    if to is not None:
        check_target(to, overwrite=overwrite)
    options = Options(
        layer=given["layer"],
        scorer=given["scorer"],
        per_class=given["per_class"],
        normalise=given["normalise"],
        rows=given["rows"],
        clusters=given["clusters"],
        wrong_cluster=given["wrong_cluster"],
        neighbours=given["neighbours"],
        seed=given["seed"],
    )
    with watching(quiet) as observer:
        found = look(
            run,
            recipe,
            by=by or None,
            method=given["method"],
            options=options,
            split=given["split"],
            split_seed=given["split_seed"],
            flag=given["flag"],
            share=given["share"],
            truth=given["truth"],
            observer=observer,
            **placed(ctx, given),
        )
    files = detection_figures(found, figures) if figures is not None else []
    if to is not None:
        files.append(write_rows([one.table for one in found], to, overwrite=overwrite))
    if output_format == "json":
        emit_json(detection_rows(found))
    elif output_format == "csv":
        emit_csv(DETECTED, detection_rows(found))
    else:
        emit_tables(*detection_tables(found, k), *(f"wrote {name}" for name in files))
