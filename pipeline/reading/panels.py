"""The contributions of a method as dense blocks, a panel of targets at a time.

Targets are test samples, or classes, or the mean over the test samples (see ``pipeline.spec.targets``).
Parquet files are sorted by (test_index, test_label, train_index), so a panel reads few row groups,
and memory stays bounded whatever the number of targets. Letters: n tracked training samples, M test
samples, Q targets, p of them in a panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pa_dataset

from ...storage.contributions import legible
from ...storage.errors import CorruptStore, HydraError
from ..spec.targets import TargetSet, coarsened, store_of, target_set
from ..vocabulary import SAMPLES

if TYPE_CHECKING:
    from .reader import Reader

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PANEL_BYTES = 64 << 20
"""About how much memory the rows of a panel take while they are read."""

_ROW_BYTES = 40
"""Of a contribution in flight: three columns, positions, and its place in the block."""


def panels(
    run: Reader, method: str, *, panel: int | None = None, kind: str | None = None
) -> Iterator[tuple[slice, Floats]]:
    """Yield (positions among the targets, block (n, p) float64), in order.

    Rows are those of ``run.samples(method)``, columns those of `targets`.

    Args:
        run: The run.
        method: The method.
        panel: p; None: as many as fit a fixed budget.
        kind: Kind of the columns, where it is coarser than the method's own targets; None: those.

    Raises:
        IncompleteStage: The method is not complete.
        CorruptStore: A pair is missing or is there twice.
    """
    tracked = run.samples(method)["train_index"].to_numpy().astype(np.int64)
    own = targets(run, method)
    width = panel or panel_width(len(tracked))
    coarse, weight = coarsened(own, kind or own.kind)
    if weight is None:
        yield from _panels(run, method, tracked, own, width)
        return
    for start in range(0, len(coarse), width):
        span = slice(start, min(len(coarse), start + width))
        total = np.zeros((len(tracked), span.stop - span.start))
        for fine, block in _panels(run, method, tracked, own, panel_width(len(tracked))):
            total += block @ weight[fine, span]
        yield span, total


def _panels(
    run: Reader, method: str, tracked: Integers, own: TargetSet, width: int
) -> Iterator[tuple[slice, Floats]]:
    """Yield panels of the method's own targets."""
    for start in range(0, len(own), width):
        span = slice(start, min(len(own), start + width))
        yield span, read_block(run, method, tracked, own, span)


def panel_width(rows: int) -> int:
    """Return how many targets of ``rows`` contributions make a panel."""
    return max(1, PANEL_BYTES // (_ROW_BYTES * max(1, rows)))


def tested(run: Reader, method: str) -> Integers:
    """Return the test indices of the run, ascending, (M,)."""
    try:
        return run.test_gradients().column("test_index").astype(np.int64)
    except HydraError:  # an estimator that needs no test gradients: read them off the table
        batches = run.contributions(method).to_batches(columns=["test_index"])
        return np.unique(np.concatenate([np.unique(b["test_index"].to_numpy()) for b in batches])).astype(
            np.int64
        )


def targets(run: Reader, method: str) -> TargetSet:
    """Return the targets of a complete method, in the order of `panels`.

    Raises:
        IncompleteStage: The store that says so is not there.
    """
    kind = run.noted.kind_of(method)
    if kind == SAMPLES:
        index = tested(run, method)
        return target_set(kind, index, _labels(run, method, index))
    from ...storage.rows import RowStore

    store = RowStore.open(run.directory.path(store_of(kind)), "gradient", run.directory.vouched)
    index, label, count = (store.column(n).astype(np.int64) for n in ("test_index", "label", "count"))
    return TargetSet(kind=kind, test_index=index, label=label, count=count)


def _labels(run: Reader, method: str, index: Integers) -> Integers:
    """Return the labels of the test samples, (M,), from the test gradients or else from the table."""
    try:
        return run.test_gradients().column("label").astype(np.int64)
    except HydraError:
        found = np.full(len(index), -1, dtype=np.int64)
        for batch in run.contributions(method).to_batches(columns=["test_index", "test_label"]):
            at = np.searchsorted(index, batch["test_index"].to_numpy())
            found[at] = batch["test_label"].to_numpy()
        return found


def read_block(
    run: Reader,
    method: str,
    tracked: Integers,
    own: TargetSet,
    span: slice,
    dataset: pa_dataset.Dataset | None = None,
) -> Floats:
    """Return the contributions of the training samples ``tracked``, ascending, to some targets.

    Args:
        run: The run.
        method: Whose contributions.
        tracked: Train indices, (n,).
        own: All targets of the method; rows are found by test sample, or else by label.
        span: Which p of them.
        dataset: ``run.contributions(method)``, where it is at hand: opening it reads all manifests.

    Returns:
        (n, p) float64.

    Raises:
        CorruptStore: A pair is missing or is there twice.
    """
    key = "test_index" if own.kind == SAMPLES else "test_label"
    tests = (own.test_index if own.kind == SAMPLES else own.label)[span]
    train, test = pa_dataset.field("train_index"), pa_dataset.field(key)
    wanted = (test >= int(tests[0])) & (test <= int(tests[-1]))
    wanted = wanted & (train >= int(tracked[0])) & (train <= int(tracked[-1]))
    names = ["train_index", key, "contribution"]
    by_target = np.full((len(tests), len(tracked)), np.nan)  # as the files are sorted
    flat, block = by_target.reshape(-1), by_target.T
    dataset = run.contributions(method) if dataset is None else dataset
    rows = 0
    # Without gaps a position is a difference, and the filter lets nothing else through.
    whole = all(len(index) == int(index[-1]) - int(index[0]) + 1 for index in (tracked, tests))
    with legible(run.uri):
        for batch in dataset.to_batches(
            columns=names, filter=wanted, batch_readahead=2, fragment_readahead=1
        ):
            at, to, values = (_column(batch, name) for name in names)
            if whole:
                place = to.astype(np.int64)
                place -= tests[0]
                place *= len(tracked)
                place += at.astype(np.int64) - tracked[0]
                flat[place] = values
                rows += len(values)
                continue
            row, col = np.searchsorted(tracked, at), np.searchsorted(tests, to)
            inside = (row < len(tracked)) & (col < len(tests))
            row, col, values = row[inside], col[inside], values[inside]
            inside = (tracked[row] == at[inside]) & (tests[col] == to[inside])
            block[row[inside], col[inside]] = values[inside]
            rows += int(inside.sum())
    if rows != block.size or np.isnan(block).any():
        raise CorruptStore(
            f"{run.uri}: method {method} holds {rows:,} of {block.size:,} contributions to {key} "
            f"{tests[0]} to {tests[-1]}; see `hydra-pipe verify {run.uri}`"
        )
    return block


def _column(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.generic]:
    values: npt.NDArray[np.generic] = batch[name].to_numpy(zero_copy_only=False)
    return values
