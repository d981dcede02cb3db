"""The reduce stage of a method: its tables, the class-by-class one last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...storage import contributions as parquet
from ...storage import layout, schemas
from ...storage.trajectory import open_trajectory
from ..analysis.zeros import zero_warning
from ..executors.base import Handler
from ..plan.plan import ReduceCut
from ..plan.sharding import Shard
from ..reading.unit_values import ReduceValues, values_of
from ..units.reduce import ReduceJob, interclass_table
from ..vocabulary import INTERCLASS, REDUCE, Mode
from .stages import Session, Stage, Stages, units_of


def reduce_method(session: Session, cut: ReduceCut, method: str, handler: Callable[[], Handler]) -> Stages:
    """Have a handler write the tables of a method block by block, then write ``interclass``."""
    directory, stage = session.directory, f"{method}/{REDUCE}"
    units = units_of(stage, cut.blocks, cut.row_bytes)
    done = yield Stage(
        name=stage,
        units=units,
        handler=handler,
        total=len(session.surveyed.tracked),
        label="row",
    )
    if not done and session.valid(stage, INTERCLASS):
        return
    manifests = [directory.manifest(stage, unit.name) for unit in units]
    there = [manifest for manifest in manifests if manifest is not None]
    reading = directory.ledger.remember()
    directory.ledger.use(there)
    table = interclass_table([values_of(ReduceValues, manifest).interclass for manifest in there])
    relative = layout.table_part("interclass", method, "00000")
    parquet.write_table(directory.path(relative), table, schemas.INTERCLASS)
    directory.commit(stage, INTERCLASS, [relative], {}, reading)
    zero = zero_warning(directory, method)
    if zero:
        session.note(f"warning: {zero}")


def reduce_job(
    session: Session,
    cut: ReduceCut,
    *,
    method: str,
    base: str,
    targets: str,
    mode: Mode,
    shards: Sequence[Shard] = (),
) -> ReduceJob:
    """Return what all reduce units of a method share.

    Args:
        session: The session.
        cut: How it is cut.
        method: Whose tables.
        base: Whose stores; another method's where this one corrects it.
        targets: Kind of the targets.
        mode: ``forward``: the stores hold hypergradients; ``adjoint``: contributions.
        shards: Of the tracked samples; none in adjoint mode, where every sample was in all of them.
    """
    surveyed = session.surveyed
    tracked = surveyed.tracked
    batches = open_trajectory(session.directory.path(layout.TRAJECTORY), session.directory.vouched).batches
    visits = np.bincount(batches[batches >= 0], minlength=surveyed.n_train)[tracked]
    shard_of = np.full(len(tracked), -1, dtype=np.int64)
    for number, shard in enumerate(shards):
        shard_of[shard.start : shard.stop] = number
    return ReduceJob(
        method=method,
        base=base,
        mode=mode,
        tracked=tracked,
        tiles=cut.tiles,
        n_train=surveyed.n_train,
        train_labels=surveyed.train_labels[tracked],
        visits=visits,
        shard_of=shard_of,
        targets=targets,
    )
