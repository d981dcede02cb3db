"""The conservation law: a check of a whole run that needs no oracle.

Without the Hessian and with every training sample tracked, per-sample gradients of a batch
average to its gradient, hence, per parameter group,

    sum_i hypergradient_i / N = w_T - phi_T w_0 - psi_T m_0

where phi_T is the optimiser's scalar recursion started from 1 (1 when weight decay is 0), and psi_T the same
started from momentum 1, where training began with momentum m_0. One wrong row, step or coefficient breaks it. Letters: N training samples, D parameters, G groups.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...workers.recursion.conservation import BASE, UNIT, FromStart
from ..vocabulary import ADJOINT, FAST, FORWARD, REPLAY

if TYPE_CHECKING:
    from ...storage.trajectory import Trajectory
    from ..reading.reader import Reader

METHOD = FAST
BLOCK_BYTES = 64 << 20
"""How much of the hypergradient store is held at a time while it is streamed."""


def not_applicable(run: Reader) -> str | None:
    """Return why the law does not hold for this run, or None where it does."""
    info = run.noted
    if METHOD not in run.methods():
        return f"the run has no complete method {METHOD!r}"
    if info.n_tracked != info.n_train:
        return f"{info.n_tracked} of {info.n_train} training samples are tracked, not all"
    if not _has_store(run):
        return "the run stores no hypergradients (adjoint mode)"
    if info.conservation is False:
        return "batch statistics are held constant, so per-sample gradients do not add up to the batch's"
    return None


def conservation(run: Reader) -> dict[str, Any]:
    """Stream the hypergradient store and compare its sum with the weights of the record.

    Returns:
        What `compare` returns, or ``{"applicable": False, "reason": ...}``.
    """
    reason = not_applicable(run)
    if reason is not None:
        return {"applicable": False, "reason": reason}
    store = run.hypergradient_store(METHOD)
    total = np.zeros(store.columns)
    rows = block_rows(store.chunk_rows, store.columns, np.dtype(store.dtype).itemsize)
    for start in range(0, store.rows, rows):
        total += store.read(start, min(start + rows, store.rows)).sum(0, dtype=np.float64)
    return compare(run.trajectory(), total, n_train=run.noted.training_size)


def compare(trajectory: Trajectory, total: npt.NDArray[np.float64], *, n_train: int) -> dict[str, Any]:
    """Compare the sum of all hypergradients with what the record says it must be.

    Args:
        trajectory: The record.
        total: Sum of the hypergradients of all samples, shape (D,).
        n_train: N.

    Returns:
        ``applicable`` (True), ``ok``, ``groups``: one mapping a parameter group with ``group``,
        ``error`` = ||sum / N - moved|| / ||moved||, moved = w_T - phi_T w_0 - psi_T m_0, and its ``limit``.
    """
    start = FromStart(trajectory)
    steps = int(trajectory.learning_rate.shape[0])
    initial = start.first.weights
    dtype = str(initial.dtype)
    first = initial.astype(np.float64)
    last = trajectory.checkpoint(len(trajectory.checkpoint_steps) - 1).weights.astype(np.float64)
    mean = total / n_train
    squares: dict[int, list[float]] = {}
    for entry in trajectory.parameters:
        here = slice(entry.start, entry.start + math.prod(entry.shape))
        # SGD leaves a parameter without a gradient alone, weight decay included: nothing is lost then.
        still = np.array_equal(first[here], last[here]) and not mean[here].any()
        held, pushed = (first[here], 0.0 * first[here]) if entry.group < 0 or still else start.of(entry)
        expected = last[here] - held - pushed
        sums = squares.setdefault(entry.group, [0.0, 0.0, 0.0])
        sums[0] += float(((mean[here] - expected) ** 2).sum())
        sums[1] += float((expected**2).sum())
        sums[2] += float((last[here] ** 2).sum() + held @ held + pushed @ pushed)
    groups = []
    for group, (error, moved, weight) in sorted(squares.items()):
        if moved == 0.0:
            relative, limit = (0.0 if error == 0.0 else math.inf), 0.0
        else:
            relative = math.sqrt(error / moved)
            limit = BASE[dtype] + UNIT[dtype] * math.sqrt(steps * weight / moved)
        groups.append({"group": group, "error": relative, "limit": limit})
    return {"applicable": True, "ok": all(g["error"] <= g["limit"] for g in groups), "groups": groups}


def block_rows(chunk_rows: int, columns: int, itemsize: int) -> int:
    """Return how many rows to read at a time: whole chunks, about `BLOCK_BYTES`."""
    return max(1, BLOCK_BYTES // max(1, chunk_rows * columns * itemsize)) * chunk_rows


def _has_store(run: Reader) -> bool:
    mode = run.noted.entry(METHOD).mode or FORWARD
    return bool(run.directory.manifests(f"{METHOD}/{REPLAY}")) and mode != ADJOINT
