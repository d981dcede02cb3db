"""The driver's stages of EKFAC: its curvature, and the exact correction along a few directions."""

from __future__ import annotations

from ...storage import layout
from ...storage.rows import RowStore
from ..executors.base import Unit
from ..plan.sharding import EXACT_TARGETS, spans
from ..plan.times import curvature_passes
from ..vocabulary import CORRECTION, CURVATURE, DIRECTIONS, INDEX, TEST_GRADIENTS
from .preflight import PreflightStages
from .stages import units_of


class CurvatureStages(PreflightStages):
    """The driver's part of it."""

    method: str

    def _curvature(self) -> bool:
        """Estimate the curvature, once for all targets; return whether it was made now."""
        stage = f"{self.form}/{CURVATURE}"
        unit = Unit(stage=stage, name=CURVATURE, arguments={})
        total = curvature_passes(self.spec)
        return bool(self._stage(stage, [unit], total, "pass"))

    def _correct(self) -> None:
        """Correct EKFAC contributions exactly along the leading directions of the test gradients."""
        self._needs(TEST_GRADIENTS, INDEX, "replay")
        stage = f"{self.method}/{DIRECTIONS}"
        unit = Unit(stage=stage, name=DIRECTIONS, arguments={"rank": self.spec.exact_rank})
        self._stage(stage, [unit], 1, "set")
        found = RowStore.open(
            self.directory.path(layout.corrections(self.method, layout.DIRECTIONS)), "direction"
        )
        stage, base = f"{self.method}/{CORRECTION}", layout.corrections(self.method, layout.CORRECTED)
        store = self._make_store(
            stage,
            base,
            name="contribution",
            rows=found.rows,
            columns=self.plan.n_tracked,
            dtype=self.spec.dtype,
            chunk_rows=EXACT_TARGETS,
            dimensions=("rank", "tracked"),
            row_columns={},
            attrs={"method": self.method},
        )
        if not self._valid(stage, INDEX):
            self._commit_index(stage, base, store)
        units = units_of(stage, spans(found.rows, EXACT_TARGETS, "directions"))
        self._preflight(self.method, stage, [unit.name for unit in units], found.rows, exact=True)
        self._stage(stage, units, self.plan.steps * len(units), "step", extra=1)
