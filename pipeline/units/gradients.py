"""Units of gradients at the trained weights: of test samples, and of targets made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...storage import layout
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...workers.data.labels import with_labels
from ...workers.model.row_map import RowMap
from ...workers.replay.targets import mean_gradients
from ...workers.training.finite import check_own_gradients
from ...workers.training.test_gradients import TestGradients
from ...workers.training.training import Training
from ..executors.base import Report, Unit
from ..reading.unit_values import TestGradientValues, UnitValues
from ..spec.targets import store_of, target_of_each
from .work import Result, TrainingWork, Work, recorded, rows_of

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class TestGradientWork(TrainingWork):
    """Handler of blocks of test samples.

    Attributes:
        tested: Test indices asked for, (M,).
        test_labels: Class of every sample of the test dataset, -1 where there is none.
        row_map: What is kept of a row; None: all.
    """

    __test__ = False  # no test case, whatever its name begins with

    tested: Integers
    test_labels: Integers
    row_map: RowMap | None = None

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the gradients of a block; the driver writes the columns once every block is there."""
        start, stop = rows_of(unit)
        training = Training(with_labels(self.recipe, self.test_labels), self.compute)
        gradients = TestGradients(training, recorded(run))
        chosen = self.tested[start:stop]
        rows = gradients.rows(chosen, lambda done: report(done, stop - start))
        check_own_gradients(training, gradients.dataset, chosen, rows.gradient, rows.loss)
        gradients.engine.close()
        store = RowStore.open(run.path(layout.TEST_GRADIENTS), "gradient")  # committed after its units
        store.write(start, rows.gradient if self.row_map is None else self.row_map.apply(rows.gradient))
        files = [f"{layout.TEST_GRADIENTS}/{name}" for name in store.files(start, stop)]
        return files, TestGradientValues(
            rows=stop - start,
            start=start,
            ways=gradients.engine.told()
            | {
                "repaired_blocks": gradients.repaired,
                "through": gradients.through,
                "derivative": gradients.derivative,
            },
            loss=tuple(rows.loss.tolist()),
            label=tuple(rows.label.tolist()),
            prediction=tuple(rows.prediction.tolist()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetGradientWork(Work):
    """Handler of blocks of targets: classes, or the mean over the test samples.

    Attributes:
        targets: Their kind.
    """

    targets: str

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the means of the test gradients of each target of a block."""
        start, stop = rows_of(unit)
        gradients = RowStore.open(run.path(layout.TEST_GRADIENTS), "gradient", run.vouched)
        store = RowStore.open(run.path(store_of(self.targets)), "gradient", run.vouched)
        group = target_of_each(store.column("label"), gradients.column("label"), start, stop)
        mean = mean_gradients(gradients.read, group, gradients.columns, stop - start, report)
        store.write(start, mean.astype(store.dtype))
        files = [f"{store_of(self.targets)}/{name}" for name in store.files(start, stop)]
        return files, UnitValues(rows=stop - start, start=start)
