"""The replay of one form of the Hessian: hypergradients shard by shard, or contributions target by target."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ...storage import layout
from ..plan.plan import Plan
from ..plan.survey import compute_of
from ..reading.run_info import RunInfo
from ..spec.spec import RunSpec
from ..units.replay import AdjointWork, ReplayWork
from ..vocabulary import (
    ADJOINT,
    CARRIED,
    EKFAC,
    FAST,
    REDUCE,
    REPLAY,
    SAMPLES,
    own_gradients_stage,
    self_influence_part,
)
from .correction import correction, curvature
from .gradients import RECORDED, TESTED, target_gradients
from .preflight import preflight
from .segments import add_work, remove_sums, segment_stages
from .stages import Session, Stage, Stages, units_of
from .stores import StoreOf, row_notes
from .trust import trust_of


def collect_stage(spec: RunSpec) -> str:
    """Return the stage that fills the stores of a method."""
    return f"{spec.base_method}/{ADJOINT if spec.mode == ADJOINT else REPLAY}"


def replay(session: Session, plan: Plan) -> Stages:
    """Replay, with what comes before (curvature, preflight) and after it (trust, exact correction)."""
    spec = session.spec
    adjoint, stage = spec.mode == ADJOINT, collect_stage(spec)
    session.require(TESTED if adjoint else RECORDED)
    if adjoint and spec.targets != SAMPLES:
        yield from target_gradients(session, plan)
    if spec.form == EKFAC:
        # Made with another basis, these are void.
        yield curvature(session, voids=(stage, f"{spec.method}/{REDUCE}"))
    row_bytes = plan.n_tracked * plan.itemsize if adjoint else math.ceil(plan.row_bytes)
    units = units_of(stage, plan.collected, row_bytes)
    in_segments = plan.segments.count > 1
    vectors = sum(shard.rows for shard in plan.shards)
    share = spec.hessian_share if spec.form in CARRIED else None
    yield from preflight(session, plan, method=spec.base_method, later=units, vectors=vectors, share=share)

    def note(info: RunInfo) -> RunInfo:
        entry = info.entry(spec.base_method)
        asked = spec.shards if entry.asked_shards is None else entry.asked_shards
        segments = spec.segments if entry.asked_segments is None else entry.asked_segments
        return info.with_method(
            spec.base_method,
            shards=len(plan.shards),
            asked_shards=asked,
            segments=plan.segments.count if in_segments else None,
            asked_segments=segments,
        )

    session.update(note)
    if in_segments:
        yield from segment_stages(session, plan, stage)
    yield Stage(
        name=stage,
        units=units,
        handler=lambda: add_work(session, plan) if in_segments else _work(session),
        total=plan.n_tracked if in_segments else plan.steps * len(units),
        label="row" if in_segments else "step",
        store=_by_target(session, plan) if adjoint else _by_sample(session, plan),
        voids=(
            f"{spec.base_method}/{REDUCE}",
            f"{spec.method}/{REDUCE}",
            *(() if adjoint else (own_gradients_stage(self_influence_part(spec.base_method)),)),
        ),
    )
    if in_segments:
        remove_sums(session)
    _trust(session, plan, stage)
    if spec.exact_rank:
        yield from correction(session, plan)


def _by_sample(session: Session, plan: Plan) -> StoreOf:
    method = session.spec.base_method
    return StoreOf(
        base=layout.hypergradients(method),
        name="hypergradient",
        rows=plan.n_tracked,
        columns=plan.columns,
        dtype=session.spec.row_dtype,
        chunk_rows=plan.chunk_rows,
        dimensions=("train_index", "parameter"),
        row_columns={"train_index": session.surveyed.tracked.astype(np.int32)},
        attrs={
            "n_train": plan.n_train,
            "method": method,
            **row_notes(session.surveyed.row_map, session.spec.precision),
        },
        precision=session.spec.precision,
    )


def _by_target(session: Session, plan: Plan) -> StoreOf:
    method, columns = session.spec.base_method, plan.targets.columns()
    if plan.targets.kind == SAMPLES:
        columns = {"test_index": columns["test_index"]}
    return StoreOf(
        base=layout.by_test(method),
        name="contribution",
        rows=len(plan.targets),
        columns=plan.n_tracked,
        dtype=session.spec.dtype,
        chunk_rows=plan.chunk_rows,
        dimensions=(plan.targets.axis, "tracked"),
        row_columns=columns,
        attrs={"n_train": plan.n_train, "method": method},
    )


def _work(session: Session) -> ReplayWork | AdjointWork:
    spec, compute = session.spec, compute_of(session.spec)
    if spec.form in CARRIED:  # they differentiate through batch statistics
        compute = replace(compute, batch_norm="coupled")
    surveyed = session.surveyed
    common: dict[str, Any] = {
        "uri": session.directory.uri,
        "recipe": surveyed.recipe,
        "compute": compute,
        "method": spec.base_method,
        "form": spec.form,
        "tracked": surveyed.tracked,
        "targets": spec.targets,
        "share": spec.hessian_share,
        "row_map": surveyed.row_map,
    }
    if spec.mode == ADJOINT:
        return AdjointWork(**common)
    return ReplayWork(**common, sampled_tests=surveyed.sampled_tests, test_labels=surveyed.test_labels)


def _trust(session: Session, plan: Plan, stage: str) -> None:
    """Note what speaks for the numbers; a run whose hypergradients do not add up ends here."""
    reason = None
    if session.spec.form != FAST:
        reason = "it is that of the form without the Hessian"
    elif plan.n_tracked != plan.n_train:
        reason = f"{plan.n_tracked} of {plan.n_train} samples are tracked; whole batches were added up in the trials"
    elif not session.surveyed.conservation:
        reason = "batch statistics are held constant"
    kept = session.surveyed.row_map
    found = trust_of(session.directory, stage, n_train=plan.n_train, lawful=reason, row_map=kept)
    session.update(lambda info: replace(info, trust={**info.trust, session.spec.base_method: found}))
