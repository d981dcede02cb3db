"""How the steps of a replay are cut into segments: how many, what a worker holds of one, what is moved.

Arithmetic on plain numbers, as in `sharding`. Letters: n tracked samples, S shards of them, K segments, W workers at a
time, T steps, E epochs, D parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...storage.rows import chunk_rows_for
from ...workers.replay.buffers import factor_slots
from ...workers.replay.sampled import most_rows
from ...workers.training.record import CHECKPOINT_BYTES
from ...workers.training.trials import LEAST, STEPS_A_TRIAL
from ..executors.base import Capacity
from ..spec.spec import RunSpec
from ..vocabulary import CARRIED, EKFAC, FAST, FORWARD
from .sharding import WRITE_CHUNKS, Cut, Load, Shard, Sharding, cut_forward, itemsize_of, spans
from .survey import Survey

LEAST_STEPS = 16
"""Steps of a segment that ``auto`` makes, at least: a unit has to build its model first."""

SETUP_STEPS, TRIAL_STEPS = 10, 6
"""Tracked steps that building a training takes, about, and a trial of the ways to per-sample gradients."""

EKFAC_SEGMENTS = 16
"""Segments that ``auto`` makes with EKFAC, at most: each follows its coefficients back from the end of training."""

MOST_BLOCKS = 64
"""Blocks in which rows are added up, unless they are many bytes: each reads a piece of every store of sums."""

BLOCK_BYTES = 1 << 30
"""Hypergradients of a block, at most."""

SUMS_BYTES = 256 << 20
"""Chunks of sums that adding up holds at a time, one a segment."""

CHUNK_BYTES = 4 << 20
"""A chunk of sums, at most."""

MOVED_RATE = 400e6
"""Bytes of sums that a worker writes or reads a second, and of rows that it adds up: assumed, for a local disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segmented:
    """A replay cut into segments.

    Attributes:
        count: K, at most: the record's states decide where borders lie.
        blocks: Rows that are added up at a time, whole chunks of the store; none where K is 1.
        chunk_rows: Of the store that they fill.
        chunk_bytes: Of a chunk of sums.
        pieces: Blocks of a shard.
        bytes: Of all sums, written once and read once.
        unit_bytes: Of the sums of one unit.
        buffers: Bytes that a worker holds of its samples, at most.
        worker: Bytes that a worker of a segment uses.
        adder: Bytes that one uses that adds up.
    """

    count: int
    blocks: tuple[Shard, ...]
    chunk_rows: int
    chunk_bytes: int
    pieces: int
    bytes: int
    unit_bytes: int
    buffers: int
    worker: int
    adder: int


def follows(spec: RunSpec) -> bool:
    """Whether a method can be replayed in segments: its rows are sums over the steps."""
    return spec.mode == FORWARD and spec.form not in CARRIED


def unfollowed(spec: RunSpec) -> tuple[str, ...]:
    """Return why segments that are asked for are not made, as a warning; nothing where they are."""
    if follows(spec) or spec.segments in (None, 1):
        return ()
    what = f"--hessian {spec.hessian}" if spec.form in CARRIED else f"--mode {spec.mode}"
    why = "what it carries from step to step is no sum over steps, so there is one segment"
    return (f"--segments {spec.segments} is not followed with {what}: {why}",)


def touched_epochs(surveyed: Survey, count: int) -> int:
    """Return how many epochs a segment touches, at most."""
    return min(surveyed.epochs, math.ceil(surveyed.epochs / count) + (surveyed.epochs % count != 0))


def sums_of(spec: RunSpec, surveyed: Survey, count: int) -> tuple[int, int]:
    """Return numbers that a worker holds of a sample that a segment visits, and that it writes of one."""
    if spec.form != FAST:
        return surveyed.columns, surveyed.columns
    epochs = touched_epochs(surveyed, count)
    held = written = surveyed.columns
    for shape in surveyed.outer:
        slots, size = factor_slots(shape, epochs), math.prod(shape)
        if slots == epochs:
            held += slots * sum(shape) - size
            written += slots * sum(shape) - size
        else:
            held += slots * sum(shape)
    return held, written


def visited(surveyed: Survey, rows: int, count: int) -> int:
    """Return how many of some tracked rows a segment visits, about."""
    return max(1, min(rows, math.ceil(rows * surveyed.epochs / count)))


