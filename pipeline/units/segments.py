"""Units of a replay that is cut in two ways: what a segment of the steps adds to a shard's rows, and these added up.

The rows that come out are written where one replay would write them, so whoever reads them need not know.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ...workers.replay.partial import Adder, EkfacAdder, FastAdder, Form, MappedAdder, Streamed, Sums
from ...workers.replay.sampled import rows_of_shard
from ...workers.training.optimizer_state import OptimizerState
from ...workers.training.training import Compute, Training
from ...workers.training.trials import some_trials, trials_in_all, ways_of
from ..executors.base import Report, Unit
from ..plan.sharding import WRITE_CHUNKS, Shard
from ..reading.unit_values import ReplayValues, TrialValues, WaysValues, joined_ways, values_of
from ..vocabulary import EKFAC, FAST, RECORD, SEGMENTS, TRAJECTORY, WAYS
from .carrying import CarryingWork, StoringWork
from .reduce import bounds
from .work import Result, TrainingWork, recorded, rows_of

Integers = npt.NDArray[np.int64]

SUMS = "sums"
"""Name of the array of a store of sums."""

SAMPLED = "-sampled"
"""Ends the name of the store with a segment's sums of sampled rows before they are folded."""

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


_kept: dict[tuple[str, str, Compute, bool], Training] = {}
"""The training of the run whose segments this process does: reading the data again for each would cost more than a short
segment."""


