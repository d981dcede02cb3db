"""Hessian-free influence: the identity in the inverse Hessian's place, at w_T or over an ensemble.

    C(i, j) = (1/N) mean over checkpoints k of  <g_i(w_k), g_j(w_k)>

What Yang et al. 2024 look at again (they call the identity in H's place TracIn) and improve with an
ensemble. Their abstract does not say of what: here it is the last ``ensemble`` checkpoints of the one
record, weighted alike. Order and sign only: no inverse, so the scale is that of C for H = 1.
``preconditioned`` puts the preconditioner of Adam at the checkpoint, 1 / (sqrt(vhat) + eps), between the two
gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Estimator, Found, Ground, Report, Targets, flag, whole
from .fixed import FixedWeights


@dataclass(frozen=True, kw_only=True)
class GradientDot(Estimator):
    """Products of gradients.

    Attributes:
        ensemble: How many of the record's last checkpoints are averaged; 1 is w_T alone. More than
            there are after step 0 means all of those.
        preconditioned: Whether gradients of training samples are multiplied with Adam's preconditioner.
    """

    NAME = "gradient-dot"
    VECTORS = 2

    ensemble: int = 1
    preconditioned: bool = False

    def __post_init__(self) -> None:
        whole("ensemble", self.ensemble)
        flag("preconditioned", self.preconditioned)

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Multiply gradients at each checkpoint; see ``Estimator``."""
        fixed = FixedWeights(ground.training, ground.trajectory)
        count = min(self.ensemble, max(1, len(ground.trajectory.checkpoint_steps) - 1))
        total = torch.zeros(
            len(targets.index), len(ground.tracked), dtype=torch.float64, device=ground.training.device
        )
        for done, k in enumerate(range(-count, 0), start=1):
            if count == 1:
                gradient = torch.from_numpy(targets.gradient).to(ground.training.device)
            else:
                fixed.load(k)
                gradient = fixed.targets(targets.index)
            scale = fixed.preconditioner(k) if self.preconditioned else fixed.optimised
            total += fixed.products(ground.tracked, gradient.double() * scale)
            report(done, count)
        fixed.close()
        values = (total / (count * ground.training.n_train)).cpu().numpy()
        return Found(values=values, notes={"checkpoints": count})
