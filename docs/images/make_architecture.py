"""Draw the house from its imports; the test of the house counts the same imports.

    python docs/images/make_architecture.py

writes ``architecture.svg`` beside this file. Every relative import counts, lazy ones and those for
type checkers too. A box lies one floor above the highest box that it imports, and an arrow that a
longer way of arrows already says is left out. Needs nothing but Python.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Path(__file__).with_name("architecture.svg")
ROOMS = ("cli", "pipeline", "workers", "storage")
"""From the top."""

DRAWN_ON_FLOORS = ("pipeline", "workers")
"""Rooms that have sub-rooms; of the others the picture lists the files."""

Graph = dict[str, set[str]]
"""What each thing imports; things are paths without ``.py``, such as ``pipeline/spec/checks``."""


def modules() -> dict[str, Path]:
    """Return every module of the rooms; a package goes by the path of its directory."""
    files = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    named = (path.parent if path.name == "__init__.py" else path.with_suffix("") for path in files)
    return {name.relative_to(ROOT).as_posix(): path for name, path in zip(named, files, strict=True)}


def imported(path: Path, known: Mapping[str, Path], *, typing_too: bool = True) -> Iterator[str]:
    """Yield the modules among ``known`` that a file imports relatively, lazily too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    if not typing_too:
        checks = (n for n in ast.walk(tree) if isinstance(n, ast.If))
        blocks = (n.body for n in checks if ast.unparse(n.test) == "TYPE_CHECKING")
        skipped = {id(n) for body in blocks for line in body for n in ast.walk(line)}
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in skipped:
            base = [*package[: len(package) - node.level + 1], *filter(None, (node.module or "").split("."))]
            for alias in node.names:
                one, whole = "/".join([*base, alias.name]), "/".join(base)
                yield from (name for name in (one if one in known else whole,) if name in known)


@cache
def files_graph(*, typing_too: bool = True) -> Graph:
    """Return which module imports which."""
    known = modules()
    return {name: set(imported(path, known, typing_too=typing_too)) - {name} for name, path in known.items()}


def top_graph(room: str) -> Graph:
    """Return which sub-room or file at the top of a room imports which other one of that room."""
    graph: Graph = {}
    for name, found in files_graph().items():
        if name.startswith(f"{room}/"):
            others = {_top(other) for other in found if other.startswith(f"{room}/")}
            graph.setdefault(_top(name), set()).update(others - {_top(name)})
    return graph


def _top(name: str) -> str:
    return "/".join(name.split("/")[:2])


def circles(graph: Graph) -> list[list[str]]:
    """Return the groups of more than one thing that reach each other."""
    reach = {name: _reached(graph, name) for name in graph}
    groups = {tuple(sorted(m for m in reach[n] if n in reach[m])) for n in graph if n in reach[n]}
    return [list(group) for group in sorted(groups)]


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


def floors(graph: Graph) -> dict[str, int]:
    """Return the floor of each thing, from 1; raises where there is a circle."""
    if circles(graph):
        raise ValueError(f"these import each other: {circles(graph)}")
    found: dict[str, int] = {}
    while len(found) < len(graph):
        for name in graph:
            if name not in found and graph[name] <= set(found):
                found[name] = 1 + max((found[other] for other in graph[name]), default=0)
    return found


def reduced(graph: Graph) -> Graph:
    """Return the graph without the arrows that longer ways already say."""
    return {
        name: {o for o in found if not any(o in _reached(graph, other) for other in found - {o})}
        for name, found in graph.items()
    }


# The picture. Lengths are pixels.

WIDTH, MARGIN, GAP = 860, 16, 24
BOX, FLOOR, LINE = 26, 46, 24
"""Height of a box, from floor to floor, and from line to line of files."""

FILLS = {"cli": "#fdf1d6", "pipeline": "#e3eefb", "workers": "#e6f4e4", "storage": "#f1e8f8"}
INKS = {"cli": "#8a6100", "pipeline": "#1d4f91", "workers": "#2b6a2a", "storage": "#63378a"}


