"""One unit of an average over seeds: a block of tracked samples, read from every member's tables.

Letters: K members (runs with different seeds), n tracked training samples, Q targets (test samples,
unless the members' method has others). What is
averaged are the numbers that the members' tables hold, in float64, in the order of the seeds: bits
depend on neither shards nor executor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...storage import contributions as parquet
from ...storage import layout, schemas
from ...storage.rundir import RunDirectory
from ..executors.base import Report, Unit
from ..reading.panels import panel_width, read_block, targets
from ..reading.reader import Reader, open_reader
from ..reading.unit_values import ReduceValues
from ..vocabulary import REDUCE
from .reduce import ReduceJob, bounds, number_of, write_rows, write_tiles
from .work import Result, Work, rows_of

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageWork(Work):
    """Handler of an average's only stage: blocks of tracked samples.

    Attributes:
        job: What all of them share.
        source: Method that is averaged.
        members: Addresses of the K runs, in the order of their seeds.
        digests: What `content` said of each; kept in the manifests.
    """

    job: ReduceJob
    source: str
    members: tuple[str, ...]
    digests: tuple[str, ...]

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write means and spreads of a block."""
        members = [open_reader(uri) for uri in self.members]
        for member in members:
            made = member.directory.manifests(f"{self.source}/{REDUCE}")
            run.ledger.use(made, seed=member.uri.removeprefix(run.uri).strip("/"))
        files, values = average_rows(run, self.job, members, self.source, unit.name, *rows_of(unit), report)
        return files, replace(values, members=self.digests)


def content(run: RunDirectory, method: str) -> str:
    """Return a digest of the tables of a method, from its manifests: another one means other numbers."""
    digest = hashlib.sha256()
    for manifest in run.manifests(f"{method}/{REDUCE}"):
        for entry in manifest.files:
            digest.update(f"{entry.path} {entry.sha256}\n".encode())
    return digest.hexdigest()


def average_rows(
    run: RunDirectory,
    job: ReduceJob,
    members: list[Reader],
    source: str,
    name: str,
    start: int,
    stop: int,
    report: Report,
) -> tuple[list[str], ReduceValues]:
    """Average tracked rows ``start`` to ``stop`` over the members and write mean and spread.

    Held at a time: the rows' means (float64) and spreads (float32) of all Q targets, and a panel
    of them of every member.

    Returns:
        What ``reduce_rows`` returns.

    Raises:
        CorruptStore: A member lacks a contribution.
    """
    own = targets(members[0], source)
    index, labels = job.tracked[start:stop], job.train_labels[start:stop]
    mean = np.empty((stop - start, len(own)))
    spread = np.empty(mean.shape, dtype=np.float32)
    tables = [member.contributions(source) for member in members]
    for first, last in bounds(len(own), panel_width(len(members) * (stop - start))):
        block = np.stack(
            [
                read_block(member, source, index, own, slice(first, last), table)
                for member, table in zip(members, tables, strict=True)
            ]
        )
        mean[:, first:last] = block.mean(0)
        spread[:, first:last] = block.std(0, ddof=1)
        report((stop - start) * last // len(own), stop - start)
    files, values = write_rows(run, job, name, mean, start, stop)
    files += write_tiles(
        run, job, name, spread, index, labels, own.test_index, own.label, "contributions_spread"
    )
    files.append(_write_samples_spread(run, job, members, source, name, start, stop))
    return files, values


def _write_samples_spread(
    run: RunDirectory, job: ReduceJob, members: list[Reader], source: str, name: str, start: int, stop: int
) -> str:
    """Write mean and spread over the seeds of C(i), each member's as its own table has it."""
    own: Floats = np.stack(
        [member.samples(source)["contribution"].to_numpy()[start:stop] for member in members]
    )
    table = pa.table(
        {
            "train_index": job.tracked[start:stop],
            "label": job.train_labels[start:stop],
            "contribution": own.mean(0),
            "contribution_spread": own.std(0, ddof=1),
        }
    )
    relative = layout.table_part("samples_spread", job.method, number_of(name))
    schema = schemas.SAMPLES_SPREAD
    parquet.write_table(run.path(relative), table.cast(schema), schema)
    return relative
