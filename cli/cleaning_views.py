"""How decisions, and whether they helped, become tables of at most 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .output import Column, Table

CLASSES = ("label", "before", "dropped", "relabelled", "downweighted", "lost", "after")
"""Columns of a decision in CSV."""

ARMS = (
    "arm",
    "samples",
    *(f"{what}_{part}" for what in ("accuracy", "loss") for part in ("mean", "std", "low", "high")),
    *(f"{what}_{part}" for what in ("to_before", "to_random") for part in ("mean", "low", "high")),
)
"""Columns of retrainings in CSV."""


def decision_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """Return a decision by class, where its files are, and how the retrainings ended."""
    made = found["decision"]
    source = f"detection {made['detection']}" if made["detection"] else "a list"
    done = [f"{made[what]:,} {what}" for what in ("dropped", "relabelled", "downweighted") if made[what]]
    parts: list[Table | str] = [
        *(f"warning: {line}" for line in made["warnings"]),
        f"decision {found['name']} ({made['rule']} {made['cut']} of {source}): {', '.join(done)} of {made['n_train']:,} samples",
        "",
        _classes(found["classes"], made),
        "",
        *(f"{line[:1].upper()}{line[1:]}." for line in made["notes"]),
        *(_outcome(found["outcome"]) if found["outcome"] else [f"{_sentence(made['trust'])}"]),
        f"keep.txt, drop.txt, weights.npy and more are in {found['folder']}",
    ]
    return parts


def class_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `CLASSES`."""
    return [dict(row) for row in found["classes"]]


def arm_rows(outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `ARMS`."""
    rows = []
    for arm in outcome["arms"]:
        row = {"arm": arm["arm"], "samples": arm["samples"]}
        for what in ("accuracy", "loss", "to_before", "to_random"):
            for part in ("mean", "std", "low", "high"):
                row[f"{what}_{part}"] = (arm.get(what) or {}).get(part)
        rows.append(row)
    return rows


def _classes(rows: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> Table:
    done = [what for what in ("dropped", "relabelled", "downweighted") if made[what]]
    columns = [
        Column(key="label", header="class", right=True, kind="text"),
        Column(key="before", header="samples", right=True),
        *(Column(key=what, header=what, right=True) for what in done),
        Column(key="share", header="share", right=True),
        Column(key="after", header="kept", right=True),
    ]
    shown = [
        {
            **row,
            "label": "none" if row["label"] < 0 else str(row["label"]),
            "share": f"{100 * sum(row[what] for what in done) / row['before']:.1f}%"
            if row["before"]
            else None,
        }
        for row in rows
    ]
    return Table(title="by given label", columns=columns, rows=shown)


def _outcome(outcome: Mapping[str, Any]) -> list[Table | str]:
    known = all(arm.get("accuracy") for arm in outcome["arms"])
    what = "accuracy" if known else "loss"
    seeds = len(outcome["seeds"])
    columns = (
        Column(key="arm", header="trained on"),
        Column(key="samples", header="samples", right=True),
        Column(key="value", header=what, right=True),
        *([Column(key="loss", header="loss", right=True)] if known else []),
        Column(key="to_random", header="to random (95%)", right=True),
    )
    rows = [
        {
            "arm": arm["arm"],
            "samples": round(arm["samples"]),
            "value": _value(arm[what], known),
            "loss": f"{arm['loss']['mean']:.4f}",
            "to_random": _difference(arm["to_random"], known),
        }
        for arm in outcome["arms"]
    ]
    title = (
        f"after the last epoch, {seeds} seed{'s' if seeds > 1 else ''}, on {outcome['judging']:,} test samples "
        f"(trained {outcome['way']})"
    )
    return [
        Table(title=title, columns=columns, rows=rows),
        "",
        *(_sentence(line) for line in outcome["notes"]),
        _sentence(outcome["trust"]),
    ]


def _sentence(line: str) -> str:
    return f"{line[:1].upper()}{line[1:]}."


def _value(found: Mapping[str, Any], share: bool) -> str:
    scale, digits = (100, 2) if share else (1, 4)
    text = f"{scale * found['mean']:.{digits}f}"
    if found["std"] is not None:
        text += f" ± {scale * found['std']:.{digits}f}"
    return f"{text}%" if share else text


def _difference(found: Mapping[str, Any] | None, share: bool) -> str | None:
    if found is None:
        return None
    scale, digits = (100, 2) if share else (1, 4)
    text = f"{scale * found['mean']:+.{digits}f}"
    if found["low"] is not None:
        text += f" ({scale * found['low']:+.{digits}f} to {scale * found['high']:+.{digits}f})"
    return text
