"""The plan: spec and machine in, shards, tiles, memory, disk and time out. Nothing is started.

Pure arithmetic over a ``Survey`` and the executor's capacity, so that the same inputs always cut
the work the same way. Letters: N training samples, n tracked, M test samples, Q targets, D parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...storage import layout
from ...storage.errors import DoesNotFit
from ...storage.precision import NUMBER_BYTES
from ...storage.rows import chunk_rows_for
from ...workers.determinism import restored_process
from ...workers.persample.engine import TILE
from ...workers.replay.targets import PANEL_BYTES as TARGET_PANEL_BYTES
from ...workers.training.borders import wanted_borders
from ...workers.training.record import checkpoint_steps
from ...workers.training.test_gradients import TEST_BATCH
from ..executors.base import Capacity
from ..executors.events import null, warn
from ..reading.panels import PANEL_BYTES
from ..spec.spec import RunSpec
from ..spec.targets import TargetSet, target_set
from ..vocabulary import CORRECTION, FORWARD, RECORD, REDUCE, REPLAY, SAMPLES, TEST_GRADIENTS
from .kept_visits import kept_bytes, memory_bytes
from .segmenting import Choice, Segmented, unfollowed
from .sharding import Shard, Sharding, correction_bytes, itemsize_of, spans
from .survey import Survey, survey
from .times import seconds_of

TEST_BLOCK_BYTES = 64 << 20
"""Test gradients of one unit."""

TILE_VALUES = 16_000_000
"""Contributions in one Parquet file: about 64 MB."""

WRITER_BYTES = 56 << 20
"""What writing a Parquet file takes at a time, measured (``docs/benchmarks.md``)."""

BYTES_PER_VALUE = 4.0
"""Parquet bytes of one contribution with its indices and labels, measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReduceTiles:
    """How the join is cut: rows a unit, rows a strip, test samples a panel and a file.

    All follow from n, Q, D and the memory budget alone, never from shards or workers, so that the
    bits of a contribution do not depend on where it was computed.
    """

    unit_rows: int
    strip_rows: int
    panel_rows: int
    file_tests: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReduceCut:
    """The reduce stage of a method: how a unit works, which units there are, and the bytes that a row becomes."""

    tiles: ReduceTiles
    blocks: tuple[Shard, ...]
    row_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of main memory.

    Attributes:
        process: Of one process that trains, without buffers.
        buffers: Of the largest shard.
        workers: Of a worker, by what it does.
    """

    process: int
    buffers: int
    workers: Mapping[str, int]

    @property
    def largest(self) -> int:
        """Of the worker that needs most."""
        return max(self.workers.values())

    def as_dict(self) -> dict[str, int]:
        """Return all of it, named as people are shown it."""
        return {
            "one process without buffers": self.process,
            "buffers of the largest shard": self.buffers,
            **{f"{name} worker": size for name, size in self.workers.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything the driver decides before it starts; ``as_dict`` is what users see."""

    n_train: int
    n_test: int
    n_tracked: int
    n_tested: int
    dimension: int
    columns: int
    dtype: str
    kept_dtype: str
    itemsize: int
    steps: int
    chunk_rows: int
    shards: tuple[Shard, ...]
    test_chunk_rows: int
    test_blocks: tuple[Shard, ...]
    targets: TargetSet
    target_chunk_rows: int
    target_blocks: tuple[Shard, ...]
    reduce: ReduceCut
    checkpoints: int
    memory: Memory
    disk: Mapping[str, int]
    seconds: Mapping[str, float]
    slots: int
    seeds: int
    segments: Segmented
    reduce_memory: int
    warnings: tuple[str, ...] = ()

    @property
    def row_bytes(self) -> float:
        """Bytes of a row of hypergradients in its store."""
        return self.columns * NUMBER_BYTES[self.kept_dtype]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able sections: run, shards, memory (bytes), disk (bytes), time (seconds), warnings if any."""
        return {
            "run": {
                "training samples": self.n_train,
                "test samples": self.n_test,
                "tracked": self.n_tracked,
                "tested": self.n_tested,
                "parameters": self.dimension,
                **({"numbers a row": self.columns} if self.columns != self.dimension else {}),
                **({"rows stored as": self.kept_dtype} if self.kept_dtype != self.dtype else {}),
                "steps": self.steps,
                "checkpoints": self.checkpoints,
                "targets": self.targets.kind,
                "target vectors": len(self.targets),
                "contributions": self.n_tracked * len(self.targets),
                "workers at a time": self.slots,
                **self._segments(),
                **({"seeds": self.seeds} if self.seeds > 1 else {}),
            },
            "shards": [
                {**asdict(shard), "bytes": round(shard.rows * self.row_bytes)} for shard in self.shards
            ],
            "memory": self.memory.as_dict(),
            "disk": dict(self.disk) | self._meanwhile(),
            "time": dict(self.seconds),
            **({"warnings": list(self.warnings)} if self.warnings else {}),
        }

    @property
    def collected(self) -> tuple[Shard, ...]:
        """The units of the stage that fills the method's store: shards, or blocks in which segments are added up."""
        return self.segments.blocks or self.shards

    def _segments(self) -> dict[str, int]:
        found = self.segments
        if found.count == 1:
            return {}
        return {"segments of the steps": found.count, "units of the replay": found.count * len(self.shards)}

    def _meanwhile(self) -> dict[str, int]:
        return {} if self.segments.count == 1 else {"sums of segments, until added up": self.segments.bytes}


