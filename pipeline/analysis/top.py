"""The most helpful and the most harmful training samples of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pa_dataset

from ...storage.errors import HydraError, InputError

if TYPE_CHECKING:
    from ..handle import Run


def top(
    run: Run, *, k: int = 10, test: int | None = None, harmful: bool = False, method: str | None = None
) -> pa.Table:
    """Return the ``k`` training samples with the largest (or smallest) contributions.

    Args:
        run: The run to read.
        k: How many; all of them when there are fewer.
        test: A ``test_index`` for C(i, j) of that test sample; None for C(i), the mean over the
            test samples (Eq. 7).
        harmful: Smallest contributions first instead of largest first.
        method: The estimator; the run's default when None.

    Returns:
        A table sorted by contribution, ties by ``train_index``: ``rank`` (from 1),
        ``train_index``, ``label`` (-1: none), ``contribution``; without ``test`` also
        ``contribution_std`` and ``visits``, with it also ``test_index`` and ``test_label``. For an
        average over seeds also ``contribution_spread``, the standard deviation over them.

    Raises:
        InputError: ``k`` is below 1, or the run does not hold that test sample.
        IncompleteStage: The method is not complete.
    """
    if k < 1:
        raise InputError(f"k is {k}; it must be at least 1")
    if test is None:
        table = run.samples(method)
        order = _order(table["train_index"].to_numpy(), table["contribution"].to_numpy(), harmful)
        chosen = table.take(pa.array(order[:k]))
        names = ["train_index", "label", "contribution", "contribution_std", "visits"]
        chosen = chosen.select(names)
    else:
        chosen = _one_test_sample(run, k=k, test=test, harmful=harmful, method=method)
    method = run.method(method)
    if run.averages(method):
        chosen = chosen.append_column("contribution_spread", _spread(run, method, chosen, test))
    return chosen.add_column(0, "rank", pa.array(np.arange(1, len(chosen) + 1, dtype=np.int32)))


def _one_test_sample(run: Run, *, k: int, test: int, harmful: bool, method: str | None) -> pa.Table:
    """Stream the rows of one test sample, keeping the best ``k``; statistics prune the rest."""
    dataset = run.contributions(method)
    # An index outside int32 would overflow in the filter; it is not in the run either way.
    if not 0 <= test < 2**31:
        raise _unknown(run, test)
    columns = ["train_index", "train_label", "test_label", "contribution"]
    best: pa.Table | None = None
    for batch in dataset.to_batches(columns=columns, filter=pa_dataset.field("test_index") == test):
        if not batch.num_rows:
            continue
        table = pa.Table.from_batches([batch])
        if best is not None:
            table = pa.concat_tables([best, table])
        order = _order(table["train_index"].to_numpy(), table["contribution"].to_numpy(), harmful)
        best = table.take(pa.array(order[:k]))
    if best is None:
        raise _unknown(run, test)
    return pa.table(
        {
            "train_index": best["train_index"],
            "label": best["train_label"],
            "contribution": best["contribution"],
            "test_index": pa.array(np.full(len(best), test, np.int32)),
            "test_label": best["test_label"],
        }
    )


def _spread(run: Run, method: str, chosen: pa.Table, test: int | None) -> pa.Array:
    """Return the spread over the seeds of the chosen samples, in their order."""
    index, column = chosen["train_index"].to_numpy(), "contribution_spread"
    if test is None:
        table = run.samples_spread(method)
    else:
        wanted = pa_dataset.field("train_index").isin(index) & (pa_dataset.field("test_index") == test)
        table = run.spread(method).to_table(columns=["train_index", column], filter=wanted)
        table = table.sort_by("train_index")
    at = np.searchsorted(table["train_index"].to_numpy(), index)
    return pa.array(table[column].to_numpy()[at].astype(np.float64))


def _order(train_index: np.ndarray, contribution: np.ndarray, harmful: bool) -> np.ndarray:
    """Return the order by contribution, ties by ``train_index``; NaN sorts last either way."""
    return np.lexsort((train_index, contribution if harmful else -contribution))


def _unknown(run: Run, test: int) -> InputError:
    held = f"{run.info.get('n_test_tracked', '?')} test samples"
    try:
        index = run.test_gradients().column("test_index")
        held += f", from {int(index.min())} to {int(index.max())}"
    except HydraError:  # the range only helps; the refusal stands without it
        pass
    return InputError(
        f"test sample {test} is not in {run.uri}, which holds {held}; "
        "choose one of them, or run again with another --test"
    )
