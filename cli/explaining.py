"""The commands that show what contributions say: explain (one question), report (a page)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .explaining_views import INFLUENCES, explanation_rows, explanation_tables, strip
from .options import MANY, check_option, debug_option, format_option, method_option, quiet_option
from .output import emit_csv, emit_json, emit_tables, plain, results, show_bytes
from .progress import reading, watching
from .spec_options import parse_pairs

if TYPE_CHECKING:
    from ..pipeline.decide.explanation import Explanation
    from ..pipeline.decide.looks import Looks

_run_argument = click.argument("run")
_recipe_argument = click.argument("recipe", required=False, metavar="[RECIPE]")
_recipe_args = click.option(
    "--set",
    "recipe_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Keyword argument of the recipe's constructor, beside the run's; repeatable.",
)
_detection = click.option(
    "--detection", metavar="NAME", help="Detection whose ranks are shown.  [default: the run's best]"
)


def _two_classes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        one, other = (int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: write two classes, A,B") from None
    return one, other


@click.command(short_help="Explain a prediction of RUN, a training sample, or two classes.")
@_run_argument
@_recipe_argument
@click.option("--test", type=int, metavar="J", help="Test sample whose prediction is explained.")
@click.option("--train", type=int, metavar="I", help="Training sample: what it did to every test sample.")
@click.option(
    "--classes",
    callback=_two_classes,
    metavar="A,B",
    help="What the training samples of class A did to the test samples of class B.",
)
@click.option("--train-set", metavar="FILE", help="With --test-set: training samples, one index a line.")
@click.option("--test-set", metavar="FILE", help="With --train-set: test samples, one index a line.")
@click.option(
    "-k",
    type=MANY,
    default=5,
    show_default=True,
    metavar="K",
    help="How many of the most helpful and harmful.",
)
@_detection
@click.option(
    "--pictures",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Also write the pictures of the samples shown (PNG) into DIR.",
)
@_recipe_args
@method_option
@check_option
@format_option("table", "json", "csv")
@debug_option
def explain(
    run: str,
    recipe: str | None,
    k: int,
    detection: str | None,
    pictures: str | None,
    recipe_args: tuple[str, ...],
    method: str | None,
    check: bool,
    output_format: str,
    **asked: Any,
) -> None:
    """Show which training samples speak for and against a prediction of RUN, and with what share.

    Ask one thing: --test, --train, --classes, or both sets. A contribution is positive where the training
    sample helped. Confidences and pictures need RECIPE, what RUN was made from; it can be left out for a
    built-in one, and is never imported because a stored run names it. CSV has one row a contribution shown.

    Example: hydra-pipe explain runs/digits --test 17
    """
    from ..pipeline.decide.explain import asked_of, explained, with_pictures
    from ..pipeline.decide.looks import looking
    from ..pipeline.opened_run import open_run

    opened = open_run(run, check=check)
    question = asked_of(opened, **asked)
    given: dict[str, Any] = {"recipe_args": parse_pairs(recipe_args)} if recipe_args else {}
    with looking(opened, recipe, command="explain", given=given) as looks:
        found = explained(opened, looks, question, k=k, method=method, detection=detection)
        if pictures is not None:
            found = with_pictures(found, looks, pictures)
        drawn = _drawn(found, looks) if output_format == "table" and results().isatty() else {}
    for note in found.notes:
        click.echo(f"note: {plain(note)}", err=True)
    if output_format == "json":
        emit_json(found.as_json())
    elif output_format == "csv":
        emit_csv(INFLUENCES, explanation_rows(found))
    else:
        emit_tables(*explanation_tables(found, drawn))


def _drawn(found: Explanation, looks: Looks) -> dict[str, list[str]]:
    """Return the pictures of the samples shown as lines of half blocks, by where they are shown."""
    from ..pipeline.decide.pictures import half_blocks

    def lines(part: Any, indices: list[int]) -> list[str]:
        looked = [looks.look(part, index) for index in indices]
        return strip([half_blocks(one) for one in looked if one is not None and not isinstance(one, str)])

    other = "test" if found.question == "train" else "train"
    subject = [] if found.subject is None else lines(found.subject.part, [found.subject.index])
    sides = (("helpful", found.helpful), ("harmful", found.harmful))
    return {
        "subject": subject,
        **{
            name: lines(other, [one.test_index if other == "test" else one.train_index for one in influences])
            for name, influences in sides
        },
    }


@click.command(short_help="Write RUN as one HTML page: which samples to look at.")
@_run_argument
@_recipe_argument
@click.option("--to", required=True, type=click.Path(), metavar="FILE.html", help="File to write.")
@click.option(
    "--detection",
    metavar="NAME",
    help="Detection that ranks the samples.  [default: the run's best; where it has none, joint is made]",
)
@click.option(
    "--explain",
    "explain",
    multiple=True,
    type=int,
    metavar="J",
    help="Test sample that gets a section of its own; repeatable.",
)
@click.option(
    "--rows",
    default=500,
    show_default=True,
    type=click.IntRange(1, 10**7),
    metavar="N",
    help="Ranked samples on the page.",
)
@click.option(
    "-k",
    type=MANY,
    default=5,
    show_default=True,
    metavar="K",
    help="Most helpful and harmful samples of --explain.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@_recipe_args
@method_option
@format_option("table", "json", "csv")
@quiet_option
@debug_option
def report(
    run: str,
    recipe: str | None,
    recipe_args: tuple[str, ...],
    output_format: str,
    quiet: bool,
    **given: Any,
) -> None:
    """Write RUN as one HTML page that needs no network: suspicious samples, scores, classes, trust.

    The page holds its pictures, works without script, and stays below 5 MB: what does not fit is in the
    run's tables, and the page says how to get it. Where RUN has no detection yet, the default one is made and
    kept. That and pictures need RECIPE, what RUN was made from; it can be left out for a built-in one, and is
    never imported because a stored run names it.

    Example: hydra-pipe report runs/digits --to digits.html --explain 17
    """
    from ..pipeline.decide.report import report as write

    if recipe_args:
        given["recipe_args"] = parse_pairs(recipe_args)
    with ExitStack() as stages, reading("reading contributions", quiet, unit="rows") as move:
        observer = stages.enter_context(watching(quiet))

        def moved(done: int, total: int) -> None:
            stages.close()  # a terminal shows one bar at a time
            move(done, total)

        found = write(run, recipe, progress=moved, observer=observer, **given)
    for note in found.notes:
        click.echo(f"note: {plain(note)}", err=True)
    if output_format == "json":
        emit_json(asdict(found))
    elif output_format == "csv":
        columns = ("path", "bytes", "method", "detection", "rows", "samples")
        emit_csv(columns, [asdict(found)])
    else:
        by = "C(i)" if found.detection is None else f"detection {found.detection}"
        emit_tables(
            f"wrote {plain(found.path)}: {found.rows:,} of {found.samples:,} samples ranked by {plain(by)}, "
            f"{show_bytes(found.bytes)}"
        )