def segmented(spec: RunSpec, surveyed: Survey, cut: Cut, load: Load, count: int) -> Segmented:
    """Return what K segments of a cut into shards come to.

    Args:
        spec: What to run.
        surveyed: The recipe's numbers.
        cut: The shards.
        load: What a worker holds of them in one replay.
        count: K.
    """
    if count == 1:
        return Segmented(
            count=1,
            blocks=(),
            chunk_rows=cut.chunk_rows,
            chunk_bytes=0,
            pieces=1,
            bytes=0,
            unit_bytes=0,
            buffers=cut.widest * load.item,
            worker=load.bytes(cut),
            adder=0,
        )
    itemsize, row = itemsize_of(spec.dtype), load.row
    held, written = sums_of(spec, surveyed, count)
    rows = sum(shard.rows for shard in cut.shards)
    blocks = max(min(count * len(cut.shards), MOST_BLOCKS), math.ceil(rows * row / BLOCK_BYTES))
    # Blocks are whole chunks and do not reach over shards, which are whole chunks too.
    pieces = math.ceil(blocks / len(cut.shards))
    chunk_rows = cut.chunk_rows
    per_block = max(chunk_rows, math.ceil(cut.widest / pieces / chunk_rows) * chunk_rows)
    found = [
        Shard(name="", start=shard.start + one.start, stop=shard.start + one.stop)
        for shard in cut.shards
        for one in spans(shard.rows, per_block, "")
    ]
    named = tuple(replace(one, name=f"rows-{k:05d}") for k, one in enumerate(found))
    seen = visited(surveyed, cut.widest, count)
    chunk_bytes = max(1 << 16, min(CHUNK_BYTES, SUMS_BYTES // count))
    writing = min(seen * written * itemsize, 2 * max(64 << 20, chunk_bytes))
    adding = min(2 * per_block, (2 * WRITE_CHUNKS + 1) * chunk_rows) * row + load.folding
    whole = surveyed.dimension * itemsize
    sampled = most_rows(whole) * whole if surveyed.row_map is not None and surveyed.row_map.folds else 0
    return Segmented(
        count=count,
        blocks=named,
        chunk_rows=chunk_rows,
        chunk_bytes=chunk_bytes,
        pieces=math.ceil(cut.widest / per_block),
        bytes=count * (visited(surveyed, rows, count) * written * itemsize + sampled),
        unit_bytes=seen * written * itemsize + sampled,
        buffers=seen * held * itemsize,
        worker=load.process + seen * held * itemsize + writing + load.passing + load.folding,
        adder=load.process + adding + 2 * count * chunk_bytes,
    )


def finest(samples: int, columns: int, itemsize: int, cut: Cut, count: int) -> Cut:
    """Return a cut with chunks small enough that every worker has rows to add up.

    Shards stay whole chunks: they are cut anew.
    """
    blocks = min(count * len(cut.shards), MOST_BLOCKS)
    rows = chunk_rows_for(columns, itemsize, samples, blocks)
    return cut_forward(samples, columns, itemsize, len(cut.shards), rows)


class Choice:
    """Chooses S and K.

    Args:
        spec: What to run.
        surveyed: The recipe's numbers.
        sharding: How shards are cut.
    """

    def __init__(self, spec: RunSpec, surveyed: Survey, sharding: Sharding) -> None:
        self._spec, self._surveyed, self._sharding = spec, surveyed, sharding

    def cut(self, capacity: Capacity, *, shards: int | None, segments: int | None) -> tuple[Cut, Segmented]:
        """Return the shards and the segments.

        Args:
            capacity: Of the executor.
            shards: S that is fixed already.
            segments: K that is fixed already.

        Raises:
            DoesNotFit: See ``Sharding.count``.
        """
        spec, steps = self._spec, self._surveyed.steps
        asked = segments if segments is not None else spec.segments or 1
        if not follows(spec) or asked == 1 or steps < 2:
            replay = self._sharding.cut(shards or self._sharding.count(capacity))
            return replay, segmented(spec, self._surveyed, replay, self._sharding.load, 1)
        slots = capacity.slots or 1
        if asked != "auto":
            return self._with(capacity, shards, min(int(asked), steps))
        most = max(1, min(slots, steps // LEAST_STEPS, self._affordable()))
        if spec.form == EKFAC:
            most = min(most, EKFAC_SEGMENTS)
        counts = sorted({most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})
        found = [self._with(capacity, shards, count) for count in counts]
        return min(found, key=lambda one: self.seconds(one[0], one[1], slots))

    def seconds(self, cut: Cut, found: Segmented, slots: int) -> float:
        """Return how long the replay takes, in seconds where a step was tried, else in steps and a share."""
        surveyed = self._surveyed
        plain, tracked = surveyed.step_seconds or (0.01, 0.03)
        return replay_seconds(
            plain, tracked, surveyed.steps, cut.widest / surveyed.n_train, len(cut.shards), found, slots
        )

    def _with(self, capacity: Capacity, shards: int | None, count: int) -> tuple[Cut, Segmented]:
        surveyed, held = self._surveyed, sums_of(self._spec, self._surveyed, count)[0]
        sharding = self._sharding.of_segments(count, held, min(1.0, surveyed.epochs / count))
        replay = sharding.cut(shards or sharding.count(capacity))
        if count > 1:
            replay = finest(sharding.items, surveyed.columns, sharding.itemsize, replay, count)
        return replay, segmented(self._spec, surveyed, replay, sharding.load, count)

    def _affordable(self) -> int:
        """Return how many segments' borders the record may keep."""
        surveyed = self._surveyed
        state = surveyed.dimension * self._sharding.itemsize * (1 + surveyed.optimizer_vectors)
        return max(1, CHECKPOINT_BYTES // max(1, state))


def replay_seconds(
    plain: float, tracked: float, steps: int, share: float, shards: int, found: Segmented, slots: int
) -> float:
    """Return the seconds of a replay in S x K units on W workers.

    Args:
        plain: Seconds of a step.
        tracked: Seconds of one that follows all of its batch.
        steps: T.
        share: Of the training samples that a shard tracks.
        shards: S.
        found: The segments.
        slots: W.
    """
    each = plain + (tracked - plain) * min(1.0, share)
    trials = TRIAL_STEPS * tracked * (1 + max(LEAST, steps // STEPS_A_TRIAL))
    setup = SETUP_STEPS * tracked
    if found.count == 1:
        return (setup + trials + each * steps) * math.ceil(shards / slots)
    busy = min(slots, shards * found.count)
    waves = math.ceil(shards * found.count / slots)
    moved = 2 * found.bytes / MOVED_RATE / min(slots, len(found.blocks))
    return setup + trials / min(busy, found.count) + each * steps / found.count * waves + moved
