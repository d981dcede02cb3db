"""Units about curvature: EKFAC's estimate, the exact correction along a few directions, the preflight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ...storage import layout
from ...storage.curvature import write_curvature
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...workers.ekfac.curvature import CurvatureEstimate
from ...workers.reference.growth import Growth
from ...workers.replay.directions import spanning_directions
from ...workers.replay.make import make_replay
from ..executors.base import Report, Unit
from ..reading.unit_values import CurvatureValues, DirectionsValues, GrowthValues, UnitValues
from ..spec.method_options import CurvatureOptions
from ..spec.targets import store_of
from ..vocabulary import ADJOINT, EKFAC, EXACT
from .carrying import CarryingWork
from .work import Result, TrainingWork, Work, recorded, rows_of

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvatureWork(TrainingWork):
    """Handler of the one unit that estimates EKFAC's curvature.

    Attributes:
        form: Name of the Hessian's form.
        options: How it is estimated.
    """

    side_by_side: ClassVar[bool] = False

    form: str
    options: CurvatureOptions

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write basis and eigenvalues."""
        options = self.options
        assert options.checkpoints is not None
        assert options.samples is not None
        assert options.core is not None
        assert options.flat is not None
        curvature = CurvatureEstimate(
            self.training(),
            recorded(run),
            checkpoints=options.checkpoints,
            samples=options.samples,
            core=options.core,
            at=options.at,
            flat=options.flat,
        ).run(report)
        base = layout.curvature(self.form)
        files = [f"{base}/{name}" for name in write_curvature(run.path(base), curvature)]
        return files, CurvatureValues(steps=tuple(curvature.steps.tolist()), attrs=curvature.attrs)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightWork(TrainingWork):
    """Handler of the one unit that measures how exact tangents grow.

    Attributes:
        tracked: Train indices asked for, (n,).
        share: Of the Hessian in the products that carry them.
    """

    tracked: Integers
    share: float = 1.0

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write nothing; the manifest says what was seen."""
        growth = Growth(self.coupled(), recorded(run), self.tracked, self.share)
        return [], GrowthValues(**growth.run(report))


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectionsWork(Work):
    """Handler of the one unit that finds the leading directions of the targets' gradients.

    Attributes:
        method: Name of the corrected method.
        targets: Kind of the targets.
        rank: Most directions.
    """

    side_by_side: ClassVar[bool] = False

    method: str
    targets: str
    rank: int

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the directions and the targets' coordinates along them."""
        gradients = RowStore.open(run.path(store_of(self.targets)), "gradient", run.vouched)
        found, coordinates, share = spanning_directions(gradients.read, gradients.rows, self.rank)
        files = []
        for name, place, array, axes in (
            ("direction", layout.DIRECTIONS, found, ("rank", "parameter")),
            ("coordinate", layout.COORDINATES, coordinates, ("target", "rank")),
        ):
            base = layout.corrections(self.method, place)
            store = RowStore.create(
                run.path(base),
                name=name,
                rows=array.shape[0],
                columns=array.shape[1],
                dtype="float64",
                chunk_rows=array.shape[0],
                dimensions=axes,
                row_columns={},
                attrs={"share": share},
            )
            store.write(0, array)
            files += [f"{base}/{file}" for file in (*store.files(0, array.shape[0]), *store.metadata_files())]
        report(1, 1)
        return files, DirectionsValues(directions=len(found), share=share)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionWork(CarryingWork):
    """Handler of blocks of directions: exact minus EKFAC contributions to them.

    Attributes:
        corrected: Name of the corrected method.
    """

    corrected: str

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write the differences of a block of directions."""
        start, stop = rows_of(unit)
        trajectory = recorded(run)
        stored = RowStore.open(
            run.path(layout.corrections(self.corrected, layout.DIRECTIONS)), "direction", run.vouched
        )
        directions = stored.read(start, stop).astype(self.compute.dtype)
        if self.row_map is not None:
            directions = self.row_map.expand(directions)
        base = layout.corrections(self.corrected, layout.CORRECTED)
        store = RowStore.open(run.path(base), "contribution", run.vouched)
        exact = make_replay(
            EXACT,
            ADJOINT,
            self.coupled(),
            trajectory,
            self.tracked,
            targets=directions,
            tile=store.chunk_rows,
        )
        found = exact.run(report).contributions()
        del exact  # what one replay holds is gone before the other begins
        bent = make_replay(
            EKFAC,
            ADJOINT,
            self.training(),
            trajectory,
            self.tracked,
            curvature=self.basis(run),
            targets=directions,
        )
        difference = found - bent.run().contributions()
        bent.close()
        self.finite(difference, "contributions", trajectory, exact=True)
        store.write(start, difference)
        files = [f"{base}/{name}" for name in store.files(start, stop)]
        return files, UnitValues(rows=stop - start, start=start)
