"""SGD-influence (Hara, Nitanda & Maehara 2019): the training run linearised, backwards.

    a_u <- g_j(w_T);   for t = T..1:  C(i, j) += (h_t / B_t) <g_i(w_{t-1}), a_u>  if i was in batch t,
                                    a_u <- (1 - h_t (H_t + L)) a_u

It asks what would become of w_T if i were left out of its batches, the others still divided by B_t:
to first order this is the derivative that the exact adjoint (``--hessian exact``) takes, so for plain
SGD the two agree to the last bit. The published recursion has no momentum: with momentum in the record
``plain`` still follows it to the letter, along the recorded weights and rates, and misses that a
visit goes on moving the weights; ``effective`` (ours) multiplies the rates by
(1 - dampening) / (1 - p). The exact adjoint carries the momentum buffer itself. The weight decay L is
kept as the optimiser's: leaving a sample out does not take a share of the regulariser away with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ...storage.errors import EstimatorError
from ..recursion.coefficients import Settings, recorded_settings
from ..replay.adjoint import Adjoint
from .base import Estimator, Found, Ground, Report, Targets, one_of


@dataclass(frozen=True, kw_only=True)
class SgdInfluence(Estimator):
    """The training run's linearisation without its momentum; replays the record once a block.

    Attributes:
        momentum: ``plain`` or ``effective``, see above; no difference where the record has none.
    """

    NAME = "sgd-influence"
    FOLLOWS_TRAINING = True
    BATCH_NORM = "coupled"
    VECTORS = 6

    momentum: Literal["plain", "effective"] = "plain"

    def __post_init__(self) -> None:
        one_of("momentum", self.momentum, "plain", "effective")

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Carry the block's gradients back through the record; see ``Estimator``.

        Raises:
            EstimatorError: The record is not one of SGD.
        """
        noted = ground.trajectory.optimizer
        if noted["family"] != "sgd":
            raise EstimatorError(
                f"sgd-influence linearises steps of SGD and the record is of {noted['class']}; "
                "use run --hessian exact --mode adjoint, which follows the optimizer"
            )
        settings = self.settings(recorded_settings(ground.trajectory))
        back = Adjoint(ground.training, ground.trajectory, ground.tracked, targets.gradient, settings)
        found = back.run(report).contributions()
        uses = bool((ground.trajectory.momentum != 0).any())
        return Found(values=found.astype(np.float64), notes={"momentum": self.momentum if uses else "none"})

    def settings(self, recorded: Settings) -> Settings:
        """Return the recorded settings without momentum."""
        rate = recorded.learning_rate
        if self.momentum == "effective":
            gain = (1 - recorded.dampening) / (1 - np.minimum(recorded.momentum, 1 - 1e-6))
            rate = rate * np.where(recorded.momentum != 0, gain, 1.0)
        none = np.zeros_like(recorded.momentum)
        return replace(recorded, learning_rate=rate, momentum=none, nesterov=np.zeros_like(recorded.nesterov))
