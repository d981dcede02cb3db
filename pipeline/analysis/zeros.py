"""Contributions that are all zero: a run that says nothing, and the likely reason for it."""

from __future__ import annotations

import numpy as np

from ...storage import layout
from ...storage.contributions import dataset
from ...storage.errors import HydraError
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...storage.trajectory import open_trajectory


def zero_warning(directory: RunDirectory, method: str) -> str | None:
    """Return a warning where every contribution of a method is exactly zero, else None.

    Args:
        directory: The run; the method's samples must be there.
        method: The estimator.
    """
    columns = ["contribution", "contribution_std"]
    for batch in dataset(directory, "samples", method).to_batches(columns=columns):
        if any(np.any(batch[name].to_numpy(zero_copy_only=False) != 0) for name in columns):
            return None
    return f"all contributions of {method} are zero: {_reason(directory)}"


def _reason(directory: RunDirectory) -> str:
    """Return the first cause that the run's own files show."""
    try:
        trajectory = open_trajectory(directory.path(layout.TRAJECTORY), directory.vouched)
        if not np.any(trajectory.learning_rate):
            return "the learning rate is 0 at every step; set one in optimizer()"
        gradients = RowStore.open(directory.path(layout.TEST_GRADIENTS), "gradient", directory.vouched)
        if not _any(gradients):
            return (
                "the test losses do not depend on the weights (every test gradient is zero); check what losses() "
                "returns in eval mode: a detached, constant or saturated loss has no gradient"
            )
        first, last = trajectory.checkpoint(0), trajectory.checkpoint(-1)
        if np.array_equal(first.weights, last.weights):
            return (
                "training did not move the weights; check that the training losses depend on them and the "
                "learning rate"
            )
    except HydraError:  # a reason only helps; the warning stands without it
        pass
    return (
        "no parameter that a training sample moved has an influence on a test loss; check what losses() "
        "returns in training and in eval mode"
    )


def _any(store: RowStore) -> bool:
    """Whether a store holds a number other than zero; read a chunk at a time until one is found."""
    starts = range(0, store.rows, store.chunk_rows)
    return any(np.any(store.read(start, min(store.rows, start + store.chunk_rows))) for start in starts)
