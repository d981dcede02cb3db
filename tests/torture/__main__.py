"""``python -m tests.torture``: the whole torture, its table and what was bad; exit code 1 where something was."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # as in the tests

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from tests.torture.cluster import cluster
from tests.torture.pairs import pairs
from tests.torture.session import faults, mutations
from tests.torture.stores import stores
from tests.torture.tally import Tally


@click.command()
@click.option("--seed", default=1, show_default=True, help="Draws every fault.")
@click.option("--mutations", "mutated", default=1000, show_default=True, help="Damaged files.")
@click.option("--faults", "disturbed", default=200, show_default=True, help="Disturbed drivers.")
@click.option("--ray", "on_ray", default=24, show_default=True, help="Disturbed runs on Ray.")
@click.option("--pairs", "paired", default=50, show_default=True, help="Pairs of commands on one run.")
@click.option("--stores", "stored", default=12, show_default=True, help="Runs on an S3 that fails.")
@click.option("--to", type=click.Path(path_type=Path), help="Write the counts there, as JSON.")
def main(
    seed: int, mutated: int, disturbed: int, on_ray: int, paired: int, stored: int, to: Path | None
) -> None:
    """Damage runs and disturb drivers; nothing may be wrong, silent, lost, crashed or untidy."""
    os.fsync = lambda descriptor: None  # no power is cut here
    tally, skipped, began = Tally(), [], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch, Progress(*columns) as progress:
        for name, work, count in (
            ("mutations", mutations, mutated),
            ("drivers", faults, disturbed),
            ("pairs", pairs, paired),
            ("S3", stores, stored),
            ("Ray", cluster, on_ray),
        ):
            if not count:
                continue
            task = progress.add_task(name, total=count)
            (place := Path(scratch, name)).mkdir()
            skipped += (
                work(place, tally, count=count, seed=seed, heard=lambda task=task: progress.advance(task))
                or []
            )
    console = Console()
    console.print(_table(tally))
    for kind, took in tally.recoveries().items():
        console.print(
            f"{kind}: at work again after {took['median']:.1f} s (median of {took['count']}), at most {took['most']:.1f} s",
            markup=False,
        )
    for line in (*skipped, *tally.bad):
        console.print(line, markup=False, soft_wrap=True)
    console.print(
        f"{sum(tally.faults.values())} faults, {len(tally.bad)} bad, {time.monotonic() - began:.0f} s, seed {seed}"
    )
    if to is not None:
        counts = {f"{kind}: {result}": number for (kind, result), number in sorted(tally.outcomes.items())}
        told = {"seed": seed, "counts": counts, "recovery_seconds": tally.recoveries(), "bad": tally.bad}
        to.write_text(json.dumps(told, indent=2) + "\n")
    sys.exit(1 if tally.bad else 0)


def _table(tally: Tally) -> Table:
    table = Table(Column("kind of fault", no_wrap=True), Column("faults", justify="right"))
    results = sorted({result for _, result in tally.outcomes})
    for result in results:
        table.add_column(result, justify="right")
    for kind, number in sorted(tally.faults.items()):
        table.add_row(kind, str(number), *(str(tally.outcomes.get((kind, result), "")) for result in results))
    return table


if __name__ == "__main__":
    main()
