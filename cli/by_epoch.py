"""What ``compare --every E`` adds to ``compare``: its options, and how its numbers become tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from .attributing import read_methods
from .output import Column, Table, emit_csv, emit_json, emit_tables, show_seconds
from .progress import watching
from .spec_options import OF_THE_RUN, PLACEMENT, pick, recipe_argument

WHERE = (*PLACEMENT, "memory")
"""Options of ``run`` that say where the work is done."""

OWN = ("recipe", "influence_from", "estimator_options", "influence_by_test", "decay_as_published", *WHERE)
"""Parameters that mean nothing without ``--every``."""

CURVES = (
    *("epoch", "reference", "method", "error", "norm", "reference_norm", "relative_error"),
    *("sign_error", "spearman", "sign_error_by_test", "spearman_by_test", "spearman_by_test_std"),
)
"""Columns in CSV."""

SHOWN_EPOCHS = 6
"""Epochs in the table; all are in CSV and JSON."""


def by_epoch_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the RECIPE argument and the options."""
    function = pick(WHERE, of_the_run=OF_THE_RUN, only_with="With --every")(function)
    for option in (
        click.option(
            "--decay-as-published",
            is_flag=True,
            help="With --every: also with N times the weight decay in the recursion, as the first published "
            "code of the HyDRA paper had it.",
        ),
        click.option(
            "--influence-by-test",
            is_flag=True,
            help="With --every: influence for each test sample too, one solve each, and not for C(i) alone.",
        ),
        click.option(
            "--option",
            "estimator_options",
            multiple=True,
            metavar="[NAME.]KEY=VALUE",
            help="With --every: option of an influence estimator; repeatable.",
        ),
        click.option(
            "--influence-from",
            type=click.IntRange(min=1),
            metavar="EPOCH",
            help="With --every: first epoch of the influence functions, and of the averages.  "
            "[default: half of training]",
        ),
        click.option(
            "--every",
            type=click.IntRange(min=1),
            metavar="E",
            help="Compare over training: every E epochs, as if training had ended there.",
        ),
    ):
        function = option(function)
    return recipe_argument(function)


def compare_by_epoch(
    run: str,
    *,
    methods: Sequence[str] | None,
    figures: str | None,
    output_format: str,
    quiet: bool,
    given: Mapping[str, Any],
) -> None:
    """Do the comparison and print it; ``given`` are the values of ``OWN`` and ``every``."""
    from ..pipeline.compare.by_epoch import Course, by_epoch
    from ..pipeline.compare.curves import training_figures
    from ..pipeline.compare.figures import check_figures
    from ..workers.estimators.influence_after import INFLUENCE

    if figures is not None:
        check_figures(figures)
    asked = [name for name in (methods or INFLUENCE[:1]) if name in INFLUENCE]
    course = Course(
        every=given["every"],
        methods=methods,
        influence_from=given["influence_from"],
        options=read_methods(asked, given["estimator_options"]),
        by_test=given["influence_by_test"],
        raw_decay=given["decay_as_published"],
    )
    placement = {name: given[name] for name in WHERE if given[name] is not None}
    with watching(quiet) as observer:
        found = by_epoch(run, course, given["recipe"], observer=observer, **placement)
    files = training_figures(found, figures) if figures is not None else []
    if output_format == "json":
        emit_json({**found, "figures": files})
    elif output_format == "csv":
        emit_csv(CURVES, found["curves"])
    else:
        emit_tables(*by_epoch_tables(found), *(f"wrote {name}" for name in files))


def by_epoch_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """Return the averages, then some of the epochs."""
    epochs = found["every_epoch"]
    count = min(SHOWN_EPOCHS, len(epochs))
    shown = {epochs[round((len(epochs) - 1) * (k + 1) / count)] for k in range(count)}
    if count == len(epochs):
        shown = set(epochs)
    work = show_seconds(sum(found["seconds"].values()))
    parts: list[Table | str] = [
        f"{found['n_tracked']:,} training samples, {found['n_test']:,} test samples, {work} of work",
        "",
    ]
    for reference in dict.fromkeys(row["reference"] for row in found["curves"]):
        late = [row for row in found["late"] if row["reference"] == reference]
        if late:
            title = f"against {reference}, from epoch {found['influence_from']} on (mean ± over epochs)"
            parts += [_table(title, [], [_average(row) for row in late]), ""]
        rows = [row for row in found["curves"] if row["reference"] == reference and row["epoch"] in shown]
        title = f"against {reference}, {len(shown)} of {len(epochs)} epochs"
        parts += [_table(title, [("epoch", "epoch")], [_single(row) for row in rows]), ""]
    return [
        *parts,
        "error: mean norm of the hypergradients' difference, in brackets over the reference's",
        "norm (root mean square); signs: share of wrong signs; both right columns are on",
        "C(i), in brackets the mean over single test samples",
    ]


def _table(title: str, first: list[tuple[str, str]], rows: list[dict[str, Any]]) -> Table:
    columns = (
        *first,
        ("method", "method"),
        ("error", "error"),
        ("signs", "signs"),
        ("rank", "Spearman"),
    )
    return Table(
        title=title,
        columns=[Column(key=key, header=header, right=key != "method") for key, header in columns],
        rows=rows,
    )


def _single(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "epoch": row["epoch"],
        "method": row["method"],
        "error": _pair(row["error"], row["relative_error"], "3g", "2g"),
        "signs": _pair(row["sign_error"], row["sign_error_by_test"]),
        "rank": _pair(row["spearman"], row["spearman_by_test"]),
    }


def _average(row: Mapping[str, Any]) -> dict[str, Any]:
    def spread(key: str) -> str:
        return f"{row[key]:.3f} ± {row[f'{key}_std']:.3f}"

    return {
        "method": row["method"],
        "error": _pair(row["error"], row["relative_error"], "3g", "2g"),
        "signs": spread("sign_error"),
        "rank": spread("spearman"),
    }


def _pair(value: float | None, beside: float | None, kind: str = "3f", small: str = "2f") -> str | None:
    if value is None:
        return None
    return f"{value:.{kind}}" + ("" if beside is None else f" ({beside:.{small}})")
