"""``python -m benchmarks [NAME …] [--quick] [--size KEY=VALUE …]``: run, print tables, write JSON.

``python -m benchmarks paper [NAME …] [--scale quick|two-cores|full]`` runs the papers' experiments.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from .paper.command import main as papers
from .report import RESULTS, Result, save, show

WIDE = 170
"""Columns of the tables where there is no terminal that says otherwise."""

NAMES = (
    "replay",
    "operators",
    "segments",
    "checks",
    "reduce",
    "detect",
    "report_page",
    "guards",
    "hessian",
    "speedup",
    "memory",
    "plans",
    "startup",
    "storage",
    "stores",
    "fidelity",
    "approximation",
    "detectors",
    "peers",
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it run at all?")
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a size of SIZES in the benchmark's file, as a Python literal: --size samples=1600",
    )
    parser.add_argument(
        "--results", type=Path, help=f"where <name>.json goes (default: {RESULTS.name}/; --quick: nowhere)"
    )
    parser.add_argument("--scratch", type=Path, help="where data are written meanwhile (default: temporary)")
    parser.add_argument(
        "--keep", type=Path, help="write data below it and leave them there, so that the same command goes on"
    )
    found = parser.parse_args(arguments)
    unknown = [name for name in found.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]}; choose from {', '.join(NAMES)}")
    return found


def sizes_of(module: Any, chosen: argparse.Namespace) -> Mapping[str, Any]:
    """Return a benchmark's sizes with those of the command line put in."""
    sizes = dict(module.QUICK if chosen.quick else module.SIZES)
    for text in chosen.size:
        key, _, value = text.partition("=")
        if key in sizes:
            sizes[key] = ast.literal_eval(value)
    return sizes


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> None:
    """Run the chosen benchmarks one after the other; after the word ``paper``, the papers' experiments."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["paper"]:
        papers(words[1:], console)
        return
    chosen = parse(words)
    console = console or Console(width=None if sys.stdout.isatty() else WIDE)
    for name in chosen.names or NAMES:
        module = importlib.import_module(f".{name}", __package__)
        before = os.getloadavg()[0]
        with _folder(chosen, name) as folder:
            found = module.run(sizes_of(module, chosen), Path(folder))
            # Some give several, one after the other.
            for result in [found] if isinstance(found, Result) else found:
                # The quick sizes measure nothing worth keeping in the place of the full ones.
                if folder_for := chosen.results or (None if chosen.quick else RESULTS):
                    save(result, (before, os.getloadavg()[0]), folder_for)
                show(result, console)


def _folder(chosen: argparse.Namespace, name: str) -> AbstractContextManager[str]:
    """Return where a benchmark writes its data: a folder that is removed afterwards, or one that is kept."""
    if chosen.keep is None:
        return tempfile.TemporaryDirectory(prefix="hydra-pipe-bench-", dir=chosen.scratch)
    return nullcontext(str(chosen.keep / name))


if __name__ == "__main__":
    main()
