"""How comparisons and evaluations become tables of at most 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .output import Column, Table, show_seconds

COMPARED = (
    "method",
    "sign_error",
    "spearman",
    "spearman_std",
    "relative_error",
    "relative_error_by_test",
    "scale",
    "overlap_helpful",
    "overlap_harmful",
    "mean_sign_error",
    "mean_spearman",
    "mean_relative_error",
    "mean_overlap_helpful",
    "mean_overlap_harmful",
    "seconds",
)
"""Columns of a comparison in CSV."""

LDS = ("fraction", "method", "lds", "low", "high")
"""Columns of an evaluation in CSV."""

MOST_SENTENCES = 12


def comparison_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """Return a comparison: over C(i, j), then over C(i)."""
    rows = [
        {
            "method": row["method"],
            "seconds": row["seconds"],
            **{key: _number(row[key], 3) for key in COMPARED if key not in ("method", "seconds")},
            "extremes": f"{row['overlap_helpful']:.2f}/{row['overlap_harmful']:.2f}",
            "mean_extremes": f"{row['mean_overlap_helpful']:.2f}/{row['mean_overlap_harmful']:.2f}",
        }
        for row in found["methods"]
    ]
    top = f"top {found['k']}"
    pairs = (
        ("method", "method"),
        ("sign_error", "signs"),
        ("spearman", "Spearman"),
        ("relative_error", "error"),
        ("scale", "size"),
        ("extremes", top),
        ("seconds", "time"),
    )
    means = (
        ("method", "method"),
        ("mean_sign_error", "signs"),
        ("mean_spearman", "Spearman"),
        ("mean_relative_error", "error"),
        ("mean_extremes", top),
    )
    against = f"against {found['reference']}"
    over = {
        "samples": ("C(i, j)", ", mean over the test samples"),
        "classes": ("C(i, class)", ", mean over the classes"),
        "mean": ("C(i, mean)", ""),
    }[found["targets"]]
    return [
        f"{found['n_tracked']:,} training samples, {_targets(found)}",
        "",
        _table(f"{over[0]} {against}{over[1]}", pairs, rows),
        "",
        _table(f"C(i) {against}", means, rows),
        "",
        "signs: share of samples with the wrong sign; error: norm of the difference over the",
        "reference's norm; size: norm over the reference's; time: of the method alone;",
        f"{top}: share of the reference's most helpful / most harmful samples that is found",
    ]


def _targets(found: Mapping[str, Any]) -> str:
    tests = f"{found['n_test']:,} test samples"
    return {
        "samples": tests,
        "classes": f"{tests} in {found['n_targets']:,} classes",
        "mean": f"the mean over {tests}",
    }[found["targets"]]


def evaluation_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """Return an evaluation: scores, reach, single samples, curves, wrong labels, what to trust."""
    base, made = found["baseline"], found["retrainings"]
    parts: list[Table | str] = [
        f"{made['asked']} retrainings ({made['stored']} stored, {show_seconds(made['seconds'])} of work)",
        f"test loss {_number(base['loss'], 4)}, accuracy {_percent(base['accuracy'])}",
        "",
    ]
    if found["targets"] != "samples":
        parts += [f"losses are those of {_targets(found)}", ""]
    if found["lds"]:
        parts += [*_scores(found), ""]
    parts += [*_reach(found["smoothness"]), *_single(found["leave_one_out"])]
    parts += [*_removal(found["removal"]), *_wrong(found["mislabelled"])]
    return [*parts, *(f"{line}." for line in found["sentences"][:MOST_SENTENCES])]


def evaluation_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `LDS`."""
    return list(found["lds"])


def _scores(found: Mapping[str, Any]) -> list[Table | str]:
    columns = (
        ("kept", "kept"),
        ("method", "method"),
        ("lds", "score"),
        ("ends", "95% interval"),
        ("seconds", "time of its own"),
    )
    rows = [
        {
            "kept": f"{100 * row['fraction']:g}%",
            "method": row["method"],
            "lds": f"{row['lds']:.3f}",
            "ends": f"{row['low']:.3f} to {row['high']:.3f}",
            "seconds": found["cost"].get(row["method"]),
        }
        for row in found["lds"]
    ]
    return [_table("linear datamodelling score (1: perfect, 0: chance)", columns, rows)]


def _reach(rows: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    columns = (
        ("what", "change"),
        ("removed", "size"),
        ("method", "method"),
        ("change", "in loss"),
        ("correlation", "correl."),
        ("slope", "slope"),
        ("explained", "predicted"),
    )
    shown = [
        {
            "what": row["what"].removeprefix("random "),
            "method": row["method"],
            "removed": f"{100 * row['removed']:.3g}%",
            "change": _number(row["change"], 4),
            "correlation": _number(row["correlation"], 3),
            "slope": f"{row['slope']:.2g}",
            "explained": _share(row["explained"]),
        }
        for row in rows
    ]
    return [_table("how far the prediction reaches, all targets", columns, shown), ""] if rows else []


def _single(rows: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    if not rows:
        return []
    columns = (
        ("method", "method"),
        ("spearman_by_test", "Spearman C(i, j)"),
        ("spearman_mean", "Spearman C(i)"),
        ("sign_error", "sign errors"),
        ("explained", "predicted"),
    )
    shown = [
        {
            "method": row["method"],
            **{key: _number(row[key], 3) for key in ("spearman_by_test", "spearman_mean", "sign_error")},
            "explained": _share(row["explained"]),
        }
        for row in rows
    ]
    return [_table(f"{rows[0]['samples']} samples left out one at a time", columns, shown), ""]


def _removal(rows: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    if not rows:
        return []
    columns = (
        ("ranking", "ranking"),
        ("direction", "removed"),
        ("share", "share"),
        ("loss_change", "test loss"),
        ("predicted_change", "predicted"),
        ("accuracy", "accuracy"),
    )
    shown = [
        {
            **row,
            "share": f"{100 * row['share']:.3g}%",
            "loss_change": f"{row['loss_change']:+.4f}",
            "predicted_change": None
            if row["predicted_change"] is None
            else f"{row['predicted_change']:+.3g}",
            "accuracy": _percent(row["accuracy"]),
        }
        for row in rows
    ]
    return [_table("the most helpful or most harmful samples removed", columns, shown), ""]


def _wrong(rows: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    if not rows:
        return []
    columns = (("score", "wrong labels, found by"), ("shown", "AUC"), ("recall", "recall"))
    shown = [
        {
            "score": row["score"],
            "shown": f"{row['auc']:.3f} ({row['auc_low']:.3f} to {row['auc_high']:.3f})",
            "recall": f"{row['recall']:.1%}",
        }
        for row in sorted(rows, key=lambda row: -row["auc"])
    ]
    return [_table(None, columns, shown), ""]


def _table(title: str | None, columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> Table:
    left = ("method", "ranking", "direction", "score", "what")
    return Table(
        title=title,
        columns=[Column(key=key, header=header, right=key not in left) for key, header in columns],
        rows=rows,
    )


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{share:.2%}"


def _share(explained: float) -> str:
    return "none" if not explained > 0 else f"{explained:.1%}"
