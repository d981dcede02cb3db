"""What a worker does for a comparison over training, and the tables it writes.

Where its files lie: `storage.layout.by_epoch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...storage import layout
from ...storage.contributions import write_table
from ...storage.curvature import read_curvature
from ...storage.errors import NonFiniteLoss
from ...storage.rundir import RunDirectory
from ...storage.schemas import BY_EPOCH_CONTRIBUTIONS, BY_EPOCH_ERRORS, BY_EPOCH_SAMPLES
from ...workers.estimators import make
from ...workers.estimators.influence_after import influence_after
from ...workers.replay.by_epoch import ByEpoch, State
from ..executors.base import Report, Unit
from ..reading.unit_values import ByEpochValues
from ..vocabulary import EKFAC
from .work import Result, TrainingWork, recorded, rows_of

Integers = npt.NDArray[np.int64]

Followed = tuple[list[str], ByEpochValues]
"""Files and values of a unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """After which epoch an influence function is asked: the argument of its unit."""

    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ByEpochWork(TrainingWork):
    """Handler of the stages of a comparison over training.

    Attributes:
        tracked: Train indices, (n,).
        tested: Test indices, (M,).
        epochs: After which the forms are looked at.
        ekfac: Whether the EKFAC form is among them.
        raw_decay: Whether the raw-decay forms are.
        influence: Options by estimator.
        by_test: Whether influence is asked for each test sample, too.
        question: Noted in each manifest: work that answers another one is done again.
    """

    tracked: Integers
    tested: Integers
    epochs: list[int]
    ekfac: bool
    raw_decay: bool
    influence: Mapping[str, Mapping[str, Any]]
    by_test: bool
    question: Mapping[str, Any]

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write what a shard comes to at each epoch, or an influence function after one."""
        kind = unit.stage.rsplit("/", 1)[-1]
        work = self._influence if kind in self.influence else self._states
        files, values = work(run, kind, unit, report)
        return files, replace(values, question=self.question)

    def _states(self, run: RunDirectory, kind: str, unit: Unit, report: Report) -> Followed:
        start, stop = rows_of(unit)
        tracked = self.tracked[start:stop]
        curvature = None
        if self.ekfac:
            curvature = read_curvature(run.path(layout.curvature(EKFAC)), run.vouched)
        following = ByEpoch(
            self.recipe,
            self.compute,
            replace(self.compute, batch_norm="coupled"),
            recorded(run),
            tracked=tracked,
            first_row=start,
            tested=self.tested,
            epochs=self.epochs,
            curvature=curvature,
            raw_decay=self.raw_decay,
        )
        files = []
        for epoch, states in following.run(report):
            name = f"{unit.name}-epoch-{epoch:05d}"
            _check_finite(epoch, states, tracked)
            samples = [
                _table(BY_EPOCH_SAMPLES, epoch, method, tracked, contribution=state.mean, norm=state.norm)
                for method, state in states.items()
            ]
            errors = [
                _table(BY_EPOCH_ERRORS, epoch, method, tracked, reference=reference, error=error)
                for method, state in states.items()
                for reference, error in state.error.items()
            ]
            pairs = [
                self._pairs(epoch, method, tracked, state.contribution) for method, state in states.items()
            ]
            for table, schema, parts in (
                ("samples", BY_EPOCH_SAMPLES, samples),
                ("errors", BY_EPOCH_ERRORS, errors),
                ("contributions", BY_EPOCH_CONTRIBUTIONS, pairs),
            ):
                files.append(_write(run, layout.by_epoch(kind, table, name), schema, parts))
        following.close()
        return files, ByEpochValues(start=start, rows=stop - start)

    def _influence(self, run: RunDirectory, kind: str, unit: Unit, report: Report) -> Followed:
        assert isinstance(unit.arguments, Epoch)
        epoch = unit.arguments.number
        found = influence_after(
            self.recipe,
            self.compute,
            recorded(run),
            epoch,
            make(kind, self.influence[kind]),
            tracked=self.tracked,
            tested=self.tested,
            by_test=self.by_test,
            report=report,
        )
        none = np.full(len(self.tracked), np.nan)
        table = _table(BY_EPOCH_SAMPLES, epoch, kind, self.tracked, contribution=found.mean, norm=none)
        files = [_write(run, layout.by_epoch(kind, "samples", unit.name), BY_EPOCH_SAMPLES, [table])]
        if found.contribution is not None:
            table = self._pairs(epoch, kind, self.tracked, found.contribution)
            name = layout.by_epoch(kind, "contributions", unit.name)
            files.append(_write(run, name, BY_EPOCH_CONTRIBUTIONS, [table]))
        return files, ByEpochValues(epoch=epoch)

    def _pairs(
        self, epoch: int, method: str, tracked: Integers, values: npt.NDArray[np.floating]
    ) -> pa.Table:
        train, test = np.tile(tracked, len(self.tested)), np.repeat(self.tested, len(tracked))
        flat = np.ascontiguousarray(values.T).reshape(-1)
        return _table(BY_EPOCH_CONTRIBUTIONS, epoch, method, train, test_index=test, contribution=flat)


def _table(schema: pa.Schema, epoch: int, method: str, tracked: Integers, **columns: Any) -> pa.Table:
    rows = len(tracked)
    given = {"epoch": epoch, "method": method, "train_index": tracked, **columns}
    return (
        pa.table(
            {
                name: np.full(rows, value)
                if isinstance(value, int)
                else [value] * rows
                if isinstance(value, str)
                else value
                for name, value in given.items()
            }
        )
        .select(schema.names)
        .cast(schema)
    )


def _write(run: RunDirectory, relative: str, schema: pa.Schema, parts: list[pa.Table]) -> str:
    write_table(run.path(relative), pa.concat_tables(parts), schema)
    return relative


def _check_finite(epoch: int, states: Mapping[str, State], tracked: Integers) -> None:
    for method, state in states.items():
        bad = ~np.isfinite(state.norm) | ~np.isfinite(state.mean)
        if bad.any():
            raise NonFiniteLoss(
                f"{method}: the hypergradient of train_index {int(tracked[int(np.flatnonzero(bad)[0])])} is not "
                f"finite after epoch {epoch}; the linearised training grows without end: lower the learning rate, "
                "or record with --dtype float64"
            )
