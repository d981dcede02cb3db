"""The commands that compute: run, its single stages, and plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .attributing import Methods, estimator_options, read_methods
from .headings import HeadedCommand
from .options import debug_option, format_option, quiet_option
from .output import Table, emit_csv, emit_json, emit_tables, plain
from .progress import watching
from .spec_options import (
    CURVATURE_HELP,
    build_spec,
    curvature_option,
    curvature_pairs,
    given_values,
    hidden_given,
    record_options,
    spec_options,
    stage_options,
)
from .views import plan_rows, plan_tables, summary_tables

if TYPE_CHECKING:
    from ..pipeline.spec.spec import RunSpec


def _run(
    ctx: click.Context, spec: RunSpec, stages: Sequence[str] | None = None, methods: Methods | None = None
) -> None:
    from ..pipeline.run import run as drive

    with watching(ctx.params["quiet"]) as observer:
        finished = drive(spec, observer=observer, stages=stages)
        if methods:
            from ..pipeline.drive.attribute import attribute
            from ..pipeline.plan.stored_spec import PLACEMENT

            placement = {name: getattr(spec, name) for name in PLACEMENT}
            finished = attribute(
                finished.uri, methods, spec.recipe, observer=observer, seeds=spec.seeds, **placement
            )
    found = finished.summary()
    if ctx.params["output_format"] == "json":
        emit_json(found)
    else:
        emit_tables(*summary_tables(found))


def _go_on(ctx: click.Context, stages: Sequence[str], pairs: Sequence[str] = ()) -> None:
    """Do more stages of a run that is there, with what it has fixed."""
    given = given_values(ctx, pairs)
    from ..pipeline.plan.stored_spec import stage_spec

    _run(ctx, stage_spec(given, command=ctx.info_name or ""), stages)


@click.command(cls=HeadedCommand)
@spec_options
@estimator_options(CURVATURE_HELP)
@format_option("table", "json")
@quiet_option
@debug_option
@click.pass_context
def run(
    ctx: click.Context, /, estimators: tuple[str, ...], estimator_options: tuple[str, ...], **_: Any
) -> None:
    """Do everything: record, replay, reduce, and show a summary.

    RECIPE is a built-in name, module:Class or path/to/file.py:Class  [default: digits]. It is
    your code and runs with your rights. The same command again resumes: committed work is kept.

    Example: hydra-pipe run digits --shards 8 --out runs/digits
    """
    curvature, others = curvature_pairs(estimator_options)
    _run(ctx, build_spec(ctx, curvature), methods=read_methods(estimators, others))


@click.command(cls=HeadedCommand)
@record_options
@format_option("table", "json")
@quiet_option
@debug_option
@click.pass_context
def record(ctx: click.Context, /, quiet: bool, **_: Any) -> None:
    """Train once and record the trajectory; the first stage of run.

    Which samples are tracked and tested is fixed here, too. How their contributions are
    computed is not: that is asked by replay.

    Example: hydra-pipe record digits --out runs/digits
    """
    for flag in () if quiet else hidden_given(ctx):
        click.echo(f"{flag} does not matter to record; give it to replay", err=True)
    _run(ctx, build_spec(ctx), ("record",))


@click.command(cls=HeadedCommand, short_help="Replay the record: test gradients and hypergradients.")
@stage_options("shards", "segments", "mode", "hessian", "targets", "exact_rank", "store_dtype")
@curvature_option
@format_option("table", "json")
@quiet_option
@debug_option
@click.pass_context
def replay(ctx: click.Context, /, curvature_options: tuple[str, ...], **_: Any) -> None:
    """Replay the record: test gradients and hypergradients, shard by shard.

    What was recorded is read from the run at --out. RECIPE is needed where it is not a built-in
    one: what a stored run names is never imported unasked. The same command again resumes.

    Example: hydra-pipe replay digits --out runs/digits --shards 8
    """
    _go_on(ctx, ("test-gradients", "replay"), curvature_options)


@click.command(cls=HeadedCommand, short_help="Join hypergradients and test gradients: contributions.")
@stage_options("hessian", "targets", "exact_rank")
@format_option("table", "json")
@quiet_option
@debug_option
@click.pass_context
def reduce(ctx: click.Context, /, **_: Any) -> None:
    """Join hypergradients with test gradients into contributions; the last stage of run.

    The method is the one that --hessian, --targets and --exact-rank name; how it was replayed
    is read from the run at --out. RECIPE is needed where it is not a built-in one.

    Example: hydra-pipe reduce digits --out runs/digits
    """
    _go_on(ctx, ("reduce",))


@click.command(cls=HeadedCommand)
@spec_options
@curvature_option
@format_option("table", "json", "csv")
@debug_option
@click.pass_context
def plan(ctx: click.Context, /, output_format: str, curvature_options: tuple[str, ...], **_: Any) -> None:
    """Show what run would do: shards, memory, disk, time. Nothing is started.

    Example: hydra-pipe plan digits --shards 8
    """
    spec = build_spec(ctx, curvature_options)
    from ..pipeline.plan.plan import make_plan

    sections: dict[str, Any] = dict(make_plan(spec).as_dict())
    for text in sections.get("warnings", ()):
        click.echo(f"warning: {plain(text)}", err=True)
    if output_format == "json":
        emit_json(sections)
        return
    sections.pop("warnings", None)
    if output_format == "csv":
        emit_csv(("section", "row", "key", "value"), plan_rows(sections))
    else:
        parts: list[Table | str] = plan_tables(sections)
        emit_tables(*parts)
