"""Units of a replay that is cut in two ways: what a segment of the steps adds to a shard's rows, and these added up.

The rows that come out are written where one replay would write them, so whoever reads them need not know.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import numpy.typing as npt

from ...storage import files, layout
from ...storage.errors import IncompleteStage
from ...storage.manifest import Manifest
from ...storage.rows import RowStore, chunk_rows_for
from ...storage.rundir import RunDirectory
from ...storage.trajectory import Trajectory
from ...storage.uri import join
from ...workers.determinism import prepare_process
from ...workers.model.layout import Layout
from ...workers.persample.one_batch import Trial
from ...workers.persample.ways import Ways
from ...workers.recursion.conservation import RowSums
from ...workers.recursion.rest import joined_rests
from ...workers.replay.base import Replay
from ...workers.replay.ekfac import EkfacRows, TurnedGradients
from ...workers.replay.fast import FastRows
from ...workers.replay.partial import Adder, EkfacAdder, FastAdder, Form, Streamed, Sums
from ...workers.training.optimizer_state import OptimizerState
from ...workers.training.training import Compute, Training
from ...workers.training.trials import some_trials, trials_in_all, ways_of
from ..executors.base import Report, Unit
from ..plan.sharding import WRITE_CHUNKS, Shard
from ..reading.unit_values import ReplayValues, TrialValues, WaysValues, joined_ways, values_of
from ..vocabulary import EKFAC, FAST, RECORD, SEGMENTS, TRAJECTORY, WAYS
from .reduce import bounds
from .replay import CarryingWork
from .work import Result, TrainingWork, recorded, rows_of

Integers = npt.NDArray[np.int64]

SUMS = "sums"
"""Name of the array of a store of sums."""

WRITTEN_BYTES = 64 << 20
"""Sums that are formed and written at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The steps ``first`` to ``stop`` of a shard: the argument of a unit."""

    shard: Shard
    first: int
    stop: int
    number: int

    @property
    def name(self) -> str:
        """Of the unit, and of the store that it writes."""
        return f"{self.shard.name}-segment-{self.number:05d}"


_kept: dict[tuple[str, str, Compute], Training] = {}
"""The training of the run whose segments this process does: reading the data again for each would cost more than a short
segment."""


@contextmanager
def kept_training(work: TrainingWork, run: RunDirectory, trajectory: Trajectory) -> Iterator[Training]:
    """Yield a training that stands at its beginning, a fresh one or the one that this process used before.

    What training does depends on the state that the record keeps and on nothing else, or each segment would not end
    where the next begins. One that failed is not used again.
    """
    manifest = run.manifest(RECORD, TRAJECTORY)
    assert manifest is not None
    key = (run.uri, run.ledger.content(manifest), work.compute)
    training = _kept.pop(key, None)
    _kept.clear()
    if training is None:
        training = work.training()
    else:
        prepare_process(work.compute.threads)
        start = trajectory.checkpoint(0)
        training.load_weights(start.weights, start.buffers)
        training.load_optimizer(OptimizerState.of(start))
    yield training
    training.before_update = None
    _kept[key] = training


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The ``part``-th of ``parts`` shares of the trials: the argument of a unit."""

    part: int
    parts: int

    @property
    def name(self) -> str:
        """Of the unit."""
        return f"trials-{self.part:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WaysWork(TrainingWork):
    """Handler of the trials of the ways to per-sample gradients, which all segments share."""

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Make every so many-th of the trials along the whole record."""
        trajectory, share = recorded(run), unit.arguments
        assert isinstance(share, Share)
        with kept_training(self, run, trajectory) as training:
            numbers = range(share.part, trials_in_all(trajectory, training.steps), share.parts)
            fixed = training.compute.per_sample == "vjp"  # there is nothing to be tried
            found = [] if fixed else some_trials(training, trajectory, numbers)
        told = [
            TrialValues(number=number, **{one.name: getattr(trial, one.name) for one in fields(Trial)})
            for number, trial in zip(numbers, found, strict=False)
        ]
        return [], WaysValues(trials=tuple(told), parts=share.parts)


def tried(run: RunDirectory, method: str, trajectory: Trajectory) -> Ways | None:
    """Return what the trials for the segments of a method came to; None: none had to be made.

    Raises:
        IncompleteStage: Some were not made.
    """
    stage = f"{method}/{WAYS}"
    manifests = run.manifests(stage)
    found = [values_of(WaysValues, manifest) for manifest in manifests]
    if not found or len(found) != found[0].parts:
        raise IncompleteStage(f"{run.uri}: stage {stage} has not finished; run `hydra-pipe replay` again")
    run.ledger.use(manifests)
    told = sorted((trial for one in found for trial in one.trials), key=lambda trial: trial.number)
    names = [one.name for one in fields(Trial)]
    trials = [Trial(**{name: getattr(trial, name) for name in names}) for trial in told]
    return ways_of(trials, flat_layout(trajectory)) if trials else None


def flat_layout(trajectory: Trajectory) -> Layout:
    """Return where each parameter of a record lies."""
    return Layout(entries=trajectory.parameters, dimension=int(trajectory.attrs["dimension"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentWork(CarryingWork):
    """Handler of segments.

    Attributes:
        pieces: In how many the sums of a shard are read later.
        chunk_bytes: Of a chunk of sums, at most.
    """

    pieces: int
    chunk_bytes: int

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Replay a segment from the record's state at its beginning, and write what it adds to a shard's rows."""
        piece, trajectory = unit.arguments, recorded(run)
        assert isinstance(piece, Piece)
        shard = piece.shard
        seen = trajectory.batches[piece.first : piece.stop]
        rows = shard.start + np.flatnonzero(np.isin(self.tracked[shard.start : shard.stop], seen))
        if not len(rows) and len(self.tracked) < int(trajectory.attrs["n_train"]):  # else the law is followed
            return [], ReplayValues(rows=0, start=shard.start, steps=0)
        with kept_training(self, run, trajectory) as training:
            training.known_ways = tried(run, self.method, trajectory)
            return self._replay(run, piece, rows, training, trajectory, report)

    def _replay(
        self,
        run: RunDirectory,
        piece: Piece,
        rows: Integers,
        training: Training,
        trajectory: Trajectory,
        report: Report,
    ) -> Result:
        """Replay a segment for some rows; return its files and what its manifest says."""
        bent = self.basis(run)
        ends = trajectory.epoch_ends
        epoch = bisect_right(ends, piece.first)
        epochs = bisect_left(ends, piece.stop) - epoch + 1
        tracked = self.tracked[rows]
        replay: Replay[FastRows] | Replay[EkfacRows]
        if bent is None:
            replay = Replay(training, trajectory, tracked, partial(FastRows, epochs=epochs))
        else:
            replay = Replay(
                training, trajectory, tracked, partial(EkfacRows, curvature=bent, first=piece.first)
            )
        replay.segment(piece.first, piece.stop, report)
        written = self._write(run, piece, rows, Sums(replay.sink, epoch)) if len(rows) else []
        replay.close()
        law = None
        if self.lawful(training):
            sums, segment = RowSums(training.layout.entries), (piece.first, piece.stop)
            law = sums.left_out(replay.sink.rest, segment)
        return written, ReplayValues(
            rows=len(rows),
            start=piece.shard.start,
            steps=piece.stop - piece.first,
            law=law,
            **replay.told(),
        )

    def _write(self, run: RunDirectory, piece: Piece, rows: Integers, sums: Sums) -> list[str]:
        base, form, itemsize = layout.partial_sums(self.method, piece.name), sums.form, self._itemsize
        uri = run.path(base)
        # Made elsewhere and copied: two workers may do the same unit, and making a store clears its place.
        temporary = files.partial_name(uri)
        made = RowStore.create(
            temporary,
            name=SUMS,
            rows=len(rows),
            columns=form.width,
            dtype=self.compute.dtype,
            chunk_rows=chunk_rows_for(form.width, itemsize, len(rows), self.pieces, self.chunk_bytes),
            dimensions=("row", "number"),
            row_columns={"row": rows.astype(np.int32)},
            attrs={"form": form.told(), "first": piece.first, "stop": piece.stop},
        )
        for name in made.metadata_files():
            data = files.read_bytes(join(temporary, *name.split("/")))
            files.write_bytes(join(uri, *name.split("/")), data)
        files.remove(temporary, recursive=True)
        store = RowStore.open(uri, SUMS)
        size = max(1, WRITTEN_BYTES // (store.chunk_rows * form.width * itemsize)) * store.chunk_rows
        for first, last in bounds(len(rows), size):
            store.write(first, sums.numpy(first, last))
        names = {*store.metadata_files(), *store.files(0, len(rows))}
        return [f"{base}/{name}" for name in sorted(names)]

    @property
    def _itemsize(self) -> int:
        return int(np.dtype(self.compute.dtype).itemsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class AddWork(CarryingWork):
    """Handler of blocks of rows: adds up what all segments add to them.

    Attributes:
        shards: In which the tracked samples were replayed.
        segments: First step and one past the last, of each.
    """

    shards: tuple[Shard, ...]
    segments: tuple[tuple[int, int], ...]

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the hypergradients of a block of rows."""
        start, stop = rows_of(unit)
        _kept.clear()
        prepare_process(self.compute.threads)
        trajectory = recorded(run)
        done = self._done(run, start)
        streams = [self._stream(run, manifest) for manifest in done if manifest.files]
        found = [values_of(ReplayValues, manifest) for manifest in done]
        adder = self._adder(run, trajectory)
        base = layout.hypergradients(self.method)
        store = RowStore.open(run.path(base), "hypergradient", run.vouched)
        sums = RowSums(trajectory.parameters)
        laws = [values.law for values in found if values.law is not None]
        for first, last in bounds(stop - start, WRITE_CHUNKS * store.chunk_rows):
            parts = [stream.take(start + first, start + last) for stream in streams]
            rows = adder.rows(last - first, parts)
            self.finite(rows, "hypergradients", trajectory)
            store.write(start + first, rows)
            if laws:
                sums.add(rows)
            report(last, stop - start)
        written = [f"{base}/{name}" for name in store.files(start, stop)]
        return written, ReplayValues(
            rows=stop - start,
            start=start,
            steps=len(trajectory.batches),
            segments=len(self.segments),
            ways=joined_ways([one.ways for one in found if one.ways is not None]),
            law={**sums.values(), **joined_rests(laws)} if laws else None,
        )

    def _done(self, run: RunDirectory, start: int) -> list[Manifest]:
        """Return the manifests of all segments of the shard that holds a row, in their order."""
        shard = next(shard for shard in self.shards if shard.start <= start < shard.stop)
        found = []
        for number, (first, stop) in enumerate(self.segments):
            piece = Piece(shard=shard, first=first, stop=stop, number=number)
            manifest = run.manifest(f"{self.method}/{SEGMENTS}", piece.name)
            if manifest is None:
                raise IncompleteStage(
                    f"{run.uri}: stage {self.method}/{SEGMENTS} has not finished {piece.name}; run `hydra-pipe replay` "
                    "again"
                )
            found.append(manifest)
        run.ledger.use(found)
        return found

    def _stream(self, run: RunDirectory, manifest: Manifest) -> Streamed:
        store = RowStore.open(run.path(layout.partial_sums(self.method, manifest.unit)), SUMS, run.vouched)
        index = store.column("row").astype(np.int64)
        return Streamed(index, store.read, store.chunk_rows, Form.of(store.attrs["form"]))

    def _adder(self, run: RunDirectory, trajectory: Trajectory) -> Adder:
        bent = self.basis(run)
        if self.form == FAST or bent is None:
            return FastAdder(flat_layout(trajectory), len(trajectory.epoch_ends), self.compute.torch_dtype)
        assert self.form == EKFAC
        training = Training(self.recipe, self.compute)
        training.known_ways = tried(run, self.method, trajectory)
        return EkfacAdder(TurnedGradients(training, trajectory, bent), training.dtype, training.device)
