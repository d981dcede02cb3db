"""Memory: what ``plan`` says a replay worker needs, against what one really held at most."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import Result

SIZES: Mapping[str, Any] = {
    "cases": (("digits", None, 1), ("digits", None, 8), ("clothes", 1600, 1), ("clothes", 6400, 1)),
    "epochs": 2,
    "threads": 1,
    "repeats": 1,
}
QUICK: Mapping[str, Any] = {**SIZES, "cases": (("digits", None, 1),), "epochs": 1}
FACTOR = 1.3


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Ask for a plan, record, and replay one shard, each in a process of its own."""
    result = Result(name="memory", sizes=sizes)
    for number, (recipe, samples, shards) in enumerate(sizes["cases"]):
        given = {
            "recipe": recipe,
            "samples": samples,
            "shards": shards,
            "epochs": sizes["epochs"],
            "threads": sizes["threads"],
            "out": str(folder / f"memory-{number}"),
        }
        predicted = from_worker("plan", given)
        from_worker("record", given)
        ratios, peaks = [], []
        for _ in range(sizes["repeats"]):
            measured = from_worker("replay", given)
            peaks.append(measured["peak"] / 1e6)
            ratios.append(measured["peak"] / predicted["predicted"])
        name = f"{recipe}, {predicted['tracked']:,} tracked" + (
            f", shard 1 of {shards}" if shards > 1 else ""
        )
        result.add(f"{name}: largest resident set", peaks, "MB")
        note = f"predicted {predicted['predicted'] / 1e6:.0f} MB, {predicted['buffers'] / 1e6:.0f} of them buffers"
        result.add(
            f"{name}: measured / predicted", ratios, "x", at_least=1 / FACTOR, at_most=FACTOR, note=note
        )
    return result


def from_worker(what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a step of ``benchmarks.worker`` answers in a process of its own."""
    text = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", what, json.dumps(given)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    ).stdout
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found
