"""RelatIF: influence relative to how far a sample moves the model (Barshan, Brunet & Dziugaite 2020).

A sample of large loss moves the weights far and so leads every list of an influence function. With
s_j = (H + damping)^-1 g_j as in ``influence_cg``:

    theta:  <g_i, s_j> / ||H^-1 g_i||               loss change for each unit that the weights move
    loss:   <g_i, s_j> / sqrt(<g_i, H^-1 g_i>)      the same with the length taken in the loss

In ``theta``, N cancels: it is C(i, j) divided by the length of the move (1/N) H^-1 g_i. Neither form
has the scale of C; sign and order among the test samples are C's. <g_i, H^-1 g_i> is the self-influence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .base import TARGETS, Found, Ground, Report, Targets, one_of
from .fixed import FixedWeights
from .influence_cg import InfluenceCG


@dataclass(frozen=True, kw_only=True)
class RelatIF(InfluenceCG):
    """Influence divided by the length of the sample's own move; one more solve a tracked sample.

    Attributes:
        damping: Added to the diagonal of H, here and in the lengths.
        tolerance: Relative residual at which a solve stops.
        max_iterations: Iterations after which it stops anyway; that is warned of and recorded.
        norm: ``theta`` or ``loss``, see above.
    """

    NAME = "relatif"
    PREPARES = True

    norm: Literal["theta", "loss"] = "theta"

    def __post_init__(self) -> None:
        # Not super(): this file's dataclass decorator may replace the class.
        InfluenceCG.__post_init__(self)
        one_of("norm", self.norm, "theta", "loss")

    def prepare(self, ground: Ground, rows: slice, report: Report) -> Found:
        """Return the length of each tracked sample's move, (R,)."""
        fixed = FixedWeights(ground.training, ground.trajectory)
        chosen = ground.tracked[rows]
        lengths = np.empty(len(chosen))
        notes: dict[str, list[float]] = {"iterations": [], "residual": [], "not_converged": []}
        for start in range(0, len(chosen), TARGETS):
            some = chosen[start : start + TARGETS]
            gradient = fixed.rows(ground.training.dataset, some)
            solution = self.solve(fixed, gradient, lambda _done, _total: None)
            if self.norm == "theta":
                found = solution.x.norm(dim=1)
            else:
                found = (solution.x * gradient.double()).sum(1).clamp_min(0).sqrt()
            lengths[start : start + len(some)] = found.cpu().numpy()
            for key, values in solution.notes(self.NAME, some.tolist()).items():
                notes[key] += values
            report(start + len(some), len(chosen))
        fixed.close()
        return Found(values=lengths, notes=notes)

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Return influence divided by the prepared lengths; 0 where a sample moves nothing."""
        assert ground.prepared is not None
        found = InfluenceCG.contributions(self, ground, targets, report)
        length = ground.prepared
        influence = found.values * ground.training.n_train
        values = np.divide(influence, length, out=np.zeros_like(influence), where=length > 0)
        return Found(values=values, notes=found.notes)
