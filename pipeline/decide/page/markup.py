"""HTML as text: everything that comes from a run or a recipe is escaped here."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

Attributes = Mapping[str, object]


class Markup(str):
    """Text that is HTML already; any other text is escaped where it is put into an element."""

    __slots__ = ()


def escaped(value: object) -> str:
    """Return a value as HTML text, also inside quotes; control characters and halves of characters become U+FFFD."""
    if isinstance(value, Markup):
        return value
    text = "".join(c if c.isprintable() or c in "\n\t" or ord(c) > 0x9F else "\ufffd" for c in str(value))
    text = text.encode("utf-8", "replace").decode("utf-8")
    return html.escape(text)


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element; an attribute that is None or False is left out, ``class_`` is ``class``."""
    inside = "".join(escaped(child) for child in children if child is not None)
    return Markup(f"<{name}{_attributes(attributes)}>{inside}</{name}>")


def void(name: str, /, **attributes: object) -> Markup:
    """Return an element without contents."""
    return Markup(f"<{name}{_attributes(attributes)}>")


def joined(parts: Iterable[object]) -> Markup:
    """Return parts one after the other."""
    return Markup("".join(escaped(part) for part in parts if part is not None))


def hostile(text: str) -> Markup:
    """Return text of unknown origin, isolated, so that its direction of writing stays its own."""
    return element("bdi", text)


def data_table(caption: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a small table; the first cell of a row is its header."""
    head = element("tr", *(element("th", text, scope="col") for text in headers))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]))
        for row in rows
    )
    table = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", head),
        element("tbody", *body),
        class_="small",
    )
    return scrolling(caption, table)


def scrolling(label: str, table: Markup) -> Markup:
    """Return a table in a region that scrolls by itself, by keyboard too."""
    return element("div", table, class_="scroll", role="region", aria_label=label, tabindex=0)


def query(*texts: str) -> Markup:
    """Return what gives the same numbers again: commands and SQL, to be unfolded."""
    blocks = (element("pre", element("code", text)) for text in texts if text)
    return element("details", element("summary", "Query"), *blocks, class_="query")


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Return a number as people read it; a dash stands for none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:{'+' if sign and value else ''}.{digits}g}"
    return text.replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share of 1 in percent."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}%"


def label_text(label: int | None) -> str:
    """Return a class; a dash stands for none."""
    return "–" if label is None or label < 0 else str(label)


def _attributes(given: Attributes) -> str:
    parts = []
    for name, value in given.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        parts.append(f" {name}" if value is True else f' {name}="{escaped(value)}"')
    return "".join(parts)
