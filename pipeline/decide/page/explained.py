"""A section for each test sample that is explained."""

from __future__ import annotations

from typing import Literal

from ..explanation import Explanation, Influence, SampleFacts
from .album import Album
from .charts import bars
from .markup import Markup, data_table, element, label_text, number, percent, query


def explained_section(found: Explanation, album: Album) -> Markup:
    """Return the section of one test sample: its prediction, what spoke for it, and what against."""
    subject = found.subject
    assert subject is not None
    assert found.histogram is not None
    histogram = bars(
        found.histogram.edges,
        found.histogram.counts,
        title=f"Contributions of all {found.totals.pairs:,} training samples to test sample {subject.index}",
        axis="C(i, j); negative harms",
        split=0.0,
    )
    totals = data_table(
        "By training class",
        ("class", "samples", "sum", "helpful", "harmful"),
        (
            (
                label_text(one.label),
                f"{one.totals.pairs:,}",
                number(one.totals.sum, sign=True),
                number(one.totals.positive, sign=True),
                number(one.totals.negative, sign=True),
            )
            for one in found.by_class
        ),
    )
    return element(
        "section",
        element("h3", f"Test sample {subject.index}"),
        element("div", _subject(subject, album), class_="subject"),
        element("h4", "Most helpful"),
        _cards(found, found.helpful, "good", album),
        element("h4", "Most harmful"),
        _cards(found, found.harmful, "bad", album),
        element("div", element("div", histogram), element("div", totals), class_="grid"),
        query(found.command, found.query),
        id=f"test-{subject.index}",
    )


def _subject(one: SampleFacts, album: Album) -> Markup:
    label = label_text(one.label)
    right = one.label >= 0 and one.predicted >= 0
    verdict = "" if not right else ", which is right" if one.label == one.predicted else ", which is wrong"
    parts = [f"Label {label}; predicted {label_text(one.predicted)}"]
    if one.confidence is not None:
        parts.append(f" with {percent(one.confidence)}")
    parts.append(verdict)
    if one.label_confidence is not None and one.label != one.predicted:
        parts.append(f"; its own label has {percent(one.label_confidence)}")
    if one.loss is not None:
        parts.append(f". Loss {number(one.loss)}")
    picture = album.show("test", one.index, f"test sample {one.index}, label {label}")
    return element("div", picture, element("p", "".join(parts) + "."))


def _cards(
    found: Explanation, influences: tuple[Influence, ...], kind: Literal["good", "bad"], album: Album
) -> Markup:
    if not influences:
        return element("p", "None.", class_="note")
    return element("ul", *(_card(found, one, kind, album) for one in influences), class_="cards")


def _card(found: Explanation, one: Influence, kind: str, album: Album) -> Markup:
    label = label_text(one.train_label)
    facts = found.facts("train", one.train_index)
    lines = [f"#{one.train_index}, label {label}"]
    if facts is not None and facts.original_label is not None:
        lines.append(f"was {facts.original_label}")
    if one.suspicion_rank is not None:
        lines.append(
            f"suspicious: rank {one.suspicion_rank:,}" + (", flagged" if facts and facts.flagged else "")
        )
    lines.append(f"C = {number(one.contribution, sign=True)}, {percent(one.share)} of all")
    bar = element(
        "span",
        element("span", class_=kind, style=f"width:{100 * min(1.0, one.share_of_side):.1f}%"),
        class_="share",
        title=f"{percent(one.share_of_side)} of what {'helps' if kind == 'good' else 'harms'}",
    )
    picture = album.show("train", one.train_index, f"training sample {one.train_index}, label {label}")
    return element("li", picture, *(element("div", line) for line in lines), bar)
