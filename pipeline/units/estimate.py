"""What a worker does for an estimator: a block of test samples, or of samples to prepare."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...storage import layout
from ...storage.errors import EstimatorDiverged
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...workers.estimators.base import Estimator, Found, Ground, Targets
from ..executors.base import Report, Unit
from ..reading.unit_values import EstimateValues
from .work import Result, TrainingWork, recorded, rows_of

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorWork(TrainingWork):
    """A handler that asks an estimator.

    Attributes:
        method: Name of the estimator's results.
        estimator: What computes.
        tracked: Train indices asked for, (n,).
    """

    method: str
    estimator: Estimator
    tracked: Integers

    def ground(self, run: RunDirectory, values: Floats | None = None) -> Ground:
        """Return what an estimator starts from."""
        return Ground(
            training=self.training(), trajectory=recorded(run), tracked=self.tracked, prepared=values
        )

    def write(self, run: RunDirectory, unit: Unit, base: str, name: str, found: Found) -> Result:
        """Write what was found for the rows of a unit."""
        start, stop = rows_of(unit)
        block = found.values if found.values.ndim == 2 else found.values[:, None]
        _check_finite(self.method, block, start)
        store = RowStore.open(run.path(base), name, run.vouched)
        store.write(start, np.ascontiguousarray(block, dtype=store.dtype))
        files = [f"{base}/{path}" for path in store.files(start, stop)]
        return files, EstimateValues(rows=stop - start, start=start, notes=found.notes)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareWork(EstimatorWork):
    """Handler of blocks of samples that an estimator prepares."""

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write one value a sample."""
        rows = slice(*rows_of(unit))
        found = self.estimator.prepare(self.ground(run), rows, _scaled(unit, report))
        return self.write(run, unit, layout.prepared(self.method), "value", found)


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateWork(EstimatorWork):
    """Handler of blocks of test samples.

    Attributes:
        tested: Test indices asked for, (M,).
    """

    tested: Integers

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the contributions of all tracked samples to a block of test samples."""
        start, stop = rows_of(unit)
        gradients = RowStore.open(run.path(layout.TEST_GRADIENTS), "gradient", run.vouched).read(start, stop)
        targets = Targets(index=self.tested[start:stop], gradient=gradients)
        values = None
        if self.estimator.PREPARES:
            store = RowStore.open(run.path(layout.prepared(self.method)), "value", run.vouched)
            values = store.read(0, store.rows)[:, 0]
        found = self.estimator.contributions(self.ground(run, values), targets, _scaled(unit, report))
        return self.write(run, unit, layout.by_test(self.method), "contribution", found)


def _scaled(unit: Unit, report: Report) -> Report:
    """Return what reports in rows whatever an estimator counts."""
    start, stop = rows_of(unit)
    rows = stop - start
    return lambda done, total: report(rows * min(done, total) // max(total, 1), rows)


def _check_finite(method: str, block: np.ndarray, start: int) -> None:
    bad = np.argwhere(~np.isfinite(block))
    if len(bad):
        raise EstimatorDiverged(
            f"{method} gave a value that is not finite in row {start + int(bad[0][0])}, column "
            f"{int(bad[0][1])}; change its options, or train with --dtype float64"
        )
