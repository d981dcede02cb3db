"""How the tracked samples (or, in adjoint mode, the targets) are cut into shards, and what fits.

Pure arithmetic. A shard is a whole number of chunks; the cut depends on the number of shards alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...storage.errors import DoesNotFit
from ...storage.rows import chunk_rows_for
from ...workers.hessian.tiles import TILE, working_bytes
from ...workers.replay.adjoint import SEGMENT_BYTES
from ...workers.replay.projection import TARGET_TILE
from ..spec.spec import RunSpec
from ..spec.targets import target_set
from ..vocabulary import ADJOINT
from .survey import Survey

WRITE_CHUNKS = 4
"""Chunks of hypergradients formed and written at a time: they are encoded in parallel."""

EXACT_TARGETS = TILE
"""Targets of the exact adjoint in a chunk, one tile; shards are whole chunks, so tiles are the same for any."""

TILE_VECTORS = 6
"""Vectors of D numbers that a row of a tile takes in passing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Rows ``start`` to ``stop`` of the tracked samples (or targets), a whole number of chunks."""

    name: str
    start: int
    stop: int


def spans(total: int, rows: int, label: str) -> tuple[Shard, ...]:
    """Cut ``range(total)`` into units of ``rows``, named ``label-00000`` and so on."""
    return tuple(
        Shard(name=f"{label}-{k:05d}", start=start, stop=min(total, start + rows))
        for k, start in enumerate(range(0, total, rows))
    )


class Sharding:
    """The cut of one run.

    Args:
        spec: What to run.
        surveyed: The recipe's numbers.

    Attributes:
        targets: The targets of the spec.
        items: What is cut: n tracked samples, or Q targets in adjoint mode.
        row: Bytes of D numbers.
        held: Bytes a worker holds an item.
    """

    def __init__(self, spec: RunSpec, surveyed: Survey) -> None:
        self.spec, self.surveyed = spec, surveyed
        self.itemsize = 8 if spec.dtype == "float64" else 4
        self.row = surveyed.dimension * self.itemsize
        tracked = len(surveyed.tracked)
        self.adjoint = spec.mode == ADJOINT
        self.targets = target_set(spec.targets, surveyed.tested, surveyed.test_labels[surveyed.tested])
        if self.adjoint:
            self.items, self.held = len(self.targets), 2 * self.row + 2 * tracked * self.itemsize
        else:
            numbers = {
                "none": surveyed.row_numbers,
                "ekfac": surveyed.dimension,
                "exact": 2 * surveyed.dimension,
            }
            self.items, self.held = tracked, numbers[spec.hessian] * self.itemsize

    def chunk_rows(self, count: int) -> int:
        """Return the rows of a chunk when there are ``count`` shards."""
        if self.adjoint:
            return EXACT_TARGETS if self.spec.hessian == "exact" else TARGET_TILE
        return chunk_rows_for(self.surveyed.dimension, self.itemsize, self.items, count)

    def parts(self, count: int) -> tuple[Shard, ...]:
        """Deal whole chunks to ``count`` contiguous shards whose chunk counts differ by at most one."""
        rows = self.chunk_rows(count)
        chunks = math.ceil(self.items / rows)
        count = min(count, chunks)
        each, extra = divmod(chunks, count)
        label = "targets" if self.adjoint else "shard"
        shards, start = [], 0
        for k in range(count):
            stop = min(self.items, start + (each + (k < extra)) * rows)
            shards.append(Shard(name=f"{label}-{k:05d}", start=start, stop=stop))
            start = stop
        return tuple(shards)

    def widest(self, count: int) -> int:
        """Return the items of the largest of ``count`` shards."""
        return max(shard.stop - shard.start for shard in self.parts(count))

    def needed(self, count: int) -> int:
        """Return the bytes that a worker of the largest shard will use."""
        return self._bytes(self.widest(count), self.chunk_rows(count))

    def correction(self) -> int:
        """Return the bytes that a worker uses for a chunk of the directions of ``exact_rank``."""
        exact = Sharding(replace(self.spec, mode=ADJOINT, hessian="exact", exact_rank=0), self.surveyed)
        return exact._bytes(min(self.spec.exact_rank, EXACT_TARGETS), EXACT_TARGETS)

    def _bytes(self, widest: int, chunk_rows: int) -> int:
        if self.adjoint:
            segment = SEGMENT_BYTES if self.spec.hessian == "exact" else 0
            spare = min(segment, self.surveyed.steps * self.row) + widest * self.row
        else:
            # Rows being formed, encoded and written.
            spare = min(2 * widest, (2 * WRITE_CHUNKS + 1) * chunk_rows) * self.row
        if self.spec.hessian == "exact":
            spare += working_bytes(self.surveyed.activation_bytes) + TILE_VECTORS * TILE * self.row
        return self.surveyed.process_bytes + widest * self.held + spare

    def count(self, capacity: Mapping[str, Any]) -> int:
        """Return how many shards to cut: those asked for, or one a worker and more where memory wants it.

        Args:
            capacity: ``slots``, ``memory_per_worker`` (bytes; 0 or absent: unknown).

        Raises:
            DoesNotFit: A shard does not fit into a worker; says how many shards would.
        """
        budget = self.spec.memory or int(capacity.get("memory_per_worker") or 0)
        if self.spec.shards == "auto":
            asked = min(self.items, int(capacity.get("slots") or 1))
        else:
            asked = min(int(self.spec.shards), self.items)
        if not budget or self.needed(asked) <= budget:
            return asked
        fitting = self._fitting(asked, budget)
        if fitting is None:
            what = "target" if self.adjoint else "tracked sample"
            raise DoesNotFit(
                f"one {what} needs {self.needed(self.items):,} bytes in a worker of {budget:,} bytes; "
                "use workers with more memory (--memory, fewer --workers)"
            )
        if self.spec.shards == "auto":
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
