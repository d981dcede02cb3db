"""The whole page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..explanation import Explanation
from ..looks import Looks
from ..report_facts import Facts
from .album import Album
from .assets import SCRIPT, STYLE, policy
from .explained import explained_section
from .markup import Markup, element, hostile, joined, query, void
from .ranked import ranked_table
from .sections import classes_section, rest_of, run_section, scores_section, timings_section

MOST = 4_900_000
"""Bytes of a page, at most, unless its explained samples alone take more."""


def page(
    facts: Facts, looks: Looks, explanations: Sequence[Explanation], decision: Markup | None = None
) -> tuple[str, int]:
    """Return the report as one HTML document, and how many ranked samples are on it.

    Args:
        facts: What is told.
        looks: How samples look.
        explanations: Of test samples, a section each.
        decision: What cleaning brought, as a section; None: nothing was cleaned.
    """
    album = Album(looks)
    explained = [explained_section(one, album) for one in explanations]
    first = [run_section(facts), scores_section(facts)]
    last: list[Markup | None] = [classes_section(facts)]
    if explained:
        last.append(element("section", element("h2", "Explained predictions"), *explained, id="explained"))
    last += [decision, timings_section(facts)]
    used = sum(len(part.encode()) for part in (*first, *last, STYLE, SCRIPT) if part is not None)
    shown = [one.subject.index for one in explanations if one.subject is not None]
    table, rows = ranked_table(facts, album, shown, MOST - used - 20_000)
    ranked = element(
        "section",
        element("h2", "Ranked training samples"),
        _notes(facts, looks, album, rows),
        table,
        query(_command(facts), rest_of(facts)),
        id="samples",
    )
    title = f"hydra-pipe report: {facts.run.recipe}"
    head = element(
        "head",
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=policy()),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        void("meta", name="referrer", content="no-referrer"),
        void("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    names = [("run", "The run"), ("scores", "Scores"), ("samples", "Ranked samples")]
    names += [("classes", "Class by class")] if last[0] is not None else []
    names += [("explained", "Explained predictions")] if explained else []
    names += [("decision", "Before and after")] if decision is not None else []
    names += [("timings", "Timings")]
    links = (element("li", element("a", text, href=f"#{name}")) for name, text in names)
    body = element(
        "body",
        element(
            "header",
            element("h1", "Which training samples to look at"),
            element("p", hostile(facts.run.recipe), " in ", element("code", facts.run.uri), class_="sub"),
            element("nav", element("ul", *links), aria_label="Sections"),
        ),
        element("main", *first, ranked, *last),
        element(
            "footer",
            element("p", "Made by hydra-pipe. This page fetches nothing and needs no network."),
        ),
        element("script", Markup(SCRIPT)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n", rows


def _notes(facts: Facts, looks: Looks, album: Album, rows: int) -> Markup:
    told = []
    rest = len(facts.ranking) - rows
    if rest:
        told.append(f"{rest:,} more are in the run's Parquet table; the query below gives all.")
    if rows < facts.asked:
        told.append(f"{facts.asked:,} rows were asked for; {rows:,} fit on a page of {MOST / 1e6:g} MB.")
    if looks.note:
        told.append(looks.note[0].upper() + looks.note[1:])
    if album.left_out:
        told.append(f"{album.left_out:,} pictures were left out to keep the page small.")
    told.append("A suspicious sample is one to look at: it may be wrong, or right and hard.")
    return joined(element("p", hostile(text), class_="note") for text in told)


def _command(facts: Facts) -> str:
    where = shlex.quote(facts.run.uri)
    if facts.detection is None:
        return f"hydra-pipe top {where} --harmful -k {len(facts.ranking)} --method {facts.method}"
    return f"hydra-pipe detect {where} --by {facts.detection.values.by}"
