"""Units of the replay: hypergradients of a shard of samples, or contributions to a block of targets."""

from __future__ import annotations

from dataclasses import dataclass

from ...storage import layout
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...workers.recursion.conservation import RowSums, check_sums
from ...workers.replay.base import Replay
from ...workers.replay.make import make_replay
from ..executors.base import Report, Unit
from ..plan.sharding import WRITE_CHUNKS
from ..reading.unit_values import ReplayValues
from ..vocabulary import ADJOINT, FORWARD
from .carrying import CarryingWork, StoringWork
from .reduce import bounds
from .work import Result, recorded, rows_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayWork(StoringWork):
    """Handler of shards of tracked samples."""

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the hypergradients of a shard."""
        start, stop = rows_of(unit)
        training, trajectory = self.training(), recorded(run)
        tracked, bent = self.tracked[start:stop], self.basis(run)
        base = layout.hypergradients(self.method)
        store = RowStore.open(run.path(base), "hypergradient", run.vouched)
        row_bytes = training.layout.dimension * training.dtype.itemsize
        sampled = self.sampled(store, stop - start, row_bytes)
        replay = make_replay(
            self.form,
            FORWARD,
            training,
            trajectory,
            tracked,
            curvature=bent,
            share=self.share,
            row_map=self.row_map,
            sampled=sampled,
        ).run(report)
        sums = RowSums(training.layout.entries, self.row_map)
        unfolded = replay.sink.whole() if sampled else None
        whole, stored = [] if unfolded is None else [unfolded], []
        for first, last in bounds(stop - start, WRITE_CHUNKS * store.chunk_rows):
            rows = replay.numpy(first, last)
            self.finite(rows, "hypergradients", trajectory)
            if self.lawful(training):
                sums.add(rows)
            kept = self.narrow(rows, store, trajectory)
            store.write(start + first, kept)
            here = [k - first for k in sampled if first <= k < last]
            if here:
                stored.append(store.as_kept(kept[here]))
                whole += [rows[here]] if unfolded is None else []
        replay.close()
        files = [f"{base}/{name}" for name in store.files(start, stop)]
        notes = replay.told()
        if self.lawful(training):
            notes["law"] = sums.values(replay.sink.rest)
        if sampled:
            notes["loss"] = self.loss(self.labelled(), trajectory, tracked[sampled], whole, stored)
        return files, ReplayValues(rows=stop - start, start=start, steps=training.steps, **notes)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdjointWork(CarryingWork):
    """Handler of blocks of targets."""

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the contributions of all tracked samples to a block of targets."""
        start, stop = rows_of(unit)
        training, trajectory = self.training(), recorded(run)
        targets = self.target_gradients(run).read(start, stop)
        if self.row_map is not None:
            targets = self.row_map.expand(targets)
        base = layout.by_test(self.method)
        store = RowStore.open(run.path(base), "contribution", run.vouched)
        back = make_replay(
            self.form,
            ADJOINT,
            training,
            trajectory,
            self.tracked,
            curvature=self.basis(run),
            share=self.share,
            targets=targets,
            tile=store.chunk_rows,
        )
        found, notes = back.run(report).contributions(), back.told()
        back.close()
        if self.lawful(training):
            rest = back.sink.rest if isinstance(back, Replay) else None
            check_sums(found, targets, trajectory, notes["ways"]["noise"], rest)
            notes["lawful"] = True
        store.write(start, self.finite(found, "contributions", trajectory))
        files = [f"{base}/{name}" for name in store.files(start, stop)]
        return files, ReplayValues(rows=stop - start, start=start, steps=training.steps, **notes)