class Layout:
    """Where the boxes of a room lie: floors from the top, with bends for arrows that pass a floor."""

    def __init__(self, graph: Graph) -> None:
        """Lay out ``graph``."""
        self.floor = floors(graph)
        self.height = max(self.floor.values())
        self.down: Graph = {name: set() for name in graph}
        self.chains: list[list[str]] = []
        for name, found in sorted(reduced(graph).items()):
            for other in sorted(found):
                between = range(self.floor[name] - 1, self.floor[other], -1)
                bends = [f"{name}>{other}@{floor}" for floor in between]
                self.floor |= dict(zip(bends, between, strict=True))
                self.chains.append([name, *bends, other])
        for chain in self.chains:
            for above, below in pairwise(chain):
                self.down.setdefault(above, set()).add(below)
        self.up: Graph = {name: {a for a, b in self.down.items() if name in b} for name in self.floor}
        self.rows = [
            sorted(name for name, floor in self.floor.items() if floor == level)
            for level in range(self.height, 0, -1)
        ]
        self.x: dict[str, float] = {}
        self._order()
        self._place()

    def _order(self) -> None:
        """Order each floor so that few arrows cross: by the mean of the neighbours, then by swaps."""
        best = (self._crossings(), [list(row) for row in self.rows])
        for sweep in range(24):
            near = self.up if sweep % 2 == 0 else self.down
            for row in self.rows if sweep % 2 == 0 else reversed(self.rows):
                place = {name: at for other in self.rows for at, name in enumerate(other)}
                key = {n: _mean([place[o] for o in sorted(near.get(n, ()))], place[n]) for n in row}
                row.sort(key=lambda n: key[n])
            self._swap()
            if self._crossings() < best[0]:
                best = (self._crossings(), [list(row) for row in self.rows])
        self.rows = best[1]

    def _swap(self) -> None:
        better = True
        while better:
            better = False
            for row in self.rows:
                for at in range(len(row) - 1):
                    before = self._crossings()
                    row[at], row[at + 1] = row[at + 1], row[at]
                    if self._crossings() < before:
                        better = True
                    else:
                        row[at], row[at + 1] = row[at + 1], row[at]

    def _crossings(self) -> int:
        place = {name: at for row in self.rows for at, name in enumerate(row)}
        total = 0
        for row in self.rows:
            ends = [(place[a], place[b]) for a in row for b in self.down.get(a, ())]
            total += sum(a < c and b > d for a, b in ends for c, d in ends)
        return total

    def _place(self) -> None:
        """Put things below their neighbours as far as their widths allow."""
        for row in self.rows:
            for at, name in enumerate(row):
                self.x[name] = (at - (len(row) - 1) / 2) * 150
        for sweep in range(40):
            for row in self.rows if sweep % 2 == 0 else reversed(self.rows):
                wanted = []
                for name in row:
                    near = [self.x[o] for o in sorted({*self.up[name], *self.down.get(name, ())})]
                    wanted.append(_mean(near, self.x[name]))
                self._spread(row, wanted)
        joined = [at for name, at in self.x.items() if self.up[name] or self.down.get(name)]
        middle = (min(joined) + max(joined)) / 2
        self.x = {name: at - middle + WIDTH / 2 for name, at in self.x.items()}

    def _spread(self, row: list[str], wanted: list[float]) -> None:
        """Place a row as near to ``wanted`` as its order and widths allow, by pooling what collides."""
        offset = [0.0]
        for left, right in pairwise(row):
            offset.append(offset[-1] + (_width(left) + _width(right)) / 2 + GAP)
        blocks: list[list[float]] = []
        for want, shift in zip(wanted, offset, strict=True):
            blocks.append([want - shift])
            while len(blocks) > 1 and _mean(blocks[-2], 0) > _mean(blocks[-1], 0):
                last = blocks.pop()
                blocks[-1] += last
        flat = [_mean(block, 0) for block in blocks for _ in block]
        self.x |= {name: at + shift for name, at, shift in zip(row, flat, offset, strict=True)}


