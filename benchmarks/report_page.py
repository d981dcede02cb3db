"""Report: wall time, memory and size of ``hydra-pipe report`` on a made-up run of many contributions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .detect import make_run, timed
from .report import Result

SIZES: Mapping[str, Any] = {
    "samples": 100_000,
    "tests": 1000,
    "classes": 10,
    "rows": (500, 100_000),
    "rounds": 1,
}
QUICK: Mapping[str, Any] = {**SIZES, "samples": 2000, "tests": 50, "rows": (100,)}


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Make the run, detect in it, and report it, each command in a process of its own."""
    result = Result(name="report_page", sizes=sizes)
    place, page = folder / "run", folder / "page.html"
    make_run(place, samples=sizes["samples"], tests=sizes["tests"], classes=sizes["classes"])
    timed(["detect", str(place), "--by", "contribution"])
    name = f"{sizes['samples']:,} x {sizes['tests']:,} contributions"
    for rows in sizes["rows"]:
        words = [
            "report",
            str(place),
            "--to",
            str(page),
            "--overwrite",
            "--rows",
            str(rows),
            "--explain",
            "3",
        ]
        taken = [timed(words) for _ in range(sizes["rounds"])]
        what = f"{name}, --rows {rows:,}"
        result.add(f"{what}: time", [one[0] for one in taken], "s", at_most=60)
        result.add(
            f"{what}: processor time", [one[1] for one in taken], "s", note="what a busy machine leaves alone"
        )
        result.add(f"{what}: largest resident set", [one[2] / 1e9 for one in taken], "GB", at_most=2)
        result.add(f"{what}: the page", [page.stat().st_size / 1e6], "MB", at_most=5)
    return result
