"""One unit of the reduce stage: a block of tracked samples joined with every test sample.

Both stores are streamed: a strip of hypergradients at a time, panels of test gradients read ahead,
the contributions of the unit held until its Parquet files are full. Letters as in ``plan``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from ...storage import contributions as parquet
from ...storage import layout, schemas
from ...storage.errors import CorruptStore, NonFiniteTangents
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...workers.determinism import prepare_process, resolve_device
from ...workers.replay.join import Panels, contributions
from ...workers.training.training import Compute
from ..executors.base import Report, Unit
from ..plan.plan import ReduceTiles
from ..reading.unit_values import ReduceValues
from ..spec.targets import store_of
from ..vocabulary import ADJOINT, SAMPLES
from .work import Result, Work, rows_of

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReduceJob:
    """What every reduce unit of a run shares.

    Attributes:
        method: Name of the estimator, as in ``method=``.
        base: Name of the store its rows come from: ``method`` unless they are corrected.
        mode: ``forward``: join hypergradients with test gradients; ``adjoint``: the contributions
            are there already, a row a test sample, and only change their shape.
        tiles: How the join is cut.
        n_train: N, the divisor of Eq. 8.
        tracked: Train index of each tracked sample, (n,).
        train_labels: Label per tracked sample, (n,), -1: none.
        visits: How often each tracked sample was trained on, (n,).
        shard_of: Shard of each tracked sample, (n,).
        targets: Kind of the targets; the table has a column of contributions for each.
    """

    method: str
    base: str
    mode: str
    tiles: ReduceTiles
    n_train: int
    tracked: Integers
    train_labels: Integers
    visits: Integers
    shard_of: Integers
    targets: str = SAMPLES


@dataclass(frozen=True, kw_only=True, slots=True)
class ReduceWork(Work):
    """Handler of blocks of tracked samples.

    Attributes:
        job: What all of them share.
        compute: Device and threads.
    """

    job: ReduceJob
    compute: Compute

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the Parquet files of a block."""
        prepare_process(self.compute.threads)
        device = resolve_device(self.compute.device)
        return reduce_rows(run, self.job, unit.name, *rows_of(unit), device, report)


def bounds(total: int, size: int) -> list[tuple[int, int]]:
    """Cut ``range(total)`` into spans of ``size``."""
    return [(start, min(total, start + size)) for start in range(0, total, size)]


def reduce_rows(
    run: RunDirectory,
    job: ReduceJob,
    name: str,
    start: int,
    stop: int,
    device: torch.device,
    report: Callable[[int, int], None],
) -> Result:
    """Join tracked rows ``start`` to ``stop`` and write their Parquet files.

    Returns:
        The files written, relative to the run, and the unit's values: rows, and the sums and counts
        of its contributions by (train class, test class) for Eq. 23.

    Raises:
        CorruptStore: A contribution is not finite.
        NonFiniteTangents: A contribution is beyond float32.
    """
    if job.mode == ADJOINT:
        block = _turned(run, job, start, stop, report)
    else:
        block = _joined(run, job, start, stop, device, report)
    if job.base != job.method:
        _correct(run, job, block, start, stop)
    return write_rows(run, job, name, block, start, stop)


def write_rows(
    run: RunDirectory, job: ReduceJob, name: str, block: Floats, start: int, stop: int
) -> tuple[list[str], ReduceValues]:
    """Write the contributions (rows, Q) of tracked rows ``start`` to ``stop``; see `reduce_rows`."""
    gradients = RowStore.open(run.path(store_of(job.targets)), "gradient", run.vouched)
    if not np.isfinite(block).all():
        row, column = (int(v[0]) for v in np.nonzero(~np.isfinite(block)))
        raise CorruptStore(
            f"the contribution of tracked row {start + row} to target {column} is not finite; "
            "run hydra-pipe verify, then replay again"
        )
    largest, most = float(max(block.max(), -block.min())), float(np.finfo(np.float32).max)
    if largest > most:
        raise NonFiniteTangents(
            f"a contribution of size {largest:.1e} is beyond float32, in which contributions are stored "
            f"({most:.1e} at most); use a lower learning rate or fewer epochs"
        )
    index = job.tracked[start:stop]
    labels = job.train_labels[start:stop]
    test_index, test_label = gradients.column("test_index"), gradients.column("label")
    # How many test samples each column is the mean of; None: each is one test sample.
    count = None if job.targets == SAMPLES else gradients.column("count").astype(np.int64)
    files = write_tiles(run, job, name, block, index, labels, test_index, test_label)
    files.append(_write_samples(run, job, name, block, count, index, start, stop))
    sums = class_sums(block, labels, test_label, count)
    return files, ReduceValues(rows=stop - start, interclass=sums)


