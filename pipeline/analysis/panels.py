"""The contributions of a method as dense blocks, a panel of test samples at a time.

Parquet files are sorted by (test_index, train_index), so a panel reads few row groups, and memory
stays bounded whatever the number of test samples. Letters: n tracked training samples, M test
samples, p of them in a panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pa_dataset

from ...storage.errors import CorruptStore, HydraError

if TYPE_CHECKING:
    from ..handle import Run

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PANEL_BYTES = 64 << 20
"""About how much memory the rows of a panel take while they are read."""

_ROW_BYTES = 40
"""Of a contribution in flight: three columns, positions, and its place in the block."""


def panels(run: Run, method: str, *, panel: int | None = None) -> Iterator[tuple[slice, Floats]]:
    """Yield (positions among the test samples, block (n, p) float64), in order.

    Rows are those of ``run.samples(method)``, columns those of `tested`.

    Raises:
        IncompleteStage: The method is not complete.
        CorruptStore: A pair is missing or is there twice.
    """
    tracked = run.samples(method)["train_index"].to_numpy().astype(np.int64)
    tests = tested(run, method)
    width = panel or panel_width(len(tracked))
    for start in range(0, len(tests), width):
        chosen = tests[start : start + width]
        yield slice(start, start + len(chosen)), read_block(run, method, tracked, chosen)


def panel_width(rows: int) -> int:
    """Return how many test samples of ``rows`` contributions make a panel."""
    return max(1, PANEL_BYTES // (_ROW_BYTES * max(1, rows)))


def tested(run: Run, method: str) -> Integers:
    """Return the test indices of the run, ascending, (M,)."""
    try:
        return run.test_gradients().column("test_index").astype(np.int64)
    except HydraError:  # an estimator that needs no test gradients: read them off the table
        batches = run.contributions(method).to_batches(columns=["test_index"])
        return np.unique(np.concatenate([np.unique(b["test_index"].to_numpy()) for b in batches])).astype(
            np.int64
        )


def read_block(
    run: Run,
    method: str,
    tracked: Integers,
    tests: Integers,
    dataset: pa_dataset.Dataset | None = None,
) -> Floats:
    """Return the contributions of the training samples ``tracked`` to the ``tests``, both ascending.

    Args:
        run: The run.
        method: Whose contributions.
        tracked: Train indices, (n,).
        tests: Test indices, (p,).
        dataset: ``run.contributions(method)``, where it is at hand: opening it reads all manifests.

    Returns:
        (n, p) float64.

    Raises:
        CorruptStore: A pair is missing or is there twice.
    """
    train, test = pa_dataset.field("train_index"), pa_dataset.field("test_index")
    wanted = (test >= int(tests[0])) & (test <= int(tests[-1]))
    wanted = wanted & (train >= int(tracked[0])) & (train <= int(tracked[-1]))
    names = ["train_index", "test_index", "contribution"]
    block = np.full((len(tracked), len(tests)), np.nan)
    dataset = run.contributions(method) if dataset is None else dataset
    rows = 0
    for batch in dataset.to_batches(columns=names, filter=wanted, batch_readahead=2, fragment_readahead=1):
        at, to, values = (_column(batch, name) for name in names)
        row, col = np.searchsorted(tracked, at), np.searchsorted(tests, to)
        inside = (row < len(tracked)) & (col < len(tests))
        row, col, values = row[inside], col[inside], values[inside]
        inside = (tracked[row] == at[inside]) & (tests[col] == to[inside])
        block[row[inside], col[inside]] = values[inside]
        rows += int(inside.sum())
    if rows != block.size or np.isnan(block).any():
        raise CorruptStore(
            f"{run.uri}: method {method} holds {rows:,} of {block.size:,} contributions to test samples "
            f"{tests[0]} to {tests[-1]}; see `hydra-pipe verify {run.uri}`"
        )
    return block


def _column(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.generic]:
    values: npt.NDArray[np.generic] = batch[name].to_numpy(zero_copy_only=False)
    return values
