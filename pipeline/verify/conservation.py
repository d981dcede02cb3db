"""The conservation law: a check of a whole run that needs no oracle.

Without the Hessian and with every training sample tracked, per-sample gradients of a batch
average to its gradient, hence, per parameter group,

    sum_i hypergradient_i / N = w_T - phi_T w_0 - psi_T m_0 - rest

where phi_T is the optimiser's scalar recursion started from 1 (1 when weight decay is 0), and psi_T the same
started from momentum 1, where training began with momentum m_0. The rest is 0 but for clipped steps and Adam: each
shard followed it beside the training and noted it along a few random directions, along which the sums
are then compared. One wrong row, step or coefficient breaks the law. Letters: N training samples, D parameters,
G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ...storage.precision import UNIT as UNIT_OF
from ...storage.trajectory import Trajectory
from ...workers.recursion.coefficients import recorded_settings
from ...workers.recursion.conservation import (
    BASE,
    NOISY,
    FromStart,
    RowSums,
    autocast_rounding,
    laws_of,
    worst_of,
)
from ...workers.recursion.rest import UNIT, leaves_a_rest
from ..reading.kept_rows import row_map_of
from ..reading.unit_values import ReplayValues, values_of
from ..vocabulary import ADJOINT, CLOSING_UNITS, FAST, FORWARD, REPLAY

if TYPE_CHECKING:
    from ...storage.rows import RowStore
    from ...workers.model.row_map import RowMap
    from ..reading.reader import Reader

Found: TypeAlias = dict[str, Any]
"""What the law came to, JSON-able."""

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


def conservation(run: Reader) -> Found:
    """Stream the hypergradient store and compare its sum with the weights of the record.

    Returns:
        What `compare` returns, or ``{"applicable": False, "reason": ...}``.
    """
    reason = not_applicable(run)
    if reason is not None:
        return {"applicable": False, "reason": reason}
    store = run.hypergradient_store(METHOD)
    total, absolute = np.zeros(store.columns), np.zeros(store.columns)
    unit = rounding_unit(run, store)
    rows = block_rows(store.chunk_rows, store.columns, np.dtype(store.dtype).itemsize)
    for start in range(0, store.rows, rows):
        block = store.read(start, min(start + rows, store.rows))
        total += block.sum(0, dtype=np.float64)
        if unit is not None:
            absolute += np.abs(block).sum(0, dtype=np.float64)
    return judged(run, total, row_map_of(run), None if unit is None else unit * absolute)


def rounding_unit(run: Reader, store: RowStore) -> float | None:
    """Return how far a number may have been rounded when it was stored, relative; None: not at all."""
    kept = store.precision or store.dtype
    return None if kept == run.noted.identity.get("dtype", kept) else UNIT_OF[kept]


def judged(
    run: Reader,
    total: npt.NDArray[np.float64],
    row_map: RowMap | None = None,
    rounded: npt.NDArray[np.float64] | None = None,
) -> Found:
    """Hold the sum of all hypergradients against the law.

    Args:
        run: The run.
        total: The sum, (columns,).
        row_map: What is kept of a row; None: all, so that there are D columns.
        rounded: What the rounding of stored rows may come to in the sum, (columns,); None: nothing.

    Returns:
        As `conservation`.
    """
    trajectory, n_train = run.trajectory(), run.noted.training_size
    manifests = run.directory.manifests(f"{METHOD}/{REPLAY}")
    shards = [values_of(ReplayValues, m) for m in manifests if m.unit not in CLOSING_UNITS]
    rest = leaves_a_rest(recorded_settings(trajectory))
    if not rest and row_map is None and rounded is None:
        return compare(trajectory, total, n_train=n_train, noise=_noise(shards))
    if any(shard.law is None for shard in shards):
        return {"applicable": False, "reason": "the shards did not note the sizes of their rows"}
    if rest and not all(shard.law is not None and "rest" in shard.law for shard in shards):
        reason = "the shards did not note what clipping or Adam leave out of the hypergradients"
        return {"applicable": False, "reason": reason}
    return _compare_along(trajectory, total, shards, n_train, row_map, rounded)


def _compare_along(
    trajectory: Trajectory,
    total: npt.NDArray[np.float64],
    shards: Sequence[ReplayValues],
    n_train: int,
    row_map: RowMap | None,
    rounded: npt.NDArray[np.float64] | None,
) -> Found:
    """Compare along the directions that the shards noted; returns as `compare`, of each group its worst parameter.

    Errors are relative to what the parameter moved or, where that is more, to the size of a row.
    """
    rows = RowSums(trajectory.parameters, row_map)
    sums, entries = np.asarray(rows.along(total)), rows.parameters
    noted = [shard.law for shard in shards if shard.law is not None]
    rounding = None
    if rounded is not None:
        spans = [slice(e.start, e.start + math.prod(e.shape)) for e in entries]
        rounding = np.array([float(np.linalg.norm(rounded[span])) for span in spans]) / n_train
    laws = laws_of(trajectory, sums, noted, n_train, _noise(shards), row_map, rounding)
    groups = []
    for group in sorted({entry.group for entry in entries}):
        of_group = [one for one, e in zip(laws, entries, strict=True) if e.group == group]
        worst = worst_of(of_group)
        groups.append({"group": group, "error": worst.error, "limit": worst.limit})
    return {"applicable": True, "ok": all(one.ok for one in laws), "groups": groups}


def _noise(shards: Sequence[ReplayValues]) -> float:
    """Return how exactly rows of a batch added up in the trials: not far under autocast, for one."""
    return max((shard.ways.get("noise", 0.0) for shard in shards if shard.ways is not None), default=0.0)


def compare(
    trajectory: Trajectory, total: npt.NDArray[np.float64], *, n_train: int, noise: float = 0.0
) -> Found:
    """Compare the sum of all hypergradients with what the record says it must be.

    Args:
        trajectory: The record.
        total: Sum of the hypergradients of all samples, shape (D,).
        n_train: N.
        noise: See ``workers.recursion.conservation.law_of``.

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
            limit = max(BASE[dtype], NOISY * max(noise, autocast_rounding(trajectory))) + UNIT[
                dtype
            ] * math.sqrt(steps * weight / moved)
        groups.append({"group": group, "error": relative, "limit": limit})
    return {"applicable": True, "ok": all(g["error"] <= g["limit"] for g in groups), "groups": groups}


def block_rows(chunk_rows: int, columns: int, itemsize: int) -> int:
    """Return how many rows to read at a time: whole chunks, about `BLOCK_BYTES`."""
    return max(1, BLOCK_BYTES // max(1, chunk_rows * columns * itemsize)) * chunk_rows


def _has_store(run: Reader) -> bool:
    mode = run.noted.entry(METHOD).mode or FORWARD
    return bool(run.directory.manifests(f"{METHOD}/{REPLAY}")) and mode != ADJOINT
