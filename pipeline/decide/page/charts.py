"""Charts as inline SVG; colours are the page's, so that both colour schemes have their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import Markup, element, label_text, number

WRITTEN = 12
"""Classes up to which a map has its numbers written into it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a chart.

    Attributes:
        name: What it is.
        style: Class of the page's style: ``main``, ``ideal`` or ``chance``.
        points: (x, y), both from 0 to 1.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]


def chart(width: int, height: int, title: str, told: str, *parts: object) -> Markup:
    """Return a figure: an SVG with title and description, and the title below it."""
    drawn = element(
        "svg",
        element("title", title),
        element("desc", told),
        *parts,
        viewBox=f"0 0 {width} {height}",
        role="img",
        style=f"max-width:{width}px",
    )
    return element("figure", drawn, element("figcaption", title))


def bars(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    title: str,
    axis: str,
    cut: float | None = None,
    cut_name: str = "cut",
    split: float | None = None,
) -> Markup:
    """Return a histogram: ``counts[k]`` between ``edges[k]`` and ``edges[k + 1]``, with a line at the cut.

    Args:
        edges: K + 1, ascending.
        counts: K.
        title: Of the figure.
        axis: What is along it.
        cut: Where the line is; None: there is none.
        cut_name: What is written beside it.
        split: Bars below it are those that harm; None: all are alike.
    """
    wide, high, left, bottom = 560, 230, 44, 36
    low, top = edges[0], edges[-1]
    span, most = (top - low) or 1.0, max(counts) or 1

    def x(value: float) -> float:
        return left + (wide - left - 12) * (value - low) / span

    def y(count: float) -> float:
        return high - bottom - (high - bottom - 22) * count / most

    drawn: list[Markup] = []
    for start, stop, count in zip(edges, edges[1:], counts, strict=False):
        kind = "plain" if split is None else "bad" if (start + stop) / 2 < split else "good"
        box = element(
            "rect",
            element("title", f"{number(start)} to {number(stop)}: {count:,}"),
            x=f"{x(start) + 0.5:.1f}",
            y=f"{y(count):.1f}",
            width=f"{max(x(stop) - x(start) - 1, 0.5):.1f}",
            height=f"{high - bottom - y(count):.1f}",
            class_=kind,
        )
        drawn.append(box)
    drawn.append(_line(left, high - bottom, wide - 12, high - bottom, "axis"))
    ticks = [low + span * k / 4 for k in range(5)]
    drawn += [_text(x(v), high - bottom + 14, number(v, 2), "middle") for v in ticks]
    drawn += [_text(left - 6, y(most) + 4, f"{most:,}", "end"), _text(left - 6, y(0) + 1, "0", "end")]
    drawn.append(_text((left + wide) / 2, high - 4, axis, "middle"))
    told = f"{sum(counts):,} values from {number(low)} to {number(top)}; most, {most:,}, in one bar"
    if cut is not None and low <= cut <= top:
        drawn.append(_line(x(cut), 14, x(cut), high - bottom, "cut"))
        side = "end" if x(cut) > wide / 2 else "start"
        shift = -5 if side == "end" else 5
        drawn.append(_text(x(cut) + shift, 13, f"{cut_name} {number(cut)}", side))
        told += f"; {cut_name} at {number(cut)}"
    return chart(wide, high, title, told, *drawn)


