"""How an explanation becomes tables and pictures for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from .output import Column, Table, plain

if TYPE_CHECKING:
    from ..pipeline.decide.explanation import Explanation, SampleFacts

INFLUENCES = (
    *("direction", "rank", "train_index", "train_label", "test_index", "test_label", "contribution"),
    *(
        "share",
        "share_of_side",
        "suspicion_rank",
        "original_label",
        "predicted",
        "confidence",
        "text",
        "picture",
    ),
)
"""Columns of the CSV."""

SHOWN_CLASSES = 20
"""Classes that a table shows; JSON has all."""

_WIDTH = 96
_TEXT = 28


def explanation_rows(found: Explanation) -> list[dict[str, Any]]:
    """Return one row a contribution shown, with what is known of the sample it is about."""
    rows = []
    for direction, one in found.influences():
        other = ("test", one.test_index) if found.question == "train" else ("train", one.train_index)
        facts = found.facts(*other)
        row = {name: getattr(one, name) for name in INFLUENCES[1:10]}
        row |= {name: None if facts is None else getattr(facts, name) for name in INFLUENCES[10:]}
        labels = {name: _known(row[name]) for name in ("train_label", "test_label", "predicted")}
        rows.append({"direction": direction, **row, **labels})
    return rows


def explanation_tables(found: Explanation, drawn: Mapping[str, Sequence[str]]) -> list[Table | str]:
    """Return an explanation for people.

    Args:
        found: The explanation.
        drawn: Lines of pictures: of the ``subject``, and of the ``helpful`` and ``harmful`` samples.
    """
    parts: list[Table | str] = [plain(f"{found.asked} ({found.method})")]
    if found.subject is not None:
        parts += [plain(_told(found.subject)), *drawn.get("subject", ())]
    totals = found.totals
    told = f"{totals.pairs:,} contributions, sum {totals.sum:+.3e}: "
    told += (
        f"{totals.helpful:,} help ({totals.positive:+.3e}), {totals.harmful:,} harm ({totals.negative:+.3e})"
    )
    parts += [told, ""]
    rows = explanation_rows(found)
    for direction in ("helpful", "harmful"):
        chosen = [row for row in rows if row["direction"] == direction]
        if not chosen:
            parts += [f"nothing is {direction}", ""]
            continue
        parts += [Table(title=f"most {direction}", columns=_columns(found, chosen), rows=_short(chosen))]
        parts += [*drawn.get(direction, ()), ""]
    if found.by_class:
        what = "training" if found.question == "test" else "test"
        classes = [
            {"label": _known(one.label), "samples": one.totals.pairs, "sum": one.totals.sum}
            | {"positive": one.totals.positive, "negative": one.totals.negative}
            for one in found.by_class[:SHOWN_CLASSES]
        ]
        columns = (
            Column(key="label", header=f"{what} class", right=True),
            Column(key="samples", header="samples", right=True),
            Column(key="sum", header="sum", right=True, kind="signed"),
            Column(key="positive", header="helpful", right=True, kind="signed"),
            Column(key="negative", header="harmful", right=True, kind="signed"),
        )
        parts.append(Table(title=f"by {what} class", columns=columns, rows=classes))
        if len(found.by_class) > SHOWN_CLASSES:
            parts.append(f"  and {len(found.by_class) - SHOWN_CLASSES:,} more; --format json shows all")
    return parts


def strip(pictures: Sequence[Sequence[str]]) -> list[str]:
    """Return pictures side by side, as many as fit, each given as lines that are a picture's width."""
    fitting, width = list[Sequence[str]](), 0
    for lines in pictures:
        width += lines[0].count("▀") + 2
        if width > _WIDTH:
            break
        fitting.append(lines)
    if not fitting:
        return []
    blanks = [" " * lines[0].count("▀") for lines in fitting]
    rows = zip_longest(*fitting)
    return ["  ".join(part or blanks[k] for k, part in enumerate(row)) for row in rows]


def _told(one: SampleFacts) -> str:
    """Return what is known of a sample, in a line."""
    parts = [f"{'training' if one.part == 'train' else 'test'} sample {one.index}"]
    parts.append("no label" if one.label < 0 else f"label {one.label}")
    if one.original_label is not None:
        parts.append(f"was {one.original_label}")
    if one.predicted >= 0:
        sure = "" if one.confidence is None else f" with {one.confidence:.1%}"
        parts.append(f"predicted {one.predicted}{sure}")
    if one.label_confidence is not None and one.label != one.predicted:
        parts.append(f"its label has {one.label_confidence:.1%}")
    if one.loss is not None:
        parts.append(f"loss {one.loss:.4g}")
    if one.suspicion_rank is not None:
        parts.append(f"suspicious: rank {one.suspicion_rank:,}" + (", flagged" if one.flagged else ""))
    return "; ".join([*parts, *([one.text] if one.text else [])])


def _columns(found: Explanation, rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    train = [
        Column(key="train_index", header="train", right=True),
        Column(key="train_label", header="label", right=True),
    ]
    was = Column(key="original_label", header="was", right=True)
    suspicion = Column(key="suspicion_rank", header="suspicious", right=True)
    test = [
        Column(key="test_index", header="test", right=True),
        Column(key="test_label", header="label", right=True),
    ]
    predicted = (
        Column(key="predicted", header="predicted", right=True),
        Column(key="confidence", header="with", right=True),
    )
    of_side = Column(key="share_of_side", header="of its sign", right=True)
    columns = [Column(key="rank", header="rank", right=True)]
    columns += {
        "test": [*train, was, suspicion],
        "train": [*test, *predicted],
        "classes": [train[0], was, suspicion, test[0]],
        "sets": [*train, was, *test],
    }[found.question]
    columns += [
        Column(key="contribution", header="contribution", right=True, kind="signed"),
        Column(key="share", header="of all", right=True),
        *([of_side] if found.subject is not None else []),
        Column(key="text", header="text"),
    ]
    empty = {
        key
        for key in ("original_label", "suspicion_rank", "predicted", "confidence", "text")
        if not any(row[key] is not None for row in rows)
    }
    return [column for column in columns if column.key not in empty]


def _short(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with shares in percent and texts cut."""
    found = []
    for row in rows:
        percents = {
            key: None if row[key] is None else f"{row[key]:.1%}"
            for key in ("share", "share_of_side", "confidence")
        }
        text = None if row["text"] is None else plain(row["text"], limit=_TEXT)
        index = None if row["test_index"] == -1 else row["test_index"]
        found.append({**row, **percents, "text": text, "test_index": index})
    return found


def _known(label: int | None) -> int | None:
    return None if label is None or label < 0 else label
