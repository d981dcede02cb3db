"""``python -m benchmarks paper NAME … --scale quick|two-cores|full``: one experiment of the papers or several."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..report import RESULTS
from .outcome import save, show
from .steps import Steps

WIDE = 140
"""Columns of the tables where there is no terminal that says otherwise."""

EXPERIMENTS: Mapping[str, str] = {
    "figure2": "maps",
    "table2": "extremes",
    "table3": "cleaning",
    "supplement-table4": "cleaning",
    "table4": "clusters",
    "supplement-figure1": "growth",
    "outliers": "outliers",
    "found": "found",
}
"""Module of each experiment; it has ``SIZES`` by experiment and scale, and ``experiment(name, sizes, steps)``."""

SCALES = ("quick", "two-cores", "full")
WORK = Path("runs/paper")
PICTURES = Path("docs/images")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks paper",
        description=__doc__,
        epilog="example: python -m benchmarks paper found --scale two-cores",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="two-cores",
        help="quick: does it run; two-cores: all within two hours on two cores; full: the papers' sizes",
    )
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a size of the experiment, as a Python literal: --size seeds=1",
    )
    parser.add_argument("--work", type=Path, default=WORK, help=f"where finished steps are kept ({WORK})")
    parser.add_argument(
        "--results", type=Path, help=f"where <name>.json goes ({RESULTS.name}/paper; --scale quick: nowhere)"
    )
    parser.add_argument(
        "--figures", type=Path, help=f"where pictures go ({PICTURES}; --scale quick: into --work)"
    )
    found = parser.parse_args(arguments)
    unknown = [name for name in found.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"unknown experiment {unknown[0]}; choose from {', '.join(EXPERIMENTS)}")
    return found


def sizes_of(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return an experiment's sizes at the chosen scale, with those of the command line put in."""
    module = importlib.import_module(f".{EXPERIMENTS[name]}", __package__)
    sizes = dict(module.SIZES[name][chosen.scale])
    for text in chosen.size:
        key, _, value = text.partition("=")
        if key not in sizes:
            if len(chosen.names) == 1:
                sys.exit(f"--size {text}: {name} has no size {key!r}; it has {', '.join(sizes)}")
            continue
        try:
            sizes[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            sys.exit(f"--size {text}: {value!r} is no Python literal; write text in quotes")
    return sizes


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> None:
    """Run the chosen experiments one after the other."""
    chosen = parse(arguments)
    console = console or Console(width=None if sys.stdout.isatty() else WIDE)
    quick = chosen.scale == "quick"
    for name in chosen.names or EXPERIMENTS:
        module = importlib.import_module(f".{EXPERIMENTS[name]}", __package__)
        work = chosen.work / chosen.scale
        steps = Steps(work / name, lambda text, name=name: console.print(f"[dim]{name}: {text}[/dim]"))
        pictures = chosen.figures or (work / "figures" if quick else PICTURES)
        pictures.mkdir(parents=True, exist_ok=True)
        outcome = module.experiment(name, sizes_of(name, chosen), steps, pictures)
        # The quick sizes show nothing worth keeping in the place of the larger ones.
        if folder := chosen.results or (None if quick else RESULTS / "paper"):
            save(outcome, chosen.scale, steps.seconds, folder)
        show(outcome, console)
        done, skipped = steps.counts
        console.print(f"{name}: {done} steps done, {skipped} were there\n", highlight=False)
