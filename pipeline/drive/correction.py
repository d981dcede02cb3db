"""EKFAC's stages: its curvature, and the exact correction along a few directions."""

from __future__ import annotations

from collections.abc import Sequence

from ...storage import layout
from ...storage.rows import RowStore
from ..executors.base import Unit
from ..plan.plan import Plan
from ..plan.sharding import exact_targets, spans
from ..plan.survey import compute_of
from ..plan.times import curvature_passes
from ..spec.method_options import CurvatureOptions
from ..units.curvature import CorrectionWork, CurvatureWork, DirectionsWork
from ..vocabulary import CORRECTION, CURVATURE, DIRECTIONS
from .gradients import TESTED
from .preflight import preflight
from .stages import Session, Stage, Stages, units_of
from .stores import StoreOf


def curvature(session: Session, voids: Sequence[str]) -> Stage:
    """Return the stage that estimates the curvature, once for all targets."""
    spec = session.spec
    stage = f"{spec.form}/{CURVATURE}"
    return Stage(
        name=stage,
        units=[Unit(stage=stage, name=CURVATURE)],
        handler=lambda: CurvatureWork(
            uri=session.directory.uri,
            recipe=session.surveyed.recipe,
            compute=compute_of(spec),
            form=spec.form,
            options=CurvatureOptions.asked_by(spec),
        ),
        total=curvature_passes(spec),
        label="pass",
        closing=False,
        voids=voids,
    )


def correction(session: Session, plan: Plan) -> Stages:
    """Correct EKFAC contributions exactly along the leading directions of the test gradients."""
    spec, surveyed, directory = session.spec, session.surveyed, session.directory
    stage = f"{spec.method}/{DIRECTIONS}"
    yield Stage(
        name=stage,
        units=[Unit(stage=stage, name=DIRECTIONS)],
        handler=lambda: DirectionsWork(
            uri=directory.uri, method=spec.method, targets=spec.targets, rank=spec.exact_rank
        ),
        total=1,
        label="set",
        needs=[TESTED],
        closing=False,
    )
    found = RowStore.open(
        directory.path(layout.corrections(spec.method, layout.DIRECTIONS)), "direction", directory.vouched
    )
    stage = f"{spec.method}/{CORRECTION}"
    together = exact_targets(surveyed)
    units = units_of(stage, spans(found.rows, together, "directions"))
    yield from preflight(session, plan, method=spec.method, later=units, vectors=found.rows, share=1.0)
    yield Stage(
        name=stage,
        units=units,
        handler=lambda: CorrectionWork(
            uri=directory.uri,
            recipe=surveyed.recipe,
            compute=compute_of(spec),
            method=spec.base_method,
            form=spec.form,
            tracked=surveyed.tracked,
            targets=spec.targets,
            corrected=spec.method,
        ),
        total=plan.steps * len(units),
        label="step",
        store=StoreOf(
            base=layout.corrections(spec.method, layout.CORRECTED),
            name="contribution",
            rows=found.rows,
            columns=plan.n_tracked,
            dtype=spec.dtype,
            chunk_rows=together,
            dimensions=("rank", "tracked"),
            attrs={"method": spec.method},
        ),
    )