def _joined(
    run: RunDirectory,
    job: ReduceJob,
    start: int,
    stop: int,
    device: torch.device,
    report: Callable[[int, int], None],
) -> Floats:
    """Multiply strips of hypergradients with panels of test gradients: (rows, Q)."""
    gradients = RowStore.open(run.path(store_of(job.targets)), "gradient", run.vouched)
    hypergradients = RowStore.open(run.path(layout.hypergradients(job.base)), "hypergradient", run.vouched)
    tests = bounds(gradients.rows, job.tiles.panel_rows)
    panels = Panels(gradients.read, tests, gradients.columns, gradients.dtype, device)
    strips = [(start + first, start + last) for first, last in bounds(stop - start, job.tiles.strip_rows)]
    rows = Panels(hypergradients.read, strips, hypergradients.columns, hypergradients.dtype, device)
    block = np.empty((stop - start, gradients.rows), dtype=gradients.dtype)
    for first, last, strip in rows:
        contributions(strip, panels, job.n_train, block[first - start : last - start])
        report(last - start, stop - start)
    return block


def _turned(
    run: RunDirectory, job: ReduceJob, start: int, stop: int, report: Callable[[int, int], None]
) -> Floats:
    """Read the adjoint's rows (a target each) and turn them: (rows, Q)."""
    store = RowStore.open(run.path(layout.by_test(job.base)), "contribution", run.vouched)
    block = np.empty((stop - start, store.rows), dtype=store.dtype)
    for first, last in bounds(store.rows, store.chunk_rows):
        block[:, first:last] = store.read(first, last)[:, start:stop].T
    report(stop - start, stop - start)
    return block


def _correct(run: RunDirectory, job: ReduceJob, block: Floats, start: int, stop: int) -> None:
    """Add ``coordinates (exact - ekfac)(V)`` to the rows' contributions; see ``workers.replay.directions``."""
    where = partial(layout.corrections, job.method)
    coordinates = RowStore.open(run.path(where(layout.COORDINATES)), "coordinate", run.vouched)
    corrections = RowStore.open(run.path(where(layout.CORRECTED)), "contribution", run.vouched)
    along = corrections.read(0, corrections.rows)[:, start:stop].astype(np.float64)
    block += (coordinates.read(0, coordinates.rows) @ along).T.astype(block.dtype)


def write_tiles(
    run: RunDirectory,
    job: ReduceJob,
    name: str,
    block: Floats,
    index: Integers,
    labels: Integers,
    test_index: Integers,
    test_label: Integers,
    kind: schemas.Kind = "contributions",
) -> list[str]:
    """Write (rows, Q) numbers of tracked samples ``index`` file by file; return the files' names."""
    files = []
    for k, (first, last) in enumerate(bounds(block.shape[1], job.tiles.file_tests)):
        relative = layout.table_part(kind, job.method, f"{number_of(name)}-{k:05d}")
        parquet.write_tile(
            run.path(relative),
            train_index=index,
            test_index=test_index[first:last],
            train_label=labels,
            test_label=test_label[first:last],
            contribution=block[:, first:last].astype(np.float32, copy=False),
            schema=schemas.SCHEMAS[kind],
        )
        files.append(relative)
    return files


