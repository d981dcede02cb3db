"""What an experiment found: tables with the published numbers beside ours, and where the pictures are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Shown

from ..report import machine

Cell = str | float | int | None


@dataclass(kw_only=True, slots=True)
class Table:
    """A table of results.

    Attributes:
        title: What it shows.
        columns: Their headings.
        rows: Cells: text, a number, or None where there is none.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Outcome:
    """All that an experiment found.

    Attributes:
        name: Of the experiment.
        sizes: It ran with.
        tables: Results.
        notes: What a reader must know: what differs from the paper, what was not done.
        pictures: Files that were drawn.
        details: Further values, JSON-able, that no table shows.
    """

    name: str
    sizes: Mapping[str, Any]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def table(self, title: str, *columns: str) -> Table:
        """Add an empty table and return it."""
        self.tables.append(Table(title=title, columns=columns))
        return self.tables[-1]


def number(value: Cell) -> str:
    """Return a cell as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if 0.1 <= abs(value) < 1e4 else f"{value:.3g}"
    return str(value)


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Return mean ± sample standard deviation of values over seeds, or the value of one seed."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return f"{scale * mean:.2f}"
    deviation = (sum((v - mean) ** 2 for v in values) / (count - 1)) ** 0.5
    return f"{scale * mean:.2f} ± {scale * deviation:.2f}"


def save(outcome: Outcome, scale: str, seconds: float, folder: Path) -> Path:
    """Write ``<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{outcome.name}.json"
    text = {
        "name": outcome.name,
        "scale": scale,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "sizes": dict(outcome.sizes),
        "tables": [
            {"title": t.title, "columns": list(t.columns), "rows": [list(row) for row in t.rows]}
            for t in outcome.tables
        ],
        "notes": outcome.notes,
        "pictures": outcome.pictures,
        "details": outcome.details,
    }
    path.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n")
    return path


def show(outcome: Outcome, console: Console) -> None:
    """Print the tables and the notes."""
    for table in outcome.tables:
        shown = Shown(title=f"{outcome.name}: {table.title}", title_justify="left", title_style="bold")
        for k, heading in enumerate(table.columns):
            shown.add_column(heading, justify="right" if k else "left")
        for row in table.rows:
            shown.add_row(*(number(cell) for cell in row))
        console.print(shown)
    for note in outcome.notes:
        console.print(f"- {note}", markup=False, highlight=False)