def _mean(values: list[float] | list[int], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _width(name: str) -> float:
    return 8 if "@" in name else 8.2 * len(_label(name)) + 20


def _label(name: str) -> str:
    return name.split("/")[1] + ("/" if (ROOT / name).is_dir() else ".py")


def _box(name: str, x: float, y: float, room: str) -> str:
    width = _width(name)
    return (
        f'<rect x="{x - width / 2:.0f}" y="{y - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}" rx="4" '
        f'fill="white" stroke="{INKS[room]}"/>\n'
        f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{_label(name)}</text>'
    )


def _arrow(points: list[tuple[float, float]], room: str) -> str:
    """Return a curve through the points, straight down at each of them."""
    (x, y), *others = points
    path = [f"M{x:.0f} {y:.0f}"]
    for at, to in others:
        path.append(f"C{x:.0f} {(y + to) / 2:.0f} {at:.0f} {(y + to) / 2:.0f} {at:.0f} {to:.0f}")
        x, y = at, to
    return f'<path marker-end="url(#{room})" d="{" ".join(path)}"/>'


def _on_floors(room: str, top: float) -> tuple[list[str], float]:
    layout = Layout(top_graph(room))
    height = {n: top + FLOOR * (layout.height - floor) + BOX for n, floor in layout.floor.items()}
    arrows = []
    for chain in layout.chains:
        points = [(layout.x[name], height[name]) for name in chain]
        points[0] = (points[0][0], points[0][1] + BOX / 2)
        points[-1] = (points[-1][0], points[-1][1] - BOX / 2 - 6)
        arrows.append(_arrow(points, room))
    boxes = [_box(name, layout.x[name], height[name], room) for name in sorted(top_graph(room))]
    ink = f'<g fill="none" stroke="{INKS[room]}" stroke-opacity="0.75">'
    numbers = [
        f'<text x="{MARGIN + 14}" y="{top + FLOOR * (layout.height - floor) + BOX + 4:.0f}" '
        f'font-size="11" fill="{INKS[room]}">floor {floor}</text>'
        for floor in range(layout.height, 0, -1)
    ]
    return [*numbers, ink, *arrows, "</g>", *boxes], FLOOR * (layout.height - 1) + 2 * BOX


def _in_lines(names: Iterable[str], room: str, top: float) -> tuple[list[str], float]:
    """Return the files of a room in lines, and their height."""
    lines, x, y = [], MARGIN + 14.0, top + LINE - 6
    for name in names:
        width = 8.2 * len(_label(name)) + 12
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN + 14.0, y + LINE
        lines.append(f'<text x="{x:.0f}" y="{y:.0f}" fill="{INKS[room]}">{_label(name)}</text>')
        x += width
    return lines, y - top + 8


def picture() -> str:
    """Return the picture as SVG."""
    parts: list[str] = []
    y = 10.0
    for room in ROOMS:
        names = sorted(name for name in top_graph(room) if not name.endswith("__main__"))
        inside, height = (
            _on_floors(room, y + 26) if room in DRAWN_ON_FLOORS else _in_lines(names, room, y + 26)
        )
        band = f'x="{MARGIN}" y="{y:.0f}" width="{WIDTH - 2 * MARGIN}" height="{height + 32:.0f}" rx="8"'
        title = f'x="{MARGIN + 14}" y="{y + 21:.0f}" font-size="16" font-weight="bold" fill="{INKS[room]}"'
        parts += [f'<rect {band} fill="{FILLS[room]}"/>', f"<text {title}>{room}/</text>", *inside]
        y += height + 32 + 24
        if room != ROOMS[-1]:
            parts.append(
                f'<path d="M{WIDTH / 2:.0f} {y - 22:.0f}V{y - 8:.0f}" stroke="#555" stroke-width="3" '
                'marker-end="url(#room)"/>'
            )
    heads = [
        f'<marker id="{name}" viewBox="0 0 10 10" refX="4" refY="5" markerWidth="{size}" '
        f'markerHeight="{size}" orient="auto"><path d="M0 0L10 5L0 10z" fill="{ink}" stroke="none"/></marker>'
        for name, ink, size in [*((r, INKS[r], 7) for r in DRAWN_ON_FLOORS), ("room", "#555", 3)]
    ]
    size, fonts = f'width="{WIDTH}" height="{y - 14:.0f}"', "DejaVu Sans Mono, Menlo, Consolas, monospace"
    look = f'viewBox="0 0 {WIDTH} {y - 14:.0f}" font-family="{fonts}" font-size="13" fill="#222"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>',
            "<!-- made by docs/images/make_architecture.py -->",
            f"<defs>{''.join(heads)}</defs>",
            f'<rect {size} fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
