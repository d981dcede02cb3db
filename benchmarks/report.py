"""What a benchmark found: lines of a table, and the same as JSON with date and machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from .timing import median, middle_half

RESULTS = Path(__file__).parent / "results"
TOO_WIDE = 0.3
"""A goal is not judged where the middle half of the measurements is wider than this share of the median."""

PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "pyarrow", "ray")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One figure.

    Attributes:
        what: What was measured.
        value: The median.
        unit: Its unit; ``x`` for ratios.
        low: Lower quartile, None for a figure measured once.
        high: Upper quartile.
        goal: Limit that was set beforehand, as text, or empty.
        met: Whether the median is within it; None where there is none, or too much noise to say.
        note: What a reader should know.
    """

    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    goal: str = ""
    met: bool | None = None
    note: str = ""


@dataclass(kw_only=True, slots=True)
class Result:
    """Lines of one benchmark and the sizes it ran with."""

    name: str
    sizes: Mapping[str, Any]
    lines: list[Line] = field(default_factory=list)

    def add(
        self,
        what: str,
        values: Sequence[float],
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        note: str = "",
    ) -> float:
        """Add the median of some measurements and return it.

        Args:
            what: What was measured.
            values: Measurements, one or more.
            unit: Their unit.
            at_most: Goal.
            at_least: Goal.
            note: Remark.
        """
        value = median(values)
        low, high = middle_half(values) if len(values) > 1 else (None, None)
        goals = [(at_least, "≥", lambda v, g: v >= g), (at_most, "≤", lambda v, g: v <= g)]
        chosen: list[tuple[float, str, Callable[[float, float], bool]]] = [
            (limit, sign, test) for limit, sign, test in goals if limit is not None
        ]
        met = all(test(value, limit) for limit, _, test in chosen) if chosen else None
        if met is not None and low is not None and high is not None and high - low > TOO_WIDE * value:
            met, note = None, f"too noisy to judge; {note}".removesuffix("; ")
        goal = ", ".join(f"{sign} {limit:g}" for limit, sign, _ in chosen)
        self.lines.append(
            Line(what=what, value=value, unit=unit, low=low, high=high, goal=goal, met=met, note=note)
        )
        return value


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, memory, versions, and how busy the machine was."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def save(result: Result, load: Sequence[float], folder: Path = RESULTS) -> Path:
    """Write ``<name>.json``; ``load`` are the load averages before and after, to judge the noise by."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    text = {
        "name": result.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load_before_and_after": [round(value, 2) for value in load],
        "sizes": dict(result.sizes),
        "lines": [asdict(line) for line in result.lines],
    }
    path.write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n")
    return path


def show(result: Result, console: Console) -> None:
    """Print the lines as a table."""
    table = Table(title=result.name, title_justify="left", title_style="bold")
    for heading, justify in (("measured", "left"), ("median", "right"), ("unit", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for heading in ("middle half", "goal", "met", "note"):
        table.add_column(heading)
    for line in result.lines:
        spread = "" if line.low is None or line.high is None else f"{line.low:.3g} – {line.high:.3g}"
        met = {None: "", True: "yes", False: "[bold]no[/bold]"}[line.met]
        table.add_row(line.what, f"{line.value:.3g}", line.unit, spread, line.goal, met, line.note)
    console.print(table)
