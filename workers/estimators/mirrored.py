"""Mirrored influence (Ko et al. 2024): train on the test sample, look at the training samples.

The hypothesis: how training on i changes the loss of j mirrors how training on j changes the loss of
i. So the model takes a few steps of gradient ascent on one test sample, and forward passes show whose
loss rises with it:

    w' <- w_T;  ``steps`` times  w' <- w' + rate g_j(w')
    value(i, j) = (loss_i(w') - loss_i(w_T)) / (N rate steps)

No gradient of a training sample is computed. The abstract says neither how long a step is, nor what
to divide by: ours are the recorded last learning rate, and the divisor, which makes the limit of short
steps (1/N) <g_i, g_j>, that is ``gradient-dot`` (C for H = 1). ``central`` (ours) subtracts the losses
after as much descent instead of those at w_T, which cancels the curvature of loss_i along the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .base import Estimator, Found, Ground, Report, Targets, flag, number, whole
from .fixed import FixedWeights, last_setting


@dataclass(frozen=True, kw_only=True)
class MirroredInfluence(Estimator):
    """Loss changes of the training samples after training on a test sample.

    Attributes:
        steps: Steps of gradient ascent.
        rate: Length of a step; None: the largest learning rate of the record's last step that had one.
        central: Whether losses are compared with those after descent instead of those at w_T.
    """

    NAME = "mirrored-influence"
    VECTORS = 2

    steps: int = 1
    rate: float | None = None
    central: bool = False

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        if self.rate is not None:
            number("rate", self.rate, open_least=True)
        flag("central", self.central)

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Step, look, and step back, for one test sample after the other; see ``Estimator``."""
        fixed = FixedWeights(ground.training, ground.trajectory)
        rate = self.rate or _last_rate(ground)
        dataset = ground.training.dataset
        trained = ground.training.weights()
        before = None if self.central else fixed.losses(dataset, ground.tracked)
        values = torch.empty(len(targets.index), len(ground.tracked), dtype=torch.float64)
        for k, j in enumerate(targets.index):
            first = torch.from_numpy(targets.gradient[k]).to(trained)
            after = self._losses(fixed, ground, trained, first, int(j), rate)
            other = self._losses(fixed, ground, trained, first, int(j), -rate) if before is None else before
            values[k] = ((after - other) / (2 if self.central else 1)).cpu()
            report(k + 1, len(targets.index))
        fixed.move(trained)
        fixed.close()
        found = values.numpy() / (ground.training.n_train * rate * self.steps)
        return Found(values=found, notes={"rate": rate})

    def _losses(
        self,
        fixed: FixedWeights,
        ground: Ground,
        trained: torch.Tensor,
        gradient: torch.Tensor,
        j: int,
        rate: float,
    ) -> torch.Tensor:
        mask = fixed.optimised.to(trained.dtype)
        weights = trained + rate * gradient * mask
        fixed.move(weights)
        for _ in range(self.steps - 1):
            weights = weights + rate * fixed.rows(fixed.test_dataset, np.array([j]))[0] * mask
            fixed.move(weights)
        return fixed.losses(ground.training.dataset, ground.tracked)


def _last_rate(ground: Ground) -> float:
    """Return the largest rate over the groups, of the last step where it is not 0."""
    rates = ground.trajectory.learning_rate
    if not len(rates):
        rates = last_setting(ground.training, ground.trajectory, "learning_rate")[None]
    largest = rates.max(axis=1)
    used = largest[largest > 0]
    return float(used[-1]) if len(used) else 1.0
