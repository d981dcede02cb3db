"""The plan: spec and machine in, shards, tiles, memory, disk and time out. Nothing is started.

Pure arithmetic over a ``Survey`` and the executor's capacity, so that the same inputs always cut
the work the same way. Letters: N training samples, n tracked, M test samples, D parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..storage.errors import DoesNotFit
from ..storage.rows import chunk_rows_for
from ..workers.adjoint import SEGMENT_BYTES
from ..workers.determinism import restored_process
from ..workers.gradients import TEST_BATCH
from ..workers.persample.engine import TILE
from ..workers.projection import TARGET_TILE
from ..workers.record import checkpoint_steps
from .spec import RunSpec
from .survey import Survey, survey

TEST_BLOCK_BYTES = 64 << 20
"""Test gradients of one unit."""

EXACT_TARGETS = 8
"""Targets of the exact adjoint in a chunk; shards are whole chunks."""

TILE_VALUES = 16_000_000
"""Contributions in one Parquet file: about 64 MB."""

BYTES_PER_VALUE = 4.0
"""Parquet bytes of one contribution with its indices and labels, measured."""

MATMUL_RATE = 40e9
"""Multiply-adds of float32 a second and thread assumed for the reduce stage's estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Rows ``start`` to ``stop`` of the tracked samples, a whole number of chunks."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReduceTiles:
    """How the join is cut: rows a unit, rows a strip, test samples a panel and a file.

    All follow from n, M, D and the memory budget alone, never from shards or workers, so that the
    bits of a contribution do not depend on where it was computed.
    """

    unit_rows: int
    strip_rows: int
    panel_rows: int
    file_tests: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything the driver decides before it starts; ``as_dict`` is what users see."""

    n_train: int
    n_test: int
    n_tracked: int
    n_tested: int
    dimension: int
    itemsize: int
    steps: int
    chunk_rows: int
    shards: tuple[Shard, ...]
    test_chunk_rows: int
    test_blocks: tuple[Shard, ...]
    reduce: ReduceTiles
    reduce_blocks: tuple[Shard, ...]
    checkpoints: int
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    seconds: Mapping[str, float]
    capacity: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able sections: run, shards, memory (bytes), disk (bytes), time (seconds)."""
        return {
            "run": {
                "training samples": self.n_train,
                "test samples": self.n_test,
                "tracked": self.n_tracked,
                "tested": self.n_tested,
                "parameters": self.dimension,
                "steps": self.steps,
                "checkpoints": self.checkpoints,
                "contributions": self.n_tracked * self.n_tested,
                "workers at a time": self.capacity.get("slots"),
            },
            "shards": [
                {**asdict(shard), "bytes": (shard.stop - shard.start) * self.dimension * self.itemsize}
                for shard in self.shards
            ],
            "memory": dict(self.memory),
            "disk": dict(self.disk),
            "time": dict(self.seconds),
        }


def make_plan(spec: RunSpec) -> Plan:
    """Survey the recipe, ask the executor what it has, and cut the work. Starts nothing.

    Raises:
        RecipeError: The recipe cannot be traced.
        DoesNotFit: A shard would not fit into a worker's memory; says how many shards would.
    """
    from .executors import make_executor

    with restored_process():
        looked = survey(spec)
    executor = make_executor(spec)
    try:
        capacity = executor.capacity(start=False)
    finally:
        executor.close()
    return cut(spec, looked, capacity)


