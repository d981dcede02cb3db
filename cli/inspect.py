"""The commands that read a run: status, top, verify, export."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from .options import MANY, SEED, check_option, debug_option, format_option, method_option, quiet_option
from .output import emit_csv, emit_json, emit_tables, plain
from .progress import reading, watching
from .spec_options import parse_pairs
from .verification_views import deep_tables
from .views import samples_table, status_tables, verification_tables

_run_argument = click.argument("run")


@click.command()
@_run_argument
@format_option("table", "json", "csv")
@debug_option
def status(run: str, output_format: str) -> None:
    """Show how far RUN has come, and the command that resumes it.

    RUN is the run directory that --out named. CSV has one row a stage.

    Example: hydra-pipe status runs/digits
    """
    from ..pipeline.analysis.status import status as read_status
    from ..pipeline.opened_run import open_run

    found = read_status(open_run(run))
    if output_format == "json":
        emit_json(found)
    elif output_format == "csv":
        emit_csv(("stage", "state", "done", "units", "rows", "bytes", "seconds"), found["stages"])
    else:
        emit_tables(*status_tables(found))


@click.command()
@_run_argument
@click.option(
    "--test",
    type=int,
    metavar="J",
    help="Test sample (its test_index) to explain.  [default: the mean over the test samples]",
)
@click.option(
    "--class",
    "label",
    type=int,
    metavar="C",
    help="Class to explain: the mean over the test samples of that label.",
)
@click.option("-k", type=MANY, default=10, show_default=True, metavar="K", help="How many training samples.")
@click.option("--harmful", is_flag=True, help="Most harmful first instead of most helpful first.")
@method_option
@check_option
@format_option("table", "json", "csv")
@debug_option
def top(
    run: str,
    test: int | None,
    label: int | None,
    k: int,
    harmful: bool,
    method: str | None,
    check: bool,
    output_format: str,
) -> None:
    """Show the most helpful or most harmful training samples of RUN.

    A contribution is positive where leaving the training sample out would raise the loss of the
    test sample, and negative where it would lower it.

    Example: hydra-pipe top runs/digits --test 17 --harmful
    """
    from ..pipeline.analysis.zeros import zero_warning
    from ..pipeline.opened_run import open_run

    opened = open_run(run, check=check)
    method = opened.method(method)
    table = opened.top(k, test=test, label=label, harmful=harmful, method=method)
    rows: list[dict[str, Any]] = table.to_pylist()
    zero = zero_warning(opened.directory, method)
    if zero:
        click.echo(f"warning: {plain(zero)}", err=True)
    if output_format == "csv":
        emit_csv(table.column_names, rows)
    elif output_format == "json":
        what = {"test_index": test, "test_label": label}
        emit_json({"run": opened.uri, "method": method, **what, "harmful": harmful, "rows": rows})
    else:
        for_what = "the mean over the test samples"
        if test is not None:
            own = rows[0]["test_label"]
            for_what = f"test sample {test}" + ("" if own == -1 else f", label {own}")
        elif label is not None:
            for_what = f"test samples of class {label}"
        kind = "harmful" if harmful else "helpful"
        title = f"{len(rows)} most {kind} training samples for {for_what} ({method})"
        emit_tables(samples_table(title, rows, opened.noted.kind_of(method)))


@click.command(short_help="Check every file of RUN; with --deep also its numbers.")
@_run_argument
@click.argument("recipe", required=False, metavar="[RECIPE]")
@click.option("--deep", is_flag=True, help="Also compute a few rows again with a slow, plain reference.")
@click.option(
    "--rows",
    default=3,
    show_default=True,
    type=click.IntRange(1, 10**7),
    metavar="N",
    help="With --deep: how many training samples, from different shards.",
)
@click.option(
    "--rows-seed", type=SEED, default=0, show_default=True, metavar="N", help="With --deep: which samples."
)
@click.option(
    "--set",
    "recipe_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="With --deep: keyword argument of the recipe's constructor, beside the run's; repeatable.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="With --deep: where to compute.  [default: the run's]",
)
@format_option("table", "json", "csv")
@quiet_option
@debug_option
@click.pass_context
def verify(
    ctx: click.Context,
    run: str,
    recipe: str | None,
    deep: bool,
    rows: int,
    rows_seed: int,
    recipe_args: tuple[str, ...],
    device: str | None,
    output_format: str,
    quiet: bool,
) -> None:
    """Check every file of RUN against its manifest, and the contents against each other.

    Reads everything once or twice: sizes and sha256, stray files, row counts, finite values,
    digests of the checkpoints, and for fast hypergradients of all samples the conservation law.
    Exit code 1 when something is wrong. CSV has one row a finding.

    With --deep a few rows of every method are computed again, densely and in float64, and the
    largest deviations reported. That trains again in this process and takes a Hessian product a row
    and step where the run has exact hypergradients. RECIPE is what RUN was made from; it can be left
    out for a built-in one, and is never imported because a stored run names it.

    Example: hydra-pipe verify runs/digits
    """
    given = recipe or recipe_args or device or rows != 3 or rows_seed != 0
    if given and not deep:
        raise click.UsageError("RECIPE, --rows, --rows-seed, --set and --device belong to --deep; add it")
    from ..pipeline.opened_run import open_run
    from ..pipeline.verify.verify import unreadable
    from ..pipeline.verify.verify import verify as check
    from ..storage.errors import HydraError, RunNotFound, SpecError

    opened = None
    try:
        opened = open_run(run)
    except (RunNotFound, SpecError):
        raise
    except HydraError as error:
        found = unreadable(run, [str(error)], "run.json")
    else:
        with reading("verifying", quiet) as move:
            found = check(opened, progress=lambda done, total, what: move(done, total))
    document: dict[str, Any] = {"ok": found.ok, **asdict(found)}
    if deep and opened is not None and found.ok:  # numbers of damaged files need no second opinion
        from ..pipeline.verify.deep import verify_deep

        overrides = {"device": device, "recipe_args": parse_pairs(recipe_args) or None}
        with watching(quiet) as observer:
            again = verify_deep(opened, recipe, rows=rows, seed=rows_seed, observer=observer, **overrides)
        checks = [{**asdict(entry), "ok": entry.ok} for entry in again.checks]
        document |= {
            "ok": again.ok,
            "problems": (*found.problems, *again.problems),
            "notes": (*found.notes, *again.notes),
            "deep": {"ok": again.ok, **asdict(again), "checks": checks},
        }
    elif deep:
        document["notes"] = (*found.notes, "nothing was computed again: correct the problems first")
    if output_format == "json":
        emit_json(document)
    elif output_format == "csv":
        findings = [{"kind": "problem", "text": text} for text in document["problems"]]
        findings += [{"kind": "note", "text": text} for text in document["notes"]]
        emit_csv(("kind", "text"), findings)
    else:
        emit_tables(
            *(deep_tables(document["deep"]) if "deep" in document else ()), *verification_tables(document)
        )
    if not document["ok"]:
        ctx.exit(1)


@click.command()
@_run_argument
@click.option(
    "--to",
    required=True,
    type=click.Path(),
    metavar="FILE.csv|FILE.parquet",
    help="File to write; its ending says what is written.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@method_option
@check_option
@format_option("table", "json", "csv")
@quiet_option
@debug_option
def export(
    run: str,
    to: str,
    overwrite: bool,
    method: str | None,
    check: bool,
    output_format: str,
    quiet: bool,
) -> None:
    """Write all contributions of RUN as one CSV or Parquet file.

    Memory stays bounded however many there are. The file appears once it is complete. One row a
    (training sample, test sample): train_index, test_index, train_label, test_label, contribution.

    Example: hydra-pipe export runs/digits --to digits.csv
    """
    from ..pipeline.analysis.export import expected_rows
    from ..pipeline.analysis.export import export as write
    from ..pipeline.opened_run import open_run

    opened = open_run(run, check=check)
    total = expected_rows(opened, opened.method(method)) or 0
    with reading("exporting", quiet, unit="rows") as move:
        found = write(
            opened, to, method=method, overwrite=overwrite, progress=lambda rows: move(rows, max(rows, total))
        )
    if output_format == "json":
        emit_json(found)
    elif output_format == "csv":
        emit_csv(("path", "format", "method", "rows", "bytes"), [found])
    else:
        from .output import show_bytes

        emit_tables(f"wrote {found['path']}: {found['rows']:,} rows, {show_bytes(found['bytes'])}")
