"""``python -m tests.torture``: the whole torture, its table and what was bad; exit code 1 where something was."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from tests.torture.session import faults, mutations
from tests.torture.tally import Tally


@click.command()
@click.option("--seed", default=1, show_default=True, help="Draws every fault.")
@click.option("--mutations", "mutated", default=1000, show_default=True, help="Damaged files.")
@click.option("--faults", "disturbed", default=200, show_default=True, help="Disturbed drivers.")
@click.option("--to", type=click.Path(path_type=Path), help="Write the counts there, as JSON.")
def main(seed: int, mutated: int, disturbed: int, to: Path | None) -> None:
    """Damage runs and disturb drivers; nothing may be wrong, silent, lost, crashed or untidy."""
    os.fsync = lambda descriptor: None  # no power is cut here
    tally, skipped, began = Tally(), [], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch, Progress(*columns) as progress:
        for name, work, count in (("mutations", mutations, mutated), ("drivers", faults, disturbed)):
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
    for line in (*skipped, *tally.bad):
        console.print(line, markup=False, soft_wrap=True)
    console.print(
        f"{sum(tally.faults.values())} faults, {len(tally.bad)} bad, {time.monotonic() - began:.0f} s, seed {seed}"
    )
    if to is not None:
        counts = {f"{kind}: {result}": number for (kind, result), number in sorted(tally.outcomes.items())}
        to.write_text(json.dumps({"seed": seed, "counts": counts, "bad": tally.bad}, indent=2) + "\n")
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