def cut(spec: RunSpec, looked: Survey, capacity: Mapping[str, Any], *, shards: int | None = None) -> Plan:
    """Cut the work of a surveyed recipe for machines of this capacity.

    Args:
        spec: What to run.
        looked: The recipe's numbers.
        capacity: ``slots``, ``memory_per_worker`` (bytes) and what else the executor says.
        shards: A number of shards that is fixed already, by an earlier start of the same run.

    Raises:
        DoesNotFit: See ``make_plan``.
    """
    itemsize = 8 if spec.dtype == "float64" else 4
    n, m, dimension = len(looked.tracked), len(looked.tested), looked.dimension
    row = dimension * itemsize
    numbers = {"none": looked.row_numbers, "ekfac": dimension, "exact": 2 * dimension}
    held = numbers[spec.hessian] * itemsize
    items = n
    if spec.mode == "adjoint":  # shards are blocks of targets
        held, items = 2 * row + 2 * n * itemsize, m
    slots = int(capacity.get("slots") or 1)
    budget = spec.memory or int(capacity.get("memory_per_worker") or 0)
    count = shards or _shard_count(spec, items, held, slots, budget, looked)
    chunk_rows = chunk_rows_for(dimension, itemsize, n, count)
    if spec.mode == "adjoint":
        chunk_rows = EXACT_TARGETS if spec.hessian == "exact" else TARGET_TILE
    parts = _cut_chunks(items, chunk_rows, count, "shard" if spec.mode == "forward" else "targets")
    test_chunk_rows = chunk_rows_for(dimension, itemsize, m)
    per_block = max(1, TEST_BLOCK_BYTES // (row * test_chunk_rows)) * test_chunk_rows
    tiles = reduce_tiles(n, m, row, spec.reduce_memory)
    kept = checkpoint_steps(looked.steps, dimension, itemsize, spec.checkpoint_every)
    widest = max(shard.stop - shard.start for shard in parts)
    spare = 3 * chunk_rows * row
    if spec.mode == "adjoint":
        segment = SEGMENT_BYTES if spec.hessian == "exact" else 0
        spare = min(segment, looked.steps * row) + widest * row
    memory = {
        "one process without buffers": looked.process_bytes,
        "buffers of the largest shard": widest * held,
        "replay worker": looked.process_bytes + widest * held + spare,
        "test-gradients worker": looked.process_bytes + (per_block + TEST_BATCH) * row,
        "reduce worker": looked.process_bytes + tiles.bytes,
    }
    _refuse_what_does_not_fit(
        count, items, held, spare, budget, memory["replay worker"], looked.process_bytes
    )
    blocks = spans(m, per_block, "block")
    units = spans(n, tiles.unit_rows, "rows")
    disk = {
        "trajectory": len(kept) * dimension * 2 * itemsize + looked.steps * (spec_batch(looked) * 4 + 60),
        **({"hypergradients": n * row} if spec.mode == "forward" else {"by_test": n * m * itemsize}),
        "test_gradients": m * row,
        "contributions": int(n * m * BYTES_PER_VALUE),
    }
    disk["total"] = sum(disk.values())
    return Plan(
        n_train=looked.n_train,
        n_test=looked.n_test,
        n_tracked=n,
        n_tested=m,
        dimension=dimension,
        itemsize=itemsize,
        steps=looked.steps,
        chunk_rows=chunk_rows,
        shards=parts,
        test_chunk_rows=test_chunk_rows,
        test_blocks=blocks,
        reduce=tiles,
        reduce_blocks=units,
        checkpoints=len(kept),
        memory=memory,
        disk=disk,
        seconds=_times(looked, parts, slots, n, m, spec),
        capacity=dict(capacity),
    )


def spec_batch(looked: Survey) -> int:
    """Return the batch size of the surveyed recipe."""
    return int(looked.recipe.batch_size)


def _shard_count(spec: RunSpec, n: int, held: int, slots: int, budget: int, looked: Survey) -> int:
    """Shards asked for; with ``auto`` one a worker, or more where memory wants more."""
    if spec.shards != "auto":
        return min(int(spec.shards), n)
    room = budget - looked.process_bytes
    needed = math.ceil(1.2 * n * held / room) if room > 0 else 1
    return min(n, max(slots, needed))


def _refuse_what_does_not_fit(
    count: int, n: int, held: int, spare: int, budget: int, needed: int, process: int
) -> None:
    """Raise DoesNotFit when a worker needs more than ``budget`` bytes (0: unknown).

    Args:
        count: Shards.
        n: Tracked samples.
        held: Bytes of buffers a tracked sample.
        spare: Bytes for forming and writing rows.
        budget: Bytes a worker may use.
        needed: Bytes a worker of the largest shard will use.
        process: Bytes of a worker without buffers.
    """
    if not budget or needed <= budget:
        return
    room = budget - process - spare
    if room < held:
        raise DoesNotFit(
            f"one tracked sample needs {process + spare + held:,} bytes in a worker of {budget:,} bytes; "
            "use workers with more memory (--memory, fewer --workers)"
        )
    fits = math.ceil(n / (room // held))
    raise DoesNotFit(
        f"{count} shards need {needed:,} bytes in a worker of {budget:,} bytes; "
        f"use --shards {max(fits, count + 1)} or more, or track fewer samples"
    )


def _cut_chunks(n: int, chunk_rows: int, count: int, label: str) -> tuple[Shard, ...]:
    """Deal whole chunks to ``count`` contiguous shards whose chunk counts differ by at most one."""
    chunks = math.ceil(n / chunk_rows)
    count = min(count, chunks)
    each, extra = divmod(chunks, count)
    shards, start = [], 0
    for k in range(count):
        stop = min(n, start + (each + (k < extra)) * chunk_rows)
        shards.append(Shard(name=f"{label}-{k:05d}", start=start, stop=stop))
        start = stop
    return tuple(shards)


def spans(total: int, rows: int, label: str) -> tuple[Shard, ...]:
    """Cut ``range(total)`` into units of ``rows``, named ``label-00000`` and so on."""
    return tuple(
        Shard(name=f"{label}-{k:05d}", start=start, stop=min(total, start + rows))
        for k, start in enumerate(range(0, total, rows))
    )


def reduce_tiles(n: int, m: int, row_bytes: int, budget: int) -> ReduceTiles:
    """Cut the join so that one task stays within ``budget`` bytes.

    Strips of hypergradients (20% each) meet panels of test gradients (15% each), both read one ahead;
    the contributions of a unit's rows to all M tests (20%) are then written file by file.

    Raises:
        DoesNotFit: The budget does not hold one row of each.
    """
    if budget < 8 * row_bytes:
        raise DoesNotFit(
            f"--reduce-memory {budget:,} bytes is less than 8 rows of {row_bytes:,} bytes; "
            f"use at least {8 * row_bytes:,}"
        )
    strip = max(1, min(n, int(0.2 * budget) // row_bytes, 4096))
    strip = strip - strip % TILE if strip > TILE and strip < n else strip
    panel = max(1, min(m, int(0.15 * budget) // row_bytes, 4096))
    panel = panel - panel % TILE if panel > TILE and panel < m else panel
    strips = max(1, int(0.2 * budget) // (m * 8 * strip))
    unit = min(n, strip * strips)
    file_tests = max(1, min(m, TILE_VALUES // unit))
    used = (
        (1 + (unit > strip)) * strip * row_bytes
        + (1 + (m > panel)) * panel * row_bytes
        + unit * m * 8
        + 48 * (1 << 20)
    )
    return ReduceTiles(
        unit_rows=unit, strip_rows=strip, panel_rows=panel, file_tests=file_tests, bytes=int(used)
    )


def _times(
    looked: Survey, shards: tuple[Shard, ...], slots: int, n: int, m: int, spec: RunSpec
) -> dict[str, float]:
    if looked.step_seconds is None:
        return {}
    plain, tracked = looked.step_seconds
    widest = max(shard.stop - shard.start for shard in shards)
    if spec.hessian == "exact":  # a product with the Hessian takes about one plain step and a half
        replay = looked.steps * plain * (2 + 1.5 * widest)
    elif spec.mode == "adjoint" or spec.hessian == "ekfac":
        replay = looked.steps * tracked
    else:
        replay = looked.steps * (plain + (tracked - plain) * min(1.0, widest / looked.n_train))
    join = n * m * looked.dimension / (MATMUL_RATE * spec.torch_threads)
    waves = math.ceil(len(shards) / slots)
    times = {
        "record": looked.steps * plain,
        "test-gradients": tracked * m / spec_batch(looked) / slots,
        "replay": replay * waves,
        "reduce": join / slots,
    }
    return {**times, "total": sum(times.values())}