def _write_samples(
    run: RunDirectory,
    job: ReduceJob,
    name: str,
    block: Floats,
    count: Integers | None,
    index: Integers,
    start: int,
    stop: int,
) -> str:
    relative = layout.table_part("samples", job.method, number_of(name))
    # A few rows at a time: float64 copies of the whole block would double its memory.
    spread = [_spread(block[a:b], count) for a, b in bounds(len(block), 64)]
    table = pa.table(
        {
            "train_index": index,
            "label": job.train_labels[start:stop],
            "visits": job.visits[start:stop],
            "contribution": np.concatenate([mean for mean, _ in spread]),
            "contribution_std": np.concatenate([deviation for _, deviation in spread]),
            "shard": job.shard_of[start:stop],
        }
    )
    parquet.write_table(run.path(relative), table.cast(schemas.SAMPLES), schemas.SAMPLES)
    return relative


def _spread(block: Floats, count: Integers | None) -> tuple[Floats, Floats]:
    """Return mean over the test samples and standard deviation over the targets, of each row.

    A target that is a mean over test samples weighs as many of them: then the mean is that over the
    test samples themselves.
    """
    if count is None:
        return block.mean(1, dtype=np.float64), block.std(1, dtype=np.float64)
    wide, weight = block.astype(np.float64), count / count.sum()
    mean = (wide * weight).sum(1)
    return mean, np.sqrt(((wide - mean[:, None]) ** 2 * weight).sum(1))


def number_of(unit: str) -> str:
    """Return the number at the end of a unit's name."""
    return unit.rsplit("-", 1)[-1]


def class_sums(
    block: Floats, train_label: Integers, test_label: Integers, count: Integers | None = None
) -> tuple[tuple[float, ...], ...]:
    """Return [train class, test class, sum of contributions, pairs] for each pair of classes.

    Args:
        block: Contributions, (rows, Q).
        train_label: Label a row.
        test_label: Label a column.
        count: Test samples that a column is the mean of; None: 1.
    """
    rows = []
    for test_class in np.unique(test_label):
        mine = test_label == test_class
        if count is None:
            total, width = block[:, mine].sum(axis=1, dtype=np.float64), int(mine.sum())
        else:
            total, width = (block[:, mine].astype(np.float64) * count[mine]).sum(1), int(count[mine].sum())
        for train_class in np.unique(train_label):
            chosen = train_label == train_class
            rows.append(
                (int(train_class), int(test_class), float(total[chosen].sum()), int(chosen.sum()) * width)
            )
    return tuple(rows)


def interclass_table(parts: Iterable[Iterable[Sequence[float]]]) -> pa.Table:
    """Merge the units' class sums into the class-by-class table of Eq. 23.

    ``contribution`` is the mean over all pairs of samples of the two classes; ``normalized`` divides
    it by the square root of (its column's sum times its row's sum) of the matrix of means, as the
    paper does, and is NaN where that product is not positive.
    """
    sums: dict[tuple[int, int], list[float]] = {}
    for part in parts:
        for train_class, test_class, total, pairs in part:
            entry = sums.setdefault((int(train_class), int(test_class)), [0.0, 0.0])
            entry[0] += total
            entry[1] += pairs
    keys = sorted(sums)
    means = {key: sums[key][0] / sums[key][1] for key in keys}
    row_sum: dict[int, float] = {}
    column_sum: dict[int, float] = {}
    for (train_class, test_class), mean in means.items():
        row_sum[train_class] = row_sum.get(train_class, 0.0) + mean
        column_sum[test_class] = column_sum.get(test_class, 0.0) + mean
    normalized = []
    for key in keys:
        product = row_sum[key[0]] * column_sum[key[1]]
        normalized.append(means[key] / product**0.5 if product > 0 else float("nan"))
    return pa.table(
        {
            "train_class": [key[0] for key in keys],
            "test_class": [key[1] for key in keys],
            "pairs": [int(sums[key][1]) for key in keys],
            "contribution": [means[key] for key in keys],
            "normalized": normalized,
        }
    ).cast(schemas.INTERCLASS)