def make_plan(spec: RunSpec) -> Plan:
    """Survey the recipe, ask the executor what it has, and cut the work. Starts nothing.

    Raises:
        RecipeError: The recipe cannot be traced.
        DoesNotFit: A shard would not fit into a worker's memory; says how many shards would.
    """
    from ..executors.ray import make_executor

    with restored_process():
        surveyed = survey(spec)
    for note in surveyed.notes:
        warn(null, note)
    executor = make_executor(spec)
    try:
        capacity = executor.capacity(start=False)
    finally:
        executor.close()
    found = cut(spec, surveyed, capacity)
    return replace(found, warnings=(*surveyed.warnings, *found.warnings))


def cut(
    spec: RunSpec,
    surveyed: Survey,
    capacity: Capacity,
    *,
    shards: int | None = None,
    segments: int | None = None,
    reduce_memory: int | None = None,
) -> Plan:
    """Cut the work of a surveyed recipe for machines of this capacity.

    Args:
        spec: What to run.
        surveyed: The recipe's numbers.
        capacity: Of the executor.
        shards: A number of shards that is fixed already, by an earlier start of the same run.
        segments: A number of segments, likewise.
        reduce_memory: What its tiles were cut for, likewise.

    Raises:
        DoesNotFit: See ``make_plan``; also where any worker needs more than ``--memory`` allows.
    """
    n, m, dimension = len(surveyed.tracked), len(surveyed.tested), surveyed.dimension
    columns = surveyed.columns
    targets = target_set(spec.targets, surveyed.tested, surveyed.test_labels[surveyed.tested])
    q, itemsize, row = len(targets), itemsize_of(spec.dtype), columns * itemsize_of(spec.dtype)
    sharding = Sharding(spec, surveyed, q)
    choice = Choice(spec, surveyed, sharding)
    replay, segmented = choice.cut(capacity, shards=shards, segments=segments)
    slots = capacity.slots or 1
    test_chunk_rows = chunk_rows_for(columns, itemsize, m)
    per_block = max(1, TEST_BLOCK_BYTES // (row * test_chunk_rows)) * test_chunk_rows
    process = surveyed.process_bytes
    budget = reduce_memory or _within(spec, n, q, row, process)
    reduce = cut_reduce(n, q, row, budget)
    # A mean is added up in float64, and every unit reads all test gradients: as few units as fit.
    target_chunk_rows = chunk_rows_for(columns, itemsize, q)
    per_unit = max(1, budget // 2 // (8 * columns * target_chunk_rows)) * target_chunk_rows
    kept = checkpoint_steps(surveyed.steps, dimension, itemsize, spec.checkpoint_every)
    kept += wanted_borders(surveyed.steps, segmented.count, kept)
    workers = {
        RECORD: process + memory_bytes(spec, surveyed),
        REPLAY: max(segmented.worker, segmented.adder),
        TEST_GRADIENTS: process + (min(m, per_block) + min(m, TEST_BATCH)) * dimension * itemsize,
        REDUCE: process + reduce.tiles.bytes + WRITER_BYTES,
    }
    if spec.exact_rank:
        workers[CORRECTION] = correction_bytes(surveyed, itemsize, spec.exact_rank)
    disk = {
        "trajectory": len(kept) * dimension * (1 + surveyed.optimizer_vectors) * itemsize
        + surveyed.steps * (int(surveyed.recipe.batch_size) * 4 + 60),
        "visits": kept_bytes(spec, surveyed),
        **(
            {layout.HYPERGRADIENTS: round(n * columns * NUMBER_BYTES[spec.kept_dtype])}
            if spec.mode == FORWARD
            else {layout.BY_TEST: n * q * itemsize}
        ),
        "test_gradients": m * row,
        "contributions": int(n * q * BYTES_PER_VALUE),
    }
    if targets.kind != SAMPLES:
        held = min(q, per_unit) * 8 * columns
        workers["target-gradients"] = process + held + 2 * TARGET_PANEL_BYTES
        disk["target_gradients"] = q * row
    times = seconds_of(surveyed, replay.shards, slots, q, spec, segmented)
    if spec.seeds > 1:
        # A unit's means (float64), spreads and a file on its way out; panels of the members' tables.
        held = 16 * reduce.tiles.unit_rows * q + 2 * PANEL_BYTES
        workers["average"] = process + held + WRITER_BYTES
        # As many runs again, one after the other, and what their average adds: mean and spread.
        disk["other seeds"] = (spec.seeds - 1) * sum(disk.values())
        disk["average over seeds"] = 2 * disk["contributions"]
        if times:
            times["other seeds"] = (spec.seeds - 1) * times.pop("total")
            times["total"] = sum(times.values())
    disk["total"] = sum(disk.values())
    if spec.memory:
        _check_memory(workers, process, spec.memory, fixed=shards is not None)
    return Plan(
        n_train=surveyed.n_train,
        n_test=surveyed.n_test,
        n_tracked=n,
        n_tested=m,
        dimension=dimension,
        columns=columns,
        dtype=spec.dtype,
        kept_dtype=spec.kept_dtype,
        itemsize=itemsize,
        steps=surveyed.steps,
        chunk_rows=replay.chunk_rows,
        shards=replay.shards,
        test_chunk_rows=test_chunk_rows,
        test_blocks=spans(m, per_block, "block"),
        targets=targets,
        target_chunk_rows=target_chunk_rows,
        target_blocks=spans(q, per_unit, "block"),
        reduce=reduce,
        checkpoints=len(kept),
        memory=Memory(process=process, buffers=segmented.buffers, workers=workers),
        disk=disk,
        seconds=times,
        slots=slots,
        seeds=spec.seeds,
        segments=segmented,
        reduce_memory=budget,
        warnings=unfollowed(spec),
    )


def _within(spec: RunSpec, n: int, q: int, row: int, process: int) -> int:
    """Return the memory that tiles are cut for: what is asked for, halved while ``--memory`` does not hold it.

    Halved and not fitted: what a process takes by itself is measured and varies a little, and the tiles must not.
    """
    budget = spec.reduce_memory
    least = _least(row, q)
    while spec.memory and budget // 2 >= least:
        if process + reduce_tiles(n, q, row, budget).bytes + WRITER_BYTES <= spec.memory:
            break
        budget //= 2
    return budget


_REMEDIES = {
    RECORD: "leave out what is kept of each visit (--visits off)",
    REPLAY: "use more --shards, or track fewer samples",
    TEST_GRADIENTS: "use fewer test samples (--test)",
    REDUCE: "use a smaller --reduce-memory",
    CORRECTION: "use a smaller --exact-rank",
}


def _check_memory(workers: Mapping[str, int], process: int, allowed: int, *, fixed: bool) -> None:
    """Refuse what needs more than ``--memory``: it holds for everything in a process, the process itself included.

    Raises:
        DoesNotFit: Names the worker that needs most, and how to make it need less.
    """
    name, needed = max(workers.items(), key=lambda item: item[1])
    if needed <= allowed:
        return
    remedy = _REMEDIES.get(name, "use a smaller --reduce-memory")
    if process > allowed:
        remedy = "a process that only trains takes more already: use a smaller --batch-size"
    elif fixed:
        remedy = f"{remedy} in a run of its own: this one keeps the cut that it began with"
    raise DoesNotFit(
        f"the {name} worker needs {needed:,} bytes ({process:,} of them for the process itself), --memory allows "
        f"{allowed:,} bytes; {remedy}, or allow more with --memory"
    )


def cut_reduce(n: int, q: int, row_bytes: int, budget: int) -> ReduceCut:
    """Cut the reduce stage of n tracked samples and Q targets; arguments as of `reduce_tiles`."""
    tiles = reduce_tiles(n, q, row_bytes, budget)
    written = int(q * BYTES_PER_VALUE)
    return ReduceCut(tiles=tiles, blocks=spans(n, tiles.unit_rows, "rows"), row_bytes=written)


def reduce_tiles(n: int, q: int, row_bytes: int, budget: int) -> ReduceTiles:
    """Cut the join so that the arrays of one task stay within ``budget`` bytes.

    Strips of hypergradients (20% each) meet panels of test gradients (15% each), both read one ahead;
    the contributions of a unit's rows to all Q targets (20%, and a third of that in passing) are then
    written file by file. Writing itself takes ``WRITER_BYTES`` beside the budget.

    Raises:
        DoesNotFit: The budget does not hold one row of each.
    """
    least = _least(row_bytes, q)
    if budget < least:
        raise DoesNotFit(
            f"--reduce-memory {budget:,} bytes does not hold rows of {row_bytes:,} bytes and their "
            f"contributions to {q:,} targets; use at least {least:,}"
        )
    share = int(0.2 * budget)
    strip = _tiled(min(n, share // row_bytes, share // (8 * q), 4096), n)
    panel = _tiled(min(q, int(0.15 * budget) // row_bytes, 4096), q)
    unit = min(n, strip * max(1, share // (q * 8 * strip)))
    file_tests = max(1, min(q, TILE_VALUES // unit))
    used = (1 + (unit > strip)) * strip * row_bytes + (1 + (q > panel)) * panel * row_bytes
    used += int(1.3 * unit * q * 8)
    return ReduceTiles(unit_rows=unit, strip_rows=strip, panel_rows=panel, file_tests=file_tests, bytes=used)


def _least(row_bytes: int, q: int) -> int:
    return max(8 * row_bytes, 40 * q)


def _tiled(rows: int, total: int) -> int:
    """Return ``rows`` or a little less: whole tiles, where that leaves any and not all fit."""
    rows = max(1, rows)
    return rows - rows % TILE if TILE < rows < total else rows
