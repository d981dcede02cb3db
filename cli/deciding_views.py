"""How detections become tables of at most 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .output import Column, Table

if TYPE_CHECKING:
    from ..pipeline.reading.detections import Detection

DETECTED = (
    "by",
    "train_index",
    "rank",
    "score",
    "given_label",
    "suggested_label",
    "reason",
    "suspicion",
    "is_label_issue",
)
"""Keys of a row in JSON, and columns in CSV."""

WIDEST_REASON = 60
MOST_SHOWN = 3
"""Of more detections the samples of the first alone are shown."""


def detection_rows(found: Sequence[Detection]) -> list[dict[str, Any]]:
    """Return one row a (detection, judged sample)."""
    return [{key: row[key] for key in DETECTED} for detection in found for row in detection.table.to_pylist()]


def detection_tables(found: Sequence[Detection], k: int) -> list[Table | str]:
    """Return the most suspicious samples of each detection, and how the detections compare."""
    parts: list[Table | str] = []
    for detection in found if len(found) <= MOST_SHOWN else found[:1]:
        parts += [_most(detection, k), _said(detection), ""]
    if len(found) > 1 or any(detection.values.measures for detection in found):
        parts += [*_compared(found)]
    return parts if parts[-1] != "" else parts[:-1]


def _most(detection: Detection, k: int) -> Table:
    shown = detection.table.slice(0, k).to_pylist()
    suggests = any(row["suggested_label"] >= 0 for row in shown)
    columns = [
        Column(key="rank", header="rank", right=True),
        Column(key="train_index", header="index", right=True, kind="text"),
        Column(key="given_label", header="given", right=True),
        *([Column(key="suggested_label", header="suggest", right=True)] if suggests else []),
        Column(key="score", header="score", right=True),
        Column(key="is_label_issue", header="flag"),
        Column(key="reason", header="reason"),
    ]
    rows = [
        {
            **row,
            **{key: row[key] if row[key] >= 0 else None for key in ("given_label", "suggested_label")},
            "score": f"{row['score']:.4f}",
            "reason": row["reason"]
            if len(row["reason"]) <= WIDEST_REASON
            else row["reason"][: WIDEST_REASON - 3] + "...",
        }
        for row in shown
    ]
    return Table(
        title=f"{len(shown)} most suspicious of {len(detection.table):,} by {detection.name}",
        columns=columns,
        rows=rows,
    )


def _said(detection: Detection) -> str:
    """Return what the rule did, in one line."""
    values = detection.values
    if values.flag == "none":
        return "none flagged: --flag names a rule"
    count, share = values.flagged, values.flagged / max(1, len(detection.table))
    parted = "" if values.separation is None else f", separation {values.separation:.2f}"
    line = f"{count:,} flagged ({100 * share:.2g}%) by {values.flag}{parted}"
    return f"{line}; under 1%: inspect each before anything is done" if values.inspect else line


def _compared(found: Sequence[Detection]) -> list[Table | str]:
    known = next((d.values.measures for d in found if d.values.measures), None)
    measured = (
        ("auroc", "AUROC"),
        ("ends", "95%"),
        ("average_precision", "AP"),
        ("precision", "at k"),
        ("recall", "5/10/20%"),
    )
    keys = (
        ("name", "detector"),
        *(measured if known else ()),
        *((("suggested_right", "label"),) if known and any(_label(d) != "-" for d in found) else ()),
        ("flagged", "flag"),
        *(() if known else (("separation", "apart"),)),
    )
    columns = [Column(key=key, header=head, right=key != "name", kind="text") for key, head in keys]
    title = "detectors compared"
    if known:
        title = f"{known['wrong']:,} of {known['judged']:,} labels are wrong by {known['truth']}"
    parts: list[Table | str] = [Table(title=title, columns=columns, rows=[_row(one) for one in found])]
    if known:
        parts += [
            "",
            "AP: average precision; at k: precision among as many as are wrong; 5/10/20%: percent of",
            "the wrong ones found by inspecting so many; label: share of them whose suggested label",
            "is right",
        ]
    return parts


def _row(detection: Detection) -> dict[str, Any]:
    values, row = detection.values, {"name": detection.name}
    measures: Mapping[str, Any] | None = values.measures
    if measures:
        row |= {
            "auroc": f"{measures['auroc']['value']:.3f}",
            "ends": f"{_short(measures['auroc']['low'])}-{_short(measures['auroc']['high'])}",
            "average_precision": f"{measures['average_precision']['value']:.3f}",
            "precision": f"{measures['precision']['value']:.2f}",
            "recall": "/".join(f"{100 * one['found']['value']:.0f}" for one in measures["recall"]),
            "suggested_right": _label(detection),
        }
    separation = values.separation
    return {
        **row,
        "flagged": f"{values.flagged:,}",
        "separation": "-" if separation is None else f"{separation:.2f}",
    }


def _short(value: float) -> str:
    """Return two digits without the leading zero, such as ``.97``."""
    return f"{value:.2f}".removeprefix("0")


def _label(detection: Detection) -> str:
    found = (detection.values.measures or {}).get("suggested_right")
    return "-" if found is None else f"{found['value']:.2f}"
