"""How exact tangents grow along a record, and what float32 makes of them: measured before the work.

Two vectors are carried through the recursion of the exact form, or of another that carries vectors, as
``dense`` does it: a random change of the first weights of norm 1, whose norm says how fast tangents grow, and
the tangent of one tracked sample, in the run's dtype and in float64 along the same weights, whose difference
is what rounding does to a hypergradient here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.errors import NonFiniteTangents
from ...storage.trajectory import Trajectory
from ..determinism import derived_seed
from ..recipe import Batch, Recipe
from ..training.training import Compute, Training
from ..training.verified import Report, Rows, VerifiedReplay
from .dense import DenseTangents
from .tolerances import FORM, Form


class Growth(VerifiedReplay):
    """One replay that carries both vectors; see ``VerifiedReplay``.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        tracked: Train indices of the run; the one that is visited first is carried.
        share: Of the Hessian in the products; 1: exact, 0: Gauss-Newton.
    """

    def __init__(self, training: Training, trajectory: Trajectory, tracked: Rows, share: float = 1.0) -> None:
        order = trajectory.batches[np.isin(trajectory.batches, tracked)]
        super().__init__(training, trajectory, order[:1].astype(np.int64))
        # Row 0 is the sample, row 1 the change of the first weights: no member of a batch is that.
        self.form: Form = "exact" if share == 1.0 else "mixed" if share else "gauss-newton"
        made = partial(DenseTangents, training, trajectory, forms=(self.form,), share=share)
        self.own = made(samples=2, dtype=training.dtype)
        self.wide: DenseTangents | None = None
        if training.dtype != torch.float64:
            self.wide = made(samples=1)
        self.sample, self.change = self.own.tangents[self.form]
        generator = np.random.default_rng(derived_seed(training.recipe.seed, "growth"))
        direction = torch.from_numpy(generator.standard_normal(training.layout.dimension))
        direction = (direction / direction.norm()).to(device=training.device, dtype=training.dtype)
        parts = direction.split([p.numel() for p in training.parameters])
        self.change.du = [part.view(p.shape) for part, p in zip(parts, training.parameters, strict=True)]
        self.change.moved = True
        self.norms = np.zeros(training.steps)

    def run(self, report: Report | None = None) -> dict[str, Any]:
        """Go through the record.

        Returns:
            ``growth``: norm of the change at the end; ``peak`` and ``peak_step``: its largest, and after
            how many steps; ``rounding``: eps x sqrt(T) x peak, what rounding the weights at every step
            may come to; ``deviation``: of the sample's tangent from float64, relative, None in float64;
            ``limit``: what both are held against; ``train_index``: the sample.

        Raises:
            NonFiniteTangents: A tangent overflows; names the step.
            ReplayDiverged: See ``VerifiedReplay``.
        """
        self.replay(report)
        dtype = self.training.compute.dtype
        deviation = None
        if self.wide is not None:
            right = self.wide.tangents[self.form][0].flat()
            scale = float(right.norm())
            deviation = float((self.sample.flat().double() - right).norm()) / scale if scale else 0.0
        peak = int(self.norms.argmax())
        largest = max(1.0, float(self.norms[peak]))
        return {
            "growth": float(self.norms[-1]),
            "peak": largest,
            "peak_step": peak + 1 if self.norms[peak] > 1.0 else 0,
            "rounding": float(np.finfo(dtype).eps) * math.sqrt(len(self.norms)) * largest,
            "deviation": deviation,
            "limit": FORM[self.form][dtype],
            "train_index": int(self.tracked[0]),
        }

    def step(self, step: int, batch: Batch, rows: Rows) -> Tensor:
        """Move the vectors, then train."""
        self.own.step(step, batch, rows)
        if self.wide is not None:
            self.wide.step(step, batch, rows)
        self.norms[step] = norm = float(self.change.flat().double().norm())
        size = norm + float(self.sample.flat().double().norm())
        if not math.isfinite(size):
            raise NonFiniteTangents(overflow(step + 1, self.training, self.norms[:step], self.form))
        return self.training.step(step, batch)


def overflow(step: int, training: Training, norms: npt.NDArray[np.float64], form: str) -> str:
    """Say where tangents stopped being numbers, and what to do."""
    grown = f" (a change of the first weights had grown {norms.max():.1e} times)" if len(norms) else ""
    return (
        f"{form} tangents are not finite in {training.compute.dtype} after step {step} of {training.steps}"
        f"{grown}; use a lower learning rate or fewer epochs"
    )


def check_finite(
    values: npt.NDArray[np.floating],
    *,
    what: str,
    recipe: Recipe,
    compute: Compute,
    trajectory: Trajectory,
    tracked: Rows,
    exact: bool,
    share: float = 1.0,
) -> npt.NDArray[np.floating]:
    """Return ``values``, unless one of them is not finite.

    Only then the form is followed step by step, so that the message can name the step.

    Raises:
        NonFiniteTangents: One is not.
    """
    if np.isfinite(values).all():
        return values
    if exact:
        Growth(Training(recipe, replace(compute, batch_norm="coupled")), trajectory, tracked, share).run()
    raise NonFiniteTangents(
        f"{what} are not finite in {compute.dtype}, though every loss is; "
        "use a lower learning rate or fewer epochs"
    )
