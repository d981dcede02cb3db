"""How rows are cut into shards, and what of it fits into a worker: arithmetic on plain numbers.

A shard is a whole number of chunks; the cut depends on the number of shards alone, never on machines.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

from ...storage.errors import DoesNotFit
from ...storage.rows import chunk_rows_for
from ...workers.hessian.tiles import TILE, block_width, working_bytes
from ...workers.persample.engine import TILE as ROWS_TILE
from ...workers.replay.adjoint import SEGMENT_BYTES
from ...workers.replay.projection import TARGET_TILE
from ...workers.replay.sampled import AT_A_TIME, most_rows
from ..executors.base import Capacity
from ..spec.spec import RunSpec
from ..vocabulary import ADJOINT, CARRIED, EKFAC, EXACT, FAST, Form
from .survey import Survey

WRITE_CHUNKS = 4
"""Chunks of hypergradients formed and written at a time: they are encoded in parallel."""

EXACT_TARGETS = TILE
"""Targets that estimators carry back exactly at a time."""

TILE_VECTORS = 6
"""Vectors of D numbers that a row of a tile takes in passing."""

USUAL_MEMORY = 4 << 30
"""Bytes that a worker is taken to have where nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Rows ``start`` to ``stop`` of the tracked samples (or targets), a whole number of chunks."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Shards, and the rows of a chunk of the store that they fill."""

    chunk_rows: int
    shards: tuple[Shard, ...]

    @property
    def widest(self) -> int:
        """Rows of the largest shard."""
        return max(shard.rows for shard in self.shards)


def spans(total: int, rows: int, label: str) -> tuple[Shard, ...]:
    """Cut ``range(total)`` into units of ``rows``, named ``label-00000`` and so on."""
    return tuple(
        Shard(name=f"{label}-{k:05d}", start=start, stop=min(total, start + rows))
        for k, start in enumerate(range(0, total, rows))
    )


def cut_forward(samples: int, columns: int, itemsize: int, count: int, chunk_rows: int | None = None) -> Cut:
    """Cut tracked samples into ``count`` shards, fewer where there are not as many chunks.

    Args:
        samples: n.
        columns: Numbers of a row.
        itemsize: Bytes of a number.
        count: Shards.
        chunk_rows: Rows of a chunk; None: as many as suit the shards.
    """
    rows = chunk_rows or chunk_rows_for(columns, itemsize, samples, count)
    return Cut(chunk_rows=rows, shards=_dealt(samples, rows, count, "shard"))


def cut_targets(targets: int, tile: int, count: int) -> Cut:
    """Cut targets into ``count`` shards of whole tiles."""
    return Cut(chunk_rows=tile, shards=_dealt(targets, tile, count, "targets"))


