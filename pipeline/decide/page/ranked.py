"""The table of ranked samples: sorted and filtered by the page's script, whole without it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from ..report_facts import Facts, Harmed, Ranked
from .album import Album
from .markup import Markup, element, hostile, joined, label_text, number, scrolling


def ranked_table(facts: Facts, album: Album, explained: Iterable[int], room: int) -> tuple[Markup, int]:
    """Return the table and how many rows it has: as many as fit into ``room`` bytes.

    Args:
        facts: What is told.
        album: Shows the samples.
        explained: Test samples that have a section of their own, for links.
        room: Bytes.
    """
    links, judged = set(explained), facts.detection is not None
    truth = any(row.original is not None for row in facts.rows) or facts.truth is not None
    rows: list[Markup] = []
    for one in facts.rows:
        row = _row(facts, one, album, links, judged=judged, truth=truth)
        room -= len(row.encode())
        if room < 0:
            break
        rows.append(row)
    names = [("sample", True), ("rank", True), ("given", True)]
    names += [("suggested", True)] if judged else []
    names += [("was", True)] if truth else []
    names += [("score" if judged else "C(i)", True)]
    names += [("flagged", True)] if judged else []
    names += [("why, and whom it harms most", False)]
    head = element("tr", *(element("th", name, scope="col", data_sorts=sorts) for name, sorts in names))
    told = "score: 0 to 1, low is bad" if judged else "C(i): mean contribution, negative harms"
    caption = f"The {len(rows):,} most suspicious of {len(facts.ranking):,} training samples; {told}"
    if truth:
        caption += "; was: the label before it was made wrong on purpose"
    table = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", head),
        element("tbody", *rows),
        id="ranked",
    )
    parts = (_filters(facts, len(rows)), scrolling("Ranked training samples", table), _pager())
    return joined(parts), len(rows)


def _row(facts: Facts, one: Ranked, album: Album, links: set[int], *, judged: bool, truth: bool) -> Markup:
    label = label_text(one.given)
    told = f"training sample {one.train_index}, label {label}, {'score' if judged else 'C(i)'} {number(one.score)}"
    picture = album.show("train", one.train_index, told)
    name = element("span", f"#{one.train_index}")
    differs = one.suggested >= 0 and one.suggested != one.given
    cells = [
        element("th", element("span", picture, name, class_="sample"), scope="row", data_v=one.train_index),
        element("td", one.rank, data_v=one.rank, class_="n"),
        element("td", label, data_v=_key(one.given), class_="n"),
    ]
    if judged:
        cells.append(
            element("td", label_text(one.suggested), data_v=_key(one.suggested), class_="n suggested")
        )
    if truth:
        was = one.original
        cells.append(element("td", label_text(was), data_v="" if was is None else was, class_="n"))
    cells.append(element("td", number(one.score), data_v=repr(one.score), class_="n"))
    if judged:
        mark = element("span", "yes", class_="flag") if one.flagged else "no"
        cells.append(element("td", mark, data_v=0 if one.flagged else 1, class_="n"))
    cells.append(element("td", hostile(one.reason), _harm(facts, one, album, links), class_="why"))
    return element(
        "tr",
        *cells,
        id=f"train-{one.train_index}",
        class_=" ".join(["flagged"] * one.flagged + ["differs"] * differs) or None,
        data_given=label,
        data_suggested=label_text(one.suggested),
        data_flagged=int(one.flagged),
    )


def _harm(facts: Facts, one: Ranked, album: Album, links: set[int]) -> Markup:
    """Return whom a sample harms most, to be unfolded."""
    if one.worst_class >= 0:
        head = f"harms class {one.worst_class} most, mean C {number(one.worst_mean, 2)}"
    elif one.harmed:
        head = f"harms {len(one.harmed)} test samples most"
    else:
        head = "harms no test sample that is known"
    items = [_harmed(test, album, links) for test in one.harmed]
    command = (
        f"hydra-pipe explain {shlex.quote(facts.run.uri)} --train {one.train_index} --method {facts.method}"
    )
    return element(
        "details",
        element("summary", head),
        element("ul", *items, class_="harmed") if items else None,
        element("pre", element("code", command)),
    )


def _harmed(test: Harmed, album: Album, links: set[int]) -> Markup:
    label = label_text(test.label)
    if test.test_index < 0:
        return element("li", f"class {label}: {number(test.contribution)}")
    name: object = f"test {test.test_index}"
    if test.test_index in links:
        name = element("a", name, href=f"#test-{test.test_index}")
    picture = album.show("test", test.test_index, f"test sample {test.test_index}, label {label}")
    return element("li", picture, element("span", name, f", label {label}: {number(test.contribution)}"))


def _key(label: int) -> object:
    return "" if label < 0 else label


def _filters(facts: Facts, shown: int) -> Markup:
    """Return the filters; the script shows them, since they do nothing without it."""
    rows = facts.rows[:shown]
    judged = facts.detection is not None

    def choice(name: str, title: str, labels: Iterable[int]) -> Markup:
        options = [element("option", "all", value="")]
        options += [element("option", label_text(c), value=label_text(c)) for c in sorted(set(labels))]
        return element(
            "label", title, element("select", *options, name=name), hidden=not judged and name != "given"
        )

    flagged = element(
        "label",
        Markup('<input type="checkbox" name="flagged">'),
        "only flagged",
        class_="check",
        hidden=not judged,
    )
    text = element("label", "text", Markup('<input type="search" name="text" autocomplete="off">'))
    return element(
        "form",
        choice("given", "given label", (row.given for row in rows)),
        choice("suggested", "suggested label", (row.suggested for row in rows)),
        text,
        flagged,
        element("button", "Reset", type="reset"),
        element("p", role="status", aria_live="polite", id="said", class_="note"),
        id="filters",
        hidden=True,
        aria_label="Filter the ranked samples",
    )


def _pager() -> Markup:
    buttons = (
        element("button", text, type="button", id=name)
        for name, text in (("back", "Previous"), ("next", "Next"), ("every", "Show all"))
    )
    return element("div", *buttons, element("span", "", id="where"), id="pager", hidden=True)
