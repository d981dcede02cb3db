"""The driver's stages of gradients at the trained weights: of test samples, and of targets made of them."""

from __future__ import annotations

import numpy as np

from ...storage import layout
from ..plan.plan import Plan
from ..plan.survey import Survey
from ..spec.spec import RunSpec
from ..spec.targets import store_of
from ..vocabulary import INDEX, RECORD, TEST_GRADIENTS, TRAJECTORY, stage_of
from .stages import Stages, units_of


class GradientStages(Stages):
    """The driver's part of it."""

    spec: RunSpec
    surveyed: Survey
    plan: Plan

    def _test_gradients(self) -> None:
        self._needs(RECORD, TRAJECTORY, "record")
        plan, surveyed = self.plan, self.surveyed
        unknown = np.full(plan.n_tested, -1, dtype=np.int16)
        store = self._make_store(
            TEST_GRADIENTS,
            layout.TEST_GRADIENTS,
            name="gradient",
            rows=plan.n_tested,
            columns=plan.dimension,
            dtype=self.spec.dtype,
            chunk_rows=plan.test_chunk_rows,
            dimensions=("test_index", "parameter"),
            row_columns={
                "test_index": surveyed.tested.astype(np.int32),
                "loss": np.full(plan.n_tested, np.nan),
                "label": unknown,
                "prediction": unknown.copy(),
            },
            attrs={"n_test": plan.n_test},
        )
        units = units_of(TEST_GRADIENTS, plan.test_blocks)
        self._stage(TEST_GRADIENTS, units, plan.n_tested, "row", extra=1)
        if self._valid(TEST_GRADIENTS, INDEX):
            return
        for unit in units:
            manifest = self.directory.manifest(TEST_GRADIENTS, unit.name)
            assert manifest is not None
            for column, dtype in (("loss", np.float64), ("label", np.int16), ("prediction", np.int16)):
                values = np.asarray(manifest.values[column], dtype=dtype)
                store.write_column(column, values, start=int(manifest.values["start"]))
        self._commit_index(TEST_GRADIENTS, layout.TEST_GRADIENTS, store)

    def _target_gradients(self) -> None:
        """Make the gradients of classes or of the mean, once for all forms of the Hessian."""
        plan, kind = self.plan, self.plan.targets.kind
        store = self._make_store(
            stage_of(kind),
            store_of(kind),
            name="gradient",
            rows=len(plan.targets),
            columns=plan.dimension,
            dtype=self.spec.dtype,
            chunk_rows=plan.target_chunk_rows,
            dimensions=(plan.targets.axis, "parameter"),
            row_columns=plan.targets.columns(),
            attrs={"targets": kind, "n_test": plan.n_tested},
        )
        if not self._valid(stage_of(kind), INDEX):
            self._commit_index(stage_of(kind), store_of(kind), store)
        units = units_of(stage_of(kind), plan.target_blocks)
        self._stage(stage_of(kind), units, plan.n_tested * len(units), "row", extra=1)