def _dealt(items: int, rows: int, count: int, label: str) -> tuple[Shard, ...]:
    """Deal whole chunks to ``count`` contiguous shards whose chunk counts differ by at most one."""
    chunks = math.ceil(items / rows)
    count = min(count, chunks)
    each, extra = divmod(chunks, count)
    shards, start = [], 0
    for k in range(count):
        stop = min(items, start + (each + (k < extra)) * rows)
        shards.append(Shard(name=f"{label}-{k:05d}", start=start, stop=stop))
        start = stop
    return tuple(shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a worker holds, in bytes.

    Attributes:
        process: It alone.
        item: For each sample (or target) of its shard.
        row: D numbers.
        segment: Of the coefficients or weights kept for a stretch of steps.
        passing: In passing, whatever the shard.
        folding: Where rows are stored in fewer numbers or bits, likewise.
        adjoint: Whether items are targets.
    """

    process: int
    item: int
    row: int
    segment: int
    passing: int
    folding: int
    adjoint: bool

    def bytes(self, cut: Cut) -> int:
        """Return what a worker of the largest shard uses."""
        if self.adjoint:
            spare = self.segment + cut.widest * self.row
        else:  # rows being formed, encoded and written
            spare = min(2 * cut.widest, (2 * WRITE_CHUNKS + 1) * cut.chunk_rows) * self.row
        return self.process + cut.widest * self.item + spare + self.passing + self.folding


def load_of(surveyed: Survey, itemsize: int, *, adjoint: bool, form: Form, lossy: bool = False) -> Load:
    """Return what a worker of a replay holds.

    Args:
        surveyed: The recipe's numbers.
        itemsize: Bytes of a number.
        adjoint: Whether it carries targets backwards.
        form: Of the Hessian.
        lossy: Whether rows are stored with fewer bits, so that what is lost is sampled.
    """
    whole, carried = surveyed.dimension * itemsize, form in CARRIED
    row = whole if adjoint else surveyed.columns * itemsize
    vectors = 1 + surveyed.optimizer_vectors
    held = 1 + vectors if surveyed.moments else 1
    if adjoint:
        item = vectors * row + 2 * len(surveyed.tracked) * itemsize
    else:
        numbers = {FAST: surveyed.row_numbers, EKFAC: _ekfac_numbers(surveyed)}
        item = numbers.get(form, vectors * surveyed.dimension) * itemsize
    together = block_width(surveyed.activation_bytes) if adjoint else TILE
    tiles = working_bytes(surveyed.activation_bytes) + TILE_VECTORS * together * whole
    folding = 0
    if not adjoint and (lossy or surveyed.row_map is not None):
        # Signs, tiles of rows that are folded and turned back, sampled rows and targets.
        folding = (1 + 3 * ROWS_TILE + most_rows(whole) + 3 * AT_A_TIME) * whole
    return Load(
        process=surveyed.process_bytes,
        item=item,
        row=row,
        segment=min(SEGMENT_BYTES if carried else 0, surveyed.steps * held * whole),
        passing=tiles if carried else 0,
        folding=folding,
        adjoint=adjoint,
    )


def _ekfac_numbers(surveyed: Survey) -> int:
    """Return the numbers that EKFAC keeps a sample at most: of a row in part, as many again that bend (``replay.split``)."""
    return surveyed.dimension if surveyed.row_map is None else 2 * surveyed.columns


def correction_bytes(surveyed: Survey, itemsize: int, rank: int) -> int:
    """Return the bytes that a worker uses for a chunk of ``rank`` directions carried back exactly."""
    load = load_of(surveyed, itemsize, adjoint=True, form=EXACT)
    together = exact_targets(surveyed)
    return load.bytes(cut_targets(min(rank, together), together, 1))


def exact_targets(surveyed: Survey) -> int:
    """Return the targets of the exact adjoint in a chunk of their store, which are carried together.

    From the recipe's sizes alone, and what is carried where the store is there is as many as it says: the bits of a
    target are those of its tile. Shards are whole chunks, so tiles are the same for any number of them.
    """
    return block_width(surveyed.activation_bytes)


class Sharding:
    """The cut of a run's replay.

    Args:
        spec: What to run.
        surveyed: The recipe's numbers.
        targets: Q.

    Attributes:
        items: What is cut: n tracked samples, or Q targets in adjoint mode.
        load: What a worker holds.
    """

    def __init__(self, spec: RunSpec, surveyed: Survey, targets: int) -> None:
        self.itemsize = itemsize_of(spec.dtype)
        self._asked, self._memory = spec.shards, spec.memory
        self._segments = 1
        self._columns = surveyed.columns
        self._tile = exact_targets(surveyed) if spec.form in CARRIED else TARGET_TILE
        adjoint = spec.mode == ADJOINT
        self.items = targets if adjoint else len(surveyed.tracked)
        lossy = spec.kept_dtype != spec.dtype
        self.load = load_of(surveyed, self.itemsize, adjoint=adjoint, form=spec.form, lossy=lossy)

    def of_segments(self, count: int, numbers: int, share: float) -> Sharding:
        """Return the same where a unit is a shard and one of so many segments.

        Args:
            count: K.
            numbers: That a worker holds of a sample which its segment visits.
            share: Of the samples that a segment visits.
        """
        found = copy.copy(self)
        found._segments = count
        if count > 1:
            item = max(1, math.ceil(numbers * self.itemsize * share))
            found.load = replace(self.load, item=item)
        return found

    def cut(self, count: int) -> Cut:
        """Return the cut into ``count`` shards."""
        if self.load.adjoint:
            return cut_targets(self.items, self._tile, count)
        return cut_forward(self.items, self._columns, self.itemsize, count)

    def needed(self, count: int) -> int:
        """Return the bytes that a worker of the largest of ``count`` shards will use."""
        return self.load.bytes(self.cut(count))

    def count(self, capacity: Capacity) -> int:
        """Return how many shards to cut: those asked for, or one a worker and more where memory wants it.

        Raises:
            DoesNotFit: A shard does not fit into a worker; says how many shards would.
        """
        budget = self._memory or capacity.memory_per_worker
        # One unit a worker, at least.
        least = math.ceil((capacity.slots or 1) / self._segments)
        asked = min(self.items, least if self._asked == "auto" else int(self._asked))
        if not budget or self.needed(asked) <= budget:
            return asked
        fitting = self._fitting(asked, budget)
        if fitting is None:
            what = "target" if self.load.adjoint else "tracked sample"
            raise DoesNotFit(
                f"one {what} needs {self.needed(self.items):,} bytes in a worker of {budget:,} bytes; "
                "use workers with more memory (--memory, fewer --workers)"
            )
        if self._asked == "auto":
            return fitting
        raise DoesNotFit(
            f"{asked} shards need {self.needed(asked):,} bytes in a worker of {budget:,} bytes; "
            f"use --shards {fitting} or more, or track fewer samples"
        )

    def _fitting(self, count: int, budget: int) -> int | None:
        """Return the smallest number of shards, within 2%, that fits; None: not even single items."""
        while self.needed(count) > budget:
            if count >= self.items:
                return None
            count = min(self.items, count + max(1, count // 50))
        return count


def itemsize_of(dtype: str) -> int:
    """Return the bytes of a number of a run's dtype."""
    return 8 if dtype == "float64" else 4
