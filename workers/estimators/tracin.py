"""TracInCP (Pruthi et al. 2020): how visits to i lowered the loss of j, seen at checkpoints.

    published:  sum over checkpoints k of  eta_k <g_i(w_k), g_j(w_k)>

with eta_k the learning rate in force at checkpoint k; one checkpoint stands for one visit of every
sample. A visit in a batch of B moves the weights by eta/B times its gradient, and a record keeps
checkpoints at any distance, so ``scale="contribution"`` (default) gives checkpoint k the weight

    (1/N) sum over the steps t since the checkpoint before of  eta_t

the expected sum of eta_t / B over the visits of one sample in that stretch. With one checkpoint an
epoch, a constant rate and B dividing N it is the published sum divided by B. Momentum p multiplies
what a gradient ends up moving by (1 - dampening) / (1 - p); that factor is ours, and is left out of
``published``. Parameter groups keep their own rates.

A step of Adam moves the weights by D = 1 / (sqrt(vhat) + eps) times the gradient: ``preconditioned`` puts D of
the checkpoint between the two gradients, <g_i(w_k), D_k g_j(w_k)>. Without it the form is that of SGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from ...storage.trajectory import Trajectory
from .base import Estimator, Found, Ground, Report, Targets, flag, one_of, whole
from .fixed import FixedWeights


@dataclass(frozen=True, kw_only=True)
class TracIn(Estimator):
    """Products of gradients, summed over the record's checkpoints.

    Attributes:
        checkpoints: How many, spread evenly, the last one always w_T; 0: all that the record keeps
            (``--checkpoint-every`` says how often). Step 0 is not among them.
        scale: ``contribution`` or ``published``, see above.
        preconditioned: Whether Adam's preconditioner stands between the gradients.
    """

    NAME = "tracin"
    FOLLOWS_TRAINING = True
    VECTORS = 2

    checkpoints: int = 0
    scale: Literal["contribution", "published"] = "contribution"
    preconditioned: bool = False

    def __post_init__(self) -> None:
        flag("preconditioned", self.preconditioned)
        whole("checkpoints", self.checkpoints, 0)
        one_of("scale", self.scale, "contribution", "published")

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Add up the products; see ``Estimator``."""
        fixed = FixedWeights(ground.training, ground.trajectory)
        chosen = checkpoints_used(ground.trajectory, self.checkpoints)
        weights = self.weights(ground.trajectory, chosen, ground.training.n_train)
        total = torch.zeros(
            len(targets.index), len(ground.tracked), dtype=torch.float64, device=ground.training.device
        )
        for done, (k, weight) in enumerate(zip(chosen, weights, strict=True), start=1):
            fixed.load(k)
            gradient = fixed.targets(targets.index)
            if self.preconditioned:
                gradient *= fixed.preconditioner(k)
            total += fixed.products(ground.tracked, gradient * fixed.columns.spread(weight))
            report(done, len(chosen))
        fixed.close()
        return Found(values=total.cpu().numpy(), notes={"checkpoints": len(chosen)})

    def weights(
        self, trajectory: Trajectory, chosen: list[int], n_train: int
    ) -> list[npt.NDArray[np.float64]]:
        """Return each checkpoint's factor by parameter group, (G,)."""
        steps = [int(trajectory.checkpoint_steps[k]) for k in chosen]
        if self.scale == "published":
            return [trajectory.learning_rate[step - 1] for step in steps]
        gain = (1 - trajectory.dampening) / (1 - np.minimum(trajectory.momentum, 1 - 1e-6))
        rate = trajectory.learning_rate * np.where(trajectory.momentum != 0, gain, 1.0)
        borders = zip([0, *steps[:-1]], steps, strict=True)
        return [rate[start:stop].sum(axis=0) / n_train for start, stop in borders]


def checkpoints_used(trajectory: Trajectory, asked: int) -> list[int]:
    """Return the numbers of so many checkpoints, spread evenly, the last one among them; 0: of all but the first."""
    after = len(trajectory.checkpoint_steps) - 1
    count = min(asked, after) if asked else after
    return [round(after * (k + 1) / count) for k in range(count)]