def lines(drawn: Sequence[Line], *, title: str, told: str, across: str, up: str) -> Markup:
    """Return lines over shares of 1."""
    wide, high, left, bottom, top, right = 360, 260, 44, 40, 22, 24

    def at(point: tuple[float, float]) -> str:
        return f"{left + (wide - left - right) * point[0]:.1f},{high - bottom - (high - bottom - top) * point[1]:.1f}"

    parts: list[Markup] = []
    for k in range(5):
        x, y = (float(v) for v in at((k / 4, k / 4)).split(","))
        parts += [_line(left, y, wide - right, y, "grid"), _text(left - 6, y + 4, f"{25 * k}%", "end")]
        parts.append(_text(x, high - bottom + 15, f"{25 * k}%", "middle"))
    for line in drawn:
        parts.append(
            element(
                "polyline",
                element("title", line.name),
                points=" ".join(map(at, line.points)),
                class_=line.style,
            )
        )
    parts.append(_text((left + wide) / 2, high - 6, across, "middle"))
    parts.append(_text(2, 12, f"{up} ↑", "start"))
    legend = element(
        "p", *(element("span", element("i", class_=line.style), line.name) for line in drawn), class_="legend"
    )
    return element("div", chart(wide, high, title, told, *parts), legend)


def heat(
    rows: Sequence[int],
    columns: Sequence[int],
    value: Callable[[int, int], float | None],
    *,
    title: str,
    down: str,
    across: str,
    sign: bool = True,
) -> Markup:
    """Return a map of classes by classes; the stronger a cell, the larger its size, and signs are written.

    Args:
        rows: Classes down.
        columns: Classes across.
        value: Of a row and a column by position; None or NaN: there is none.
        title: Of the figure.
        down: What the rows are.
        across: What the columns are.
        sign: Whether values have signs, or are counts.
    """
    written = max(len(rows), len(columns)) <= WRITTEN
    cell = 40 if written else max(10, min(22, 480 // max(len(rows), len(columns))))
    left, top = 46, 40
    values = [[value(i, j) for j in range(len(columns))] for i in range(len(rows))]
    known = [v for row in values for v in row if v is not None and math.isfinite(v)]
    most = max((abs(v) for v in known), default=0.0) or 1.0
    power = math.floor(math.log10(most)) if sign else 0
    power = 0 if -1 <= power <= 1 else power
    places = 2 if sign and most / 10**power < 1 else 1
    drawn: list[Markup] = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            v = values[i][j]
            there = v is not None and math.isfinite(v)
            shown = ("–" if v is None else f"{int(v):,}") if not sign else number(v, 2, sign=True)
            strength = abs(v) / most if there and v is not None else 0.0
            kind = "none" if not there else "good" if sign and v is not None and v > 0 else "bad"
            drawn.append(
                element(
                    "rect",
                    element("title", f"{down} {label_text(row)}, {across} {label_text(column)}: {shown}"),
                    x=left + j * cell,
                    y=top + i * cell,
                    width=cell - 1,
                    height=cell - 1,
                    class_=kind,
                    fill_opacity=f"{0.06 + 0.74 * strength:.2f}",
                )
            )
            if written and there and (sign or v):
                short = f"{v / 10**power:+.{places}f}".replace("-", "−") if sign and v is not None else shown
                drawn.append(
                    _text(left + (j + 0.5) * cell, top + (i + 0.5) * cell + 3.5, short, "middle", "cell")
                )
    step = 1 if written else max(1, math.ceil(14 / cell))
    drawn += [
        _text(left - 6, top + (i + 0.5) * cell + 4, label_text(row), "end")
        for i, row in enumerate(rows)
        if i % step == 0
    ]
    drawn += [
        _text(left + (j + 0.5) * cell, top - 6, label_text(column), "middle")
        for j, column in enumerate(columns)
        if j % step == 0
    ]
    drawn += [_text(left, 12, f"{across} →", "start"), _text(2, top - 6, f"{down} ↓", "start")]
    if written and power:
        title += f"; numbers times 1e{power}"
    told = f"{len(rows)} rows ({down}) and {len(columns)} columns ({across})"
    if known:
        told += f"; values from {number(min(known))} to {number(max(known))}"
    return chart(left + len(columns) * cell + 8, top + len(rows) * cell + 8, title, told, *drawn)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=kind)


def _text(x: float, y: float, text: str, anchor: str, kind: str | None = None) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=kind)
