"""What a worker does for an estimator: a block of test samples, or of samples to prepare."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage import layout
from ...storage.errors import EstimatorDiverged
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...storage.trajectory import open_trajectory
from ...workers.data.user_code import user_code
from ...workers.estimators.base import Estimator, Found, Ground, Targets
from ...workers.memory import peak_bytes, reset_peak
from ...workers.training.training import Training
from ..executors.base import Report, Unit
from ..vocabulary import ATTRIBUTE, PREPARE
from .tasks import Tasks


@dataclass(kw_only=True)
class AttributeTasks(Tasks):
    """Handler of an estimator's stages; see ``Tasks``.

    Attributes:
        estimator: What computes.
    """

    estimator: Estimator

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        """Do and commit one unit; return its manifest's values."""
        kind = unit.stage.rsplit("/", 1)[-1]
        if kind not in (PREPARE, ATTRIBUTE):
            return super().__call__(unit, report)
        with user_code(f"{unit.stage} {unit.name} raised"):
            return self._estimate(unit, report, kind)

    def _estimate(self, unit: Unit, report: Report, kind: str) -> dict[str, Any]:
        begun = time.perf_counter()
        reset_peak()
        run = RunDirectory(self.uri)
        start, stop = unit.arguments["start"], unit.arguments["stop"]
        rows = stop - start

        def scaled(done: int, total: int) -> None:
            report(rows * min(done, total) // max(total, 1), rows)  # what an estimator counts varies

        if kind == PREPARE:
            base, name = layout.prepared(self.method), "value"
            found = self.estimator.prepare(self._ground(run), slice(start, stop), scaled)
            block = found.values[:, None]
        else:
            base, name = layout.by_test(self.method), "contribution"
            found = self._contributions(run, start, stop, scaled)
            block = found.values
        _check_finite(self.method, block, start)
        store = RowStore.open(run.path(base), name)
        store.write(start, np.ascontiguousarray(block, dtype=store.dtype))
        files = [f"{base}/{path}" for path in store.files(start, stop)]
        values = {
            "rows": rows,
            "start": start,
            **found.notes,
            "seconds": time.perf_counter() - begun,
            "peak_bytes": peak_bytes(),
        }
        run.commit(unit.stage, unit.name, files, values)
        return values

    def _contributions(self, run: RunDirectory, start: int, stop: int, report: Report) -> Found:
        gradients = RowStore.open(run.path(layout.TEST_GRADIENTS), "gradient").read(start, stop)
        targets = Targets(index=self.tested[start:stop], gradient=gradients)
        values = None
        if self.estimator.PREPARES:
            store = RowStore.open(run.path(layout.prepared(self.method)), "value")
            values = store.read(0, store.rows)[:, 0]
        return self.estimator.contributions(self._ground(run, values), targets, report)

    def _ground(self, run: RunDirectory, values: Any = None) -> Ground:
        return Ground(
            training=Training(self.recipe, self.compute),
            trajectory=open_trajectory(run.path(layout.TRAJECTORY)),
            tracked=self.tracked,
            prepared=values,
        )


def _check_finite(method: str, block: np.ndarray, start: int) -> None:
    bad = np.argwhere(~np.isfinite(block))
    if len(bad):
        raise EstimatorDiverged(
            f"{method} gave a value that is not finite in row {start + int(bad[0][0])}, column "
            f"{int(bad[0][1])}; change its options, or train with --dtype float64"
        )
