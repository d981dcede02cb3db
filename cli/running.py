"""The commands that compute: run, its single stages, and plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from .attributing import Methods, estimator_options, read_methods
from .options import debug_option, format_option, quiet_option
from .output import Table, emit_csv, emit_json, emit_tables, plain
from .progress import watching
from .spec_options import build_spec, spec_options
from .views import plan_rows, plan_tables, summary_tables


def _run(ctx: click.Context, stages: Sequence[str] | None, methods: Methods | None = None) -> None:
    spec = build_spec(ctx)
    from ..pipeline.drive import run as drive

    with watching(ctx.params["quiet"]) as observer:
        finished = drive(spec, observer=observer, stages=stages)
        if methods:
            from ..pipeline.attribute import PLACEMENT, attribute

            placement = {name: getattr(spec, name) for name in PLACEMENT}
            finished = attribute(
                finished.uri, methods, spec.recipe, observer=observer, seeds=spec.seeds, **placement
            )
    found = finished.summary()
    if ctx.params["output_format"] == "json":
        emit_json(found)
    else:
        emit_tables(*summary_tables(found))


@click.command()
@spec_options
@estimator_options
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
    _run(ctx, None, read_methods(estimators, estimator_options))


@click.command()
@spec_options
@format_option("table", "json")
@quiet_option
@debug_option
@click.pass_context
def record(ctx: click.Context, /, **_: Any) -> None:
    """Train once and record the trajectory; the first stage of run.

    Example: hydra-pipe record digits --out runs/digits
    """
    _run(ctx, ("record",))


@click.command(short_help="Replay the record: test gradients and hypergradients.")
@spec_options
@format_option("table", "json")
@quiet_option
@debug_option
@click.pass_context
def replay(ctx: click.Context, /, **_: Any) -> None:
    """Replay the record: test gradients and hypergradients, shard by shard.

    Give the same recipe and options as to record: a recipe is never loaded from a stored run.

    Example: hydra-pipe replay digits --out runs/digits --shards 8
    """
    _run(ctx, ("test-gradients", "replay"))


@click.command(short_help="Join hypergradients and test gradients: contributions.")
@spec_options
@format_option("table", "json")
@quiet_option
@debug_option
@click.pass_context
def reduce(ctx: click.Context, /, **_: Any) -> None:
    """Join hypergradients with test gradients into contributions; the last stage of run.

    Example: hydra-pipe reduce digits --out runs/digits
    """
    _run(ctx, ("reduce",))


@click.command()
@spec_options
@format_option("table", "json", "csv")
@debug_option
@click.pass_context
def plan(ctx: click.Context, /, output_format: str, **_: Any) -> None:
    """Show what run would do: shards, memory, disk, time. Nothing is started.

    Example: hydra-pipe plan digits --shards 8
    """
    spec = build_spec(ctx)
    from ..pipeline.plan import make_plan

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