@contextmanager
def kept_training(
    work: TrainingWork, run: RunDirectory, trajectory: Trajectory, *, labelled: bool = False
) -> Iterator[Training]:
    """Yield a training that stands at its beginning, a fresh one or the one that this process used before.

    What training does depends on the state that the record keeps and on nothing else, or each segment would not end
    where the next begins. One that failed is not used again.

    Args:
        work: The handler.
        run: The run.
        trajectory: Its record.
        labelled: Whether it is that of `StoringWork.labelled`.
    """
    manifest = run.manifest(RECORD, TRAJECTORY)
    assert manifest is not None
    key = (run.uri, run.ledger.content(manifest), work.compute, labelled)
    training = _kept.pop(key, None)
    _kept.clear()
    if training is None:
        training = work.labelled() if labelled and isinstance(work, StoringWork) else work.training()
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
        sampled = self._sampled(piece.shard, rows, training)
        replay: Replay[FastRows] | Replay[EkfacRows]
        if bent is None:
            fast = partial(FastRows, epochs=epochs, row_map=self.row_map, sampled=sampled)
            replay = Replay(training, trajectory, tracked, fast)
        else:
            ekfac = partial(
                EkfacRows, curvature=bent, first=piece.first, row_map=self.row_map, sampled=sampled
            )
            replay = Replay(training, trajectory, tracked, ekfac)
        replay.segment(piece.first, piece.stop, report)
        written: list[str] = []
        if len(rows):
            sums = Sums(replay.sink, epoch)
            told = {"form": sums.form.told(), "first": piece.first, "stop": piece.stop}
            written += self._write(run, piece.name, rows, sums.form.width, sums.numpy, told)
        whole = replay.sink.whole() if sampled else None
        if whole is not None:
            name = piece.name + SAMPLED
            written += self._write(run, name, rows[sampled], whole.shape[1], lambda a, b: whole[a:b], {})
        replay.close()
        law = None
        if self.lawful(training):
            of_rows, segment = RowSums(training.layout.entries, self.row_map), (piece.first, piece.stop)
            law = of_rows.left_out(replay.sink.rest, segment)
        return written, ReplayValues(
            rows=len(rows),
            start=piece.shard.start,
            steps=piece.stop - piece.first,
            law=law,
            **replay.told(),
        )

    def _sampled(self, shard: Shard, rows: Integers, training: Training) -> list[int]:
        """Return which of the rows that a segment visits are held whole, because folding loses of them."""
        if self.row_map is None or not self.row_map.folds:
            return []
        row_bytes = training.layout.dimension * training.dtype.itemsize
        wanted = np.asarray(rows_of_shard(shard.rows, len(self.tracked), row_bytes)) + shard.start
        found: list[int] = np.flatnonzero(np.isin(rows, wanted)).tolist()
        return found

    def _write(
        self,
        run: RunDirectory,
        name: str,
        rows: Integers,
        width: int,
        read: Callable[[int, int], npt.NDArray[np.floating]],
        attrs: Mapping[str, object],
    ) -> list[str]:
        """Write a store of sums, W numbers of each of some rows; return its files."""
        base, itemsize = layout.partial_sums(self.method, name), self._itemsize
        uri = run.path(base)
        # Made elsewhere and copied: two workers may do the same unit, and making a store clears its place.
        temporary = files.partial_name(uri)
        made = RowStore.create(
            temporary,
            name=SUMS,
            rows=len(rows),
            columns=width,
            dtype=self.compute.dtype,
            chunk_rows=chunk_rows_for(width, itemsize, len(rows), self.pieces, self.chunk_bytes),
            dimensions=("row", "number"),
            row_columns={"row": rows.astype(np.int32)},
            attrs=attrs,
        )
        for file in made.metadata_files():
            data = files.read_bytes(join(temporary, *file.split("/")))
            files.write_bytes(join(uri, *file.split("/")), data)
        files.remove(temporary, recursive=True)
        store = RowStore.open(uri, SUMS)
        size = max(1, WRITTEN_BYTES // (store.chunk_rows * width * itemsize)) * store.chunk_rows
        for first, last in bounds(len(rows), size):
            store.write(first, read(first, last))
        names = {*store.metadata_files(), *store.files(0, len(rows))}
        return [f"{base}/{file}" for file in sorted(names)]

    @property
    def _itemsize(self) -> int:
        return int(np.dtype(self.compute.dtype).itemsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class AddWork(StoringWork):
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
        prepare_process(self.compute.threads)
        trajectory = recorded(run)
        base = layout.hypergradients(self.method)
        store = RowStore.open(run.path(base), "hypergradient", run.vouched)
        shard = next(one for one in self.shards if one.start <= start < one.stop)
        sampled = self._sampled(store, shard, start, stop, trajectory)
        if not sampled:
            _kept.clear()
        done = self._done(run, shard)
        streams = [self._stream(run, manifest) for manifest in done if manifest.files]
        found = [values_of(ReplayValues, manifest) for manifest in done]
        adder = self._adder(run, trajectory, streams)
        sums = RowSums(trajectory.parameters, self.row_map)
        laws = [values.law for values in found if values.law is not None]
        folded = self.row_map is not None and self.row_map.folds
        whole, stored = [self._whole(run, done, sampled)] if sampled and folded else [], []
        for first, last in bounds(stop - start, WRITE_CHUNKS * store.chunk_rows):
            parts = [stream.take(start + first, start + last) for stream in streams]
            rows = adder.rows(last - first, parts)
            self.finite(rows, "hypergradients", trajectory)
            kept = self.narrow(rows, store, trajectory)
            store.write(start + first, kept)
            if laws:
                sums.add(rows)
            here = [k - start - first for k in sampled if first <= k - start < last]
            if here:
                stored.append(store.as_kept(kept[here]))
                whole += [] if folded else [rows[here]]
            report(last, stop - start)
        loss = None
        if sampled:
            with kept_training(self, run, trajectory, labelled=True) as training:
                loss = self.loss(training, trajectory, self.tracked[sampled], whole, stored)
        written = [f"{base}/{name}" for name in store.files(start, stop)]
        return written, ReplayValues(
            rows=stop - start,
            start=start,
            steps=len(trajectory.batches),
            segments=len(self.segments),
            ways=joined_ways([one.ways for one in found if one.ways is not None]),
            law={**sums.values(), **joined_rests(laws)} if laws else None,
            loss=loss,
        )

    def _done(self, run: RunDirectory, shard: Shard) -> list[Manifest]:
        """Return the manifests of all segments of a shard, in their order."""
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

    def _sampled(
        self, store: RowStore, shard: Shard, start: int, stop: int, trajectory: Trajectory
    ) -> list[int]:
        """Return which of the tracked rows ``start`` to ``stop`` are held whole: of the shard's."""
        row_bytes = int(trajectory.attrs["dimension"]) * self.compute.torch_dtype.itemsize
        found = [shard.start + k for k in self.sampled(store, shard.rows, row_bytes)]
        return [k for k in found if start <= k < stop]

    def _whole(
        self, run: RunDirectory, done: Sequence[Manifest], sampled: Sequence[int]
    ) -> npt.NDArray[np.floating]:
        """Return sampled rows before they were folded, added up over the segments."""
        assert self.row_map is not None
        found = np.zeros((len(sampled), self.row_map.whole.columns), dtype=self.compute.dtype)
        for manifest in done:
            base = layout.partial_sums(self.method, manifest.unit + SAMPLED)
            if not any(file.path.startswith(f"{base}/") for file in manifest.files):
                continue  # it visited none of them
            store = RowStore.open(run.path(base), SUMS, run.vouched)
            index = store.column("row").astype(np.int64)
            for place, row in enumerate(sampled):
                at = int(np.searchsorted(index, row))
                if at < len(index) and index[at] == row:
                    found[place] += store.read(at, at + 1)[0]
        return found

    def _adder(self, run: RunDirectory, trajectory: Trajectory, streams: Sequence[Streamed]) -> Adder:
        dtype, bent = self.compute.torch_dtype, self.basis(run)
        if self.row_map is not None and all(stream.form.mapped for stream in streams):
            return MappedAdder(self.row_map.columns, dtype)
        if self.form == FAST or bent is None:
            return FastAdder(flat_layout(trajectory), len(trajectory.epoch_ends), dtype, self.row_map)
        assert self.form == EKFAC
        _kept.clear()
        training = Training(self.recipe, self.compute)
        training.known_ways = tried(run, self.method, trajectory)
        return EkfacAdder(TurnedGradients(training, trajectory, bent), training.dtype, training.device)
