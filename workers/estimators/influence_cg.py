"""Influence functions with conjugate gradients (Koh & Liang 2017; Eq. 20 of the HyDRA paper).

w_T is taken for the minimiser of the regularised training loss with Hessian H. Then leaving out
sample i moves it by (1/N) H^-1 g_i, and

    C(i, j) = (1/N) <g_i, (H + damping)^-1 g_j>

One solve a test sample, each iteration a pass over the training data; then one pass of per-sample
products. H holds the recorded weight decay; dropout is off and BatchNorm uses its running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Estimator, Found, Ground, Report, Targets, number, whole
from .fixed import FixedWeights
from .hessian import LossHessian
from .solvers import Solution, conjugate_gradients


@dataclass(frozen=True, kw_only=True)
class InfluenceCG(Estimator):
    """Inverse Hessian products by conjugate gradients.

    Attributes:
        damping: Added to the diagonal of H.
        tolerance: Relative residual at which a solve stops.
        max_iterations: Iterations after which it stops anyway; that is warned of and recorded.
    """

    NAME = "influence-cg"

    damping: float = 0.01
    tolerance: float = 1e-4
    max_iterations: int = 100

    def __post_init__(self) -> None:
        number("damping", self.damping)
        number("tolerance", self.tolerance, open_least=True, most=1.0)
        whole("max_iterations", self.max_iterations)

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Solve for the block's test gradients, then multiply; see ``Estimator``."""
        fixed = FixedWeights(ground.training, ground.trajectory)
        solution = self.solve(fixed, torch.from_numpy(targets.gradient), report)
        products = fixed.products(ground.tracked, solution.x)
        fixed.close()
        values = (products / ground.training.n_train).cpu().numpy()
        return Found(values=values, notes=solution.notes(self.NAME, targets.index.tolist()))

    def solve(self, fixed: FixedWeights, right_QD: Tensor, report: Report) -> Solution:
        """Return (H + damping)^-1 b for each row; raises NegativeCurvature."""
        right = right_QD.to(device=fixed.training.device, dtype=torch.float64) * fixed.optimised
        hessian = LossHessian(fixed, self.damping)
        return conjugate_gradients(
            lambda _rows, vectors: hessian(vectors),
            right,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            report=lambda: report(min(hessian.calls, self.max_iterations), self.max_iterations + 1),
        )
