"""Preflight: before the expensive stage, is the run's dtype enough for what is asked?

Without the Hessian, and with EKFAC, the recorded settings say it: one look at the coefficients. The
exact form, like the others that carry vectors, is asked itself (``workers.reference.growth``): two vectors
are carried through it, for about the price of 13 trainings, in a unit of the stage ``<method>/preflight``,
where enough vectors follow for that to be little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from ...storage import layout
from ...storage.curvature import Curvature, read_curvature
from ...storage.errors import NonFiniteTangents
from ...storage.rundir import RunDirectory
from ...storage.trajectory import Trajectory, open_trajectory
from ...workers.recursion.coefficients import recorded_settings
from ...workers.recursion.eigencoefficients import cut_directions
from ..executors.base import Unit
from ..plan.plan import Plan
from ..plan.survey import compute_of
from ..plan.times import ENOUGH
from ..reading.run_info import Preflight
from ..reading.unit_values import GrowthValues, UnitValues, values_of
from ..units.curvature import PreflightWork
from ..vocabulary import EKFAC, PREFLIGHT
from .stages import Session, Stage, Stages


def preflight(
    session: Session, plan: Plan, *, method: str, later: Sequence[Unit], vectors: int, share: float | None
) -> Stages:
    """Look before some units are done; note warnings in ``run.json`` and say them.

    Args:
        session: The session.
        plan: How the work is cut.
        method: Whose units.
        later: The units that follow.
        vectors: How many vectors they carry.
        share: Of the Hessian in the products that carry them step by step; None: they are not.

    Raises:
        NonFiniteTangents: What follows would not be numbers.
    """
    spec, directory = session.spec, session.directory
    if share is None:
        curvature = None
        if spec.form == EKFAC:
            curvature = read_curvature(directory.path(layout.curvature(spec.form)), directory.vouched)
        trajectory = open_trajectory(directory.path(layout.TRAJECTORY), directory.vouched)
        found = settings_preflight(trajectory, spec.dtype, curvature)
    else:
        stage = f"{method}/{PREFLIGHT}"
        done = all(unit.name in directory.units(unit.stage) for unit in later)
        if vectors >= ENOUGH and not done:
            yield Stage(
                name=stage,
                units=[Unit(stage=stage, name=PREFLIGHT)],
                handler=lambda: PreflightWork(
                    uri=directory.uri,
                    recipe=session.surveyed.recipe,
                    compute=compute_of(spec),
                    tracked=session.surveyed.tracked,
                    share=share,
                ),
                total=plan.steps,
                label="step",
                closing=False,
            )
        found = growth_preflight(
            directory, stage, spec.dtype, plan.steps, "exact" if share == 1.0 else spec.hessian
        )
    session.update(lambda info: info.with_method(method, preflight=found))
    for text in found.warnings:
        session.note(f"warning: {text}")


def settings_preflight(trajectory: Trajectory, dtype: str, curvature: Curvature | None = None) -> Preflight:
    """Judge the coefficients ``c_t N / B_t`` of the closed form.

    Args:
        trajectory: The record.
        dtype: Of the sums.
        curvature: With EKFAC: whose eigenvalues may exceed what the steps bear.

    Returns:
        ``warnings`` (one line each), ``largest_coefficient``, ``epochs_below_resolution`` and with
        EKFAC ``clipped_eigenvalues``.

    Raises:
        NonFiniteTangents: A coefficient is not finite in this dtype.
    """
    precision = np.finfo(dtype)
    used = sorted({entry.group for entry in trajectory.parameters if entry.group >= 0})
    divisor = (trajectory.batches >= 0).sum(1) if trajectory.divisor is None else trajectory.divisor
    share = int(trajectory.attrs["n_train"]) / divisor
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = np.abs(trajectory.coefficient[:, used]) * share[:, None]
    fine = np.isfinite(sizes) & (sizes <= float(precision.max))
    if not fine.all():
        step = int(np.flatnonzero(~fine.all(1))[-1])
        raise NonFiniteTangents(
            f"the coefficient of step {step} of {len(sizes)} is beyond {dtype} ({sizes[step].max():.1e}): the "
            f"recorded learning rate, momentum and weight decay make pushes grow without end; use "
            "a lower learning rate, a smaller weight decay or fewer epochs"
        )
    epochs = np.array_split(sizes, int(trajectory.attrs["epochs"]))
    largest = np.array([part.max(0) for part in epochs])  # (epochs, groups)
    lost = int(((largest < precision.eps * largest.max(0)) & (largest > 0)).any(1).sum())
    warnings = []
    if lost:
        warnings.append(
            f"coefficients of {lost} of {len(epochs)} epochs are below {precision.eps:.1e} of the largest: "
            f"{dtype} sums round away what those epochs add to a hypergradient; use "
            f"{_wider(dtype)}a smaller weight decay or learning rate"
        )
    found: dict[str, Any] = {
        "largest_coefficient": float(sizes.max()),
        "epochs_below_resolution": lost,
    }
    if curvature is not None:
        found["clipped_eigenvalues"] = clipped = clipped_eigenvalues(trajectory, curvature)
        if clipped:
            warnings.append(
                f"{clipped:,} of {curvature.eigenvalues.shape[1]:,} eigenvalues of the curvature are beyond what "
                "the steps bear without growing and are set to that limit: EKFAC understates the curvature "
                "there; a lower learning rate avoids it"
            )
    return Preflight(warnings=tuple(warnings), rest=found)


def clipped_eigenvalues(trajectory: Trajectory, curvature: Curvature) -> int:
    """Return how many eigendirections are cut at what the steps bear at some checkpoint."""
    settings = recorded_settings(trajectory)
    lanes = settings.lane_of
    if lanes is None:
        lanes = np.array([entry.group for entry in trajectory.parameters], dtype=np.int64)
    spread = [np.full(block.rows * block.columns, lanes[block.entries[0]]) for block in curvature.blocks]
    return cut_directions(settings, np.concatenate(spread), curvature)


def growth_preflight(directory: RunDirectory, stage: str, dtype: str, steps: int, hessian: str) -> Preflight:
    """Judge what a form was seen to do; see ``workers.reference.growth.Growth.run`` for the numbers."""
    manifest = directory.manifest(stage, PREFLIGHT)
    if manifest is None:
        why = f"fewer than {ENOUGH} vectors follow: measuring first would not be cheap beside them"
        return Preflight(skipped=why)
    seen = values_of(GrowthValues, manifest)
    warnings, wider, limit = [], _wider(dtype), seen.limit or 0.0
    # What is not finite is stored as null.
    peak, rounding = (math.inf if value is None else value for value in (seen.peak, seen.rounding))
    if seen.deviation is not None and not seen.deviation <= limit:
        warnings.append(
            f"{dtype} is not enough for {hessian} hypergradients here: that of train_index {seen.train_index} "
            f"is {seen.deviation:.1e} from float64, the limit is {limit:.0e}; "
            f"use {wider}a lower learning rate or fewer epochs"
        )
    if not rounding <= limit:
        warnings.append(
            f"{hessian} tangents grow: a change of the first weights is {peak:.1e} times as large after step "
            f"{seen.peak_step} of {steps}, so that rounding alone moves the final weights by about "
            f"{rounding:.0e} in {dtype}, the limit is {limit:.0e}; use {wider}a lower learning rate or fewer epochs"
        )
    common = {field.name for field in fields(UnitValues)}
    measured = [field.name for field in fields(seen) if field.name not in common]
    return Preflight(warnings=tuple(warnings), rest={name: getattr(seen, name) for name in measured})


def _wider(dtype: str) -> str:
    return "" if dtype == "float64" else "--dtype float64, "
