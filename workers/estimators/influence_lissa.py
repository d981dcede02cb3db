"""Influence functions with LiSSA (Agarwal et al. 2017, Koh & Liang 2017; Eq. 21 of the HyDRA paper).

The Neumann series of the inverse, with the Hessian of a fresh mini-batch d in every term:

    v <- g_j + (1 - (H_d + L + damping) / scale) v,   v = g_j at first
    (H + damping)^-1 g_j  ~  v / scale   after ``depth`` terms, averaged over ``repeats`` series

It converges where ``scale`` is above half the largest eigenvalue of every mini-batch's Hessian and
there is no negative curvature. C(i, j) as in ``influence_cg``. The mini-batches are the same for all
test samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...storage.errors import EstimatorDiverged
from ..determinism import derived_seed
from .base import Estimator, Found, Ground, Report, Targets, number, whole
from .fixed import FixedWeights
from .hessian import LossHessian

RUNAWAY = 1e8
"""A series longer than this times its first term cannot be converging to anything of use."""


@dataclass(frozen=True, kw_only=True)
class InfluenceLissa(Estimator):
    """Inverse Hessian products by a stochastic Neumann series.

    Attributes:
        damping: Added to the diagonal of H.
        scale: What the Hessian is divided by; raise it when the series diverges, then ``depth`` too.
        depth: Terms of a series.
        repeats: Series that are averaged.
        batch_size: Samples a term, drawn without replacement.
        seed: Of the mini-batches; the recipe's seed enters too.
    """

    NAME = "influence-lissa"

    damping: float = 0.01
    scale: float = 10.0
    depth: int = 1000
    repeats: int = 1
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        number("damping", self.damping)
        number("scale", self.scale, open_least=True)
        whole("depth", self.depth)
        whole("repeats", self.repeats)
        whole("batch_size", self.batch_size)
        whole("seed", self.seed, 0)

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Sum the series for the block's test gradients, then multiply; see ``Estimator``."""
        fixed = FixedWeights(ground.training, ground.trajectory)
        right = torch.from_numpy(targets.gradient).to(device=ground.training.device, dtype=torch.float64)
        inverse, moving = self.solve(fixed, right * fixed.optimised, report)
        products = fixed.products(ground.tracked, inverse)
        fixed.close()
        return Found(values=(products / ground.training.n_train).cpu().numpy(), notes={"last_change": moving})

    def solve(self, fixed: FixedWeights, right_QD: Tensor, report: Report) -> tuple[Tensor, list[float]]:
        """Return the inverse products (Q, D) and how much, relatively, each series' last term changed it.

        Raises:
            EstimatorDiverged: A series ran away.
        """
        hessian = LossHessian(fixed, self.damping)
        total = fixed.training.n_train
        size = min(self.batch_size, total)
        first = right_QD.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        out, change = torch.zeros_like(right_QD), torch.zeros_like(first)
        for repeat in range(self.repeats):
            generator = np.random.default_rng(
                derived_seed(fixed.training.recipe.seed + self.seed, "lissa", repeat)
            )
            v = right_QD.clone()
            for term in range(self.depth):
                chosen = np.sort(generator.choice(total, size, replace=False))
                moved = right_QD + v - hessian.on(chosen, v) / self.scale
                change, v = (moved - v).norm(dim=1), moved
                if not bool((v.norm(dim=1) <= RUNAWAY * first).all()):
                    raise EstimatorDiverged(
                        f"influence-lissa diverged at term {term + 1} of {self.depth} with scale {self.scale:g}; "
                        f"use a larger scale (such as {10 * self.scale:g}, and more depth), and where that does "
                        f"not help a damping above {self.damping:g}: the Hessian has negative eigenvalues"
                    )
                report(repeat * self.depth + term + 1, self.repeats * self.depth + 1)
            out += v / (self.scale * self.repeats)
            change = change / v.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        return out, change.tolist()
