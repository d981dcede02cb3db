"""The most helpful and the most harmful training samples of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pa_dataset

from ...storage.errors import HydraError, InputError
from ..reading.panels import targets
from ..vocabulary import CLASSES, MEAN, SAMPLES

if TYPE_CHECKING:
    from ..reading.reader import Reader


def top(
    run: Reader,
    *,
    k: int = 10,
    test: int | None = None,
    label: int | None = None,
    harmful: bool = False,
    method: str | None = None,
) -> pa.Table:
    """Return the ``k`` training samples with the largest (or smallest) contributions.

    Args:
        run: The run to read.
        k: How many; all of them when there are fewer.
        test: A ``test_index`` for C(i, j) of that test sample; None for C(i), the mean over the
            test samples (Eq. 7).
        label: A class, for the mean over the test samples of that label; not with ``test``.
        harmful: Smallest contributions first instead of largest first.
        method: The estimator; the run's default when None.

    Returns:
        A table sorted by contribution, ties by ``train_index``: ``rank`` (from 1),
        ``train_index``, ``label`` (-1: none), ``contribution``; without ``test`` and ``label`` also
        ``contribution_std`` and ``visits``, with one of them also ``test_index`` and ``test_label``. For an
        average over seeds also ``contribution_spread``, the standard deviation over them (of a class only
        where that is a target).

    Raises:
        InputError: ``k`` is below 1, or the method does not hold that test sample or class.
        IncompleteStage: The method is not complete.
    """
    if k < 1:
        raise InputError(f"k is {k}; it must be at least 1")
    if test is not None and label is not None:
        raise InputError(
            f"test sample {test} and class {label}: a test sample has one class; give one of them"
        )
    if label is not None:
        chosen = _one_class(run, k=k, label=label, harmful=harmful, method=run.method(method))
    elif test is None:
        table = run.samples(method)
        order = _order(table["train_index"].to_numpy(), table["contribution"].to_numpy(), harmful)
        chosen = table.take(pa.array(order[:k]))
        names = ["train_index", "label", "contribution", "contribution_std", "visits"]
        chosen = chosen.select(names)
    else:
        chosen = _one_test_sample(run, k=k, test=test, harmful=harmful, method=method)
    method = run.method(method)
    if run.averages(method) and (label is None or run.noted.kind_of(method) == CLASSES):
        spread = _spread(run, method, chosen, test, label)
        chosen = chosen.append_column("contribution_spread", spread)
    return chosen.add_column(0, "rank", pa.array(np.arange(1, len(chosen) + 1, dtype=np.int32)))


def _one_test_sample(run: Reader, *, k: int, test: int, harmful: bool, method: str | None) -> pa.Table:
    """Stream the rows of one test sample, keeping the best ``k``; statistics prune the rest."""
    name = run.method(method)
    if run.noted.kind_of(name) != SAMPLES:
        raise no_such_target(run, name, f"test sample {test}", (SAMPLES,))
    dataset = run.contributions(name)
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


def _one_class(run: Reader, *, k: int, label: int, harmful: bool, method: str) -> pa.Table:
    """Stream the rows of one class and average them by training sample."""
    if run.noted.kind_of(method) == MEAN:
        raise no_such_target(run, method, f"class {label}", (SAMPLES, CLASSES))
    held = targets(run, method)
    if label < 0 or label not in held.label:
        known = ", ".join(str(c) for c in np.unique(held.label[held.label >= 0]).tolist())
        raise InputError(
            f"class {label}: method {method} of {run.uri} has test samples of "
            + (f"classes {known}; choose one of them" if known else "no class; use --test")
        )
    table = run.samples(method)
    tracked = table["train_index"].to_numpy()
    total = np.zeros(len(tracked))
    wanted = pa_dataset.field("test_label") == label
    for batch in run.contributions(method).to_batches(columns=["train_index", "contribution"], filter=wanted):
        at = np.searchsorted(tracked, batch["train_index"].to_numpy())
        total += np.bincount(at, weights=batch["contribution"].to_numpy(), minlength=len(tracked))
    value = total / int((held.label == label).sum())
    order = _order(tracked, value, harmful)[:k]
    return pa.table(
        {
            "train_index": pa.array(tracked[order]),
            "label": table["label"].take(pa.array(order)),
            "contribution": pa.array(value[order]),
            "test_index": pa.array(np.full(len(order), -1, np.int32)),
            "test_label": pa.array(np.full(len(order), label, np.int16)),
        }
    )


def no_such_target(run: Reader, method: str, asked: str, kinds: tuple[str, ...]) -> InputError:
    """Return the refusal of what only methods with targets of the given kinds can answer."""
    own = run.noted.kind_of(method)
    held = "a mean a class" if own == CLASSES else "the mean over all test samples"
    able = [f"--method {name}" for name in run.methods() if run.noted.kind_of(name) in kinds]
    remedy = able[0] if able else "a method made with --targets " + " or ".join(kinds)
    choice = "--class C, or " if own == CLASSES else ""
    none = "no classes" if CLASSES in kinds else "no single test samples"
    return InputError(f"{asked}: method {method} of {run.uri} holds {held} and {none}; use {choice}{remedy}")


def _spread(run: Reader, method: str, chosen: pa.Table, test: int | None, label: int | None) -> pa.Array:
    """Return the spread over the seeds of the chosen samples, in their order."""
    index, column = chosen["train_index"].to_numpy(), "contribution_spread"
    if test is None and label is None:
        table = run.samples_spread(method)
    else:
        key, value = ("test_index", test) if label is None else ("test_label", label)
        wanted = pa_dataset.field("train_index").isin(index) & (pa_dataset.field(key) == value)
        table = run.spread(method).to_table(columns=["train_index", column], filter=wanted)
        table = table.sort_by("train_index")
    at = np.searchsorted(table["train_index"].to_numpy(), index)
    return pa.array(table[column].to_numpy()[at].astype(np.float64))


def _order(train_index: np.ndarray, contribution: np.ndarray, harmful: bool) -> np.ndarray:
    """Return the order by contribution, ties by ``train_index``; NaN sorts last either way."""
    return np.lexsort((train_index, contribution if harmful else -contribution))


def _unknown(run: Reader, test: int) -> InputError:
    held = f"{'?' if run.noted.n_test_tracked is None else run.noted.n_test_tracked} test samples"
    try:
        index = run.test_gradients().column("test_index")
        held += f", from {int(index.min())} to {int(index.max())}"
    except HydraError:  # the range only helps; the refusal stands without it
        pass
    return InputError(
        f"test sample {test} is not in {run.uri}, which holds {held}; "
        "choose one of them, or run again with another --test"
    )
