"""The command that decides upon suspicious samples: clean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .cleaning_views import ARMS, CLASSES, arm_rows, class_rows, decision_tables
from .headings import HeadedCommand
from .judging import WHERE, placed
from .options import debug_option, format_option, quiet_option
from .output import emit_csv, emit_json, emit_tables
from .progress import watching
from .spec_options import OF_THE_RUN, pick

if TYPE_CHECKING:
    from ..pipeline.decide.clean import Cleaned


@click.command(cls=HeadedCommand, short_help="Drop, relabel or downweight suspicious samples of RUN.")
@click.argument("run")
@click.argument("recipe", required=False, metavar="[RECIPE]")
@click.option(
    "--detection",
    metavar="NAME",
    help="Decide upon this detection.  [default: the run's best, joint first]",
)
@click.option(
    "--list", "listed", metavar="FILE", help="Decide upon these samples instead, one train_index a line."
)
@click.option(
    "--drop",
    metavar="SHARE|K|flagged|FILE",
    help="Drop samples: a share (0.05 or 5%) or number of those judged, most suspicious first; those that are flagged; "
    "or those in FILE, one train_index a line.",
)
@click.option("--relabel", is_flag=True, help="Give samples of --cut the label that the detection suggests.")
@click.option(
    "--downweight", is_flag=True, help="Let samples of --cut count as much as their score, 0.01 to 1."
)
@click.option(
    "--cut",
    metavar="SHARE|K|flagged|FILE",
    help="With --relabel and --downweight: which samples.  [default: flagged]",
)
@click.option("--name", metavar="NAME", help="Of the decision.  [default: made from detection and rule]")
@click.option(
    "--retrain",
    type=click.IntRange(max=1000),
    default=0,
    show_default=True,
    metavar="K",
    help="Train with K seeds: before, cleaned, as many samples dropped at random, by loss, by margin, and the wrong ones.",
)
@click.option(
    "--way",
    type=click.Choice(["subset", "rescaled", "weighted"]),
    default="subset",
    show_default=True,
    help="subset: samples deleted, trained from scratch in new batches. rescaled: the recorded steps, dropped samples "
    "count 0 and the others N / (N - dropped). weighted: the others count 1.",
)
@click.option(
    "--papers-reading",
    is_flag=True,
    help="With known wrong labels: also train what is kept on its true labels, and a random choice of that size.",
)
@click.option(
    "--check",
    metavar="NAME|FOLDER",
    help="Decide nothing: say whether this decision of RUN, or the one in FOLDER, is for the data of RUN.",
)
@pick((*WHERE, "recipe_args"), of_the_run=OF_THE_RUN)
@click.option("--overwrite", is_flag=True, help="Replace a decision of this name that says something else.")
@format_option("table", "json", "csv")
@quiet_option
@debug_option
@click.pass_context
def clean(
    ctx: click.Context,
    /,
    run: str,
    recipe: str | None,
    detection: str | None,
    listed: str | None,
    drop: str | None,
    relabel: bool,
    downweight: bool,
    cut: str | None,
    check: str | None,
    output_format: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Decide what happens to suspicious training samples of RUN, and measure whether it helps.

    Writes lists that other tools read to RUN/decisions/NAME: keep.txt, drop.txt, weights.npy, relabel.csv, the whole
    table, and a manifest that names the labels it is for. Your data are never touched. With --retrain K the recipe is
    trained with and without the decision; the trainings are kept in RUN, and the same command continues.

    RECIPE is what RUN was made from; it can be left out for a built-in one. It is your code and is never imported
    because a stored run names it. CSV has one row a class, or with --retrain one row a way of training.

    Example: hydra-pipe clean runs/digits --drop 5% --retrain 3 --executor serial
    """
    given = placed(ctx, options)
    with watching(quiet) as observer:
        if check is not None:
            if drop is not None or relabel or downweight or cut is not None or listed is not None:
                raise click.UsageError("--check decides nothing; leave rule, --cut and --list out")
            from ..pipeline.decide.clean import check_decision

            decision = check_decision(run, check, recipe, observer=observer, **given)
            _emit_check(decision.folder, decision.values.n_train, output_format)
            return
        if cut is not None and not (relabel or downweight):
            raise click.UsageError(
                "--cut belongs to --relabel and --downweight; --drop says itself which samples"
            )
        from ..pipeline.decide.clean import clean as decide

        made = decide(
            run,
            recipe,
            detection=detection,
            list=listed,
            drop=drop,
            relabel=(cut or True) if relabel else False,
            downweight=(cut or True) if downweight else False,
            name=options["name"],
            retrain=options["retrain"],
            way=options["way"],
            papers_reading=options["papers_reading"],
            overwrite=options["overwrite"],
            observer=observer,
            **given,
        )
    found = document(made)
    if output_format == "json":
        emit_json(found)
    elif output_format == "csv" and found["outcome"]:
        emit_csv(ARMS, arm_rows(found["outcome"]))
    elif output_format == "csv":
        emit_csv(CLASSES, class_rows(found))
    else:
        emit_tables(*decision_tables(found))


def document(made: Cleaned) -> Mapping[str, Any]:
    """Return what `clean` made as JSON-able values: ``name``, ``folder``, ``decision``, ``classes``, ``outcome``."""
    decision = made.decision
    values = asdict(decision.values)
    classes = [{**asdict(one), "lost": one.lost} for one in decision.values.classes]
    return {
        "name": decision.name,
        "folder": decision.folder,
        "decision": {key: value for key, value in values.items() if key != "classes"},
        "classes": classes,
        "outcome": asdict(made.outcome) if made.outcome is not None else None,
    }


def _emit_check(folder: str, count: int, output_format: str) -> None:
    if output_format == "json":
        emit_json({"folder": folder, "n_train": count, "fits": True})
    elif output_format == "csv":
        emit_csv(("folder", "n_train", "fits"), [{"folder": folder, "n_train": count, "fits": True}])
    else:
        emit_tables(f"{folder} is for these data: all {count:,} labels are those it was made for")
