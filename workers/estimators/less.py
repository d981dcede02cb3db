"""LESS (Xia et al. 2024), without its projection: the direction that a sample moves Adam, seen at checkpoints.

    sum over checkpoints k of  eta_k cos(D_k g_i(w_k), g_j(w_k)) / sum over k of eta_k

with D = 1 / (sqrt(vhat) + eps) of the optimiser at the checkpoint and eta_k the mean learning rate since the
checkpoint before. Cosines, so that short sequences with large gradients do not lead: from -1 to 1, no scale of
C. The published form takes the moments of one more step with g_i alone in D g_i's place and projects gradients
of adapters at random; here the gradients are whole and the state is the training's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...storage.trajectory import Trajectory
from .base import Estimator, Found, Ground, Report, Targets, whole
from .fixed import FixedWeights
from .tracin import checkpoints_used


@dataclass(frozen=True, kw_only=True)
class Less(Estimator):
    """Cosines of preconditioned gradients with the gradients of tests; records of Adam and AdamW alone.

    Attributes:
        checkpoints: How many, spread evenly, the last one always w_T; 0: all that the record keeps after
            step 0.
    """

    NAME = "less"
    FOLLOWS_TRAINING = True
    VECTORS = 3

    checkpoints: int = 0

    def __post_init__(self) -> None:
        whole("checkpoints", self.checkpoints, 0)

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Average the cosines; see ``Estimator``."""
        fixed = FixedWeights(ground.training, ground.trajectory)
        chosen = checkpoints_used(ground.trajectory, self.checkpoints)
        total = torch.zeros(
            len(targets.index), len(ground.tracked), dtype=torch.float64, device=ground.training.device
        )
        for done, (k, weight) in enumerate(
            zip(chosen, _shares(ground.trajectory, chosen), strict=True), start=1
        ):
            fixed.load(k)
            gradient = fixed.targets(targets.index) * fixed.optimised
            found, lengths = fixed.scaled_products(ground.tracked, gradient, fixed.preconditioner(k))
            scale = gradient.norm(dim=1)[:, None] * lengths
            # A sample without a gradient moves nothing.
            total += weight * torch.where(scale > 0, found / torch.where(scale > 0, scale, 1.0), 0.0)
            report(done, len(chosen))
        fixed.close()
        return Found(values=total.cpu().numpy(), notes={"checkpoints": len(chosen)})


def _shares(trajectory: Trajectory, chosen: list[int]) -> list[float]:
    """Return each checkpoint's share of the learning rates, averaged over groups and steps."""
    steps = [int(trajectory.checkpoint_steps[k]) for k in chosen]
    borders = zip([0, *steps[:-1]], steps, strict=True)
    rates = np.array([trajectory.learning_rate[start:stop].mean() for start, stop in borders])
    return [float(share) for share in (rates / rates.sum() if rates.sum() else rates)]
