"""Two forms of the Hessian in one score: the mixed form's and EKFAC's contributions, averaged.

    C(i, j)  =  (W A(i, j) / a_j  +  (1 - W) B(i, j) / b_j)  (W a_j + (1 - W) b_j)

with A of ``--hessian mixed``, B of ``--hessian ekfac``, and a_j, b_j their standard deviations over the tracked samples. Where
training is not smooth the two are wrong in different ways (docs/benchmarks.md): the one follows every bend of the recorded training, the
other smooths it. Without the division the larger one would win, which
is not the better one. Sign and scale are those of C; W = 1 gives A, W = 0 gives B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ...storage.errors import SpecError
from ..ekfac.curvature import CORE, SAMPLES, CurvatureEstimate
from ..recursion.forms import ADJOINT, EKFAC, EXACT
from ..replay.make import make_replay
from ..training.training import Compute, Training
from .base import Estimator, Found, Ground, Report, Targets, number, whole

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Blend(Estimator):
    """The mean of two forms; costs a block both, EKFAC's curvature included.

    Attributes:
        weight: W, of the mixed form.
        share: Of the Hessian in the mixed form; the rest is the Gauss-Newton matrix's. 1: the exact form.
        samples: At most how many training samples the curvature is averaged over.
        core: Leading coordinates of EKFAC that keep their full curvature, at most.
    """

    NAME = "blend"
    FOLLOWS_TRAINING = True
    VECTORS = 8

    weight: float = 0.7
    share: float = 0.5
    samples: int = SAMPLES
    core: int = CORE

    def __post_init__(self) -> None:
        number("weight", self.weight, most=1.0)
        number("share", self.share, most=1.0)
        if self.share not in (0, 1) and not 0.01 <= self.share <= 0.99:
            raise SpecError(f"option share is {self.share!r}; use 0, 1 or a number from 0.01 to 0.99")
        whole("samples", self.samples)
        whole("core", self.core, least=0)

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Carry the block's gradients back in both forms; see ``Estimator``."""
        compute = ground.training.compute
        carried = self._carried(ground, replace(compute, batch_norm="coupled"), targets, report)
        closed = self._closed(ground, compute, targets)
        a, b = _spread(carried), _spread(closed)
        found = self.weight * _scaled(carried, a) + (1 - self.weight) * _scaled(closed, b)
        scale = self.weight * a + (1 - self.weight) * b
        return Found(values=found * scale, notes={"sizes": [float(np.median(a)), float(np.median(b))]})

    def _carried(self, ground: Ground, compute: Compute, targets: Targets, report: Report) -> Floats:
        training = Training(ground.training.recipe, compute)
        back = make_replay(
            EXACT,
            ADJOINT,
            training,
            ground.trajectory,
            ground.tracked,
            share=self.share,
            targets=targets.gradient,
        )
        found = back.run(report).contributions().astype(np.float64)
        back.close()
        return found

    def _closed(self, ground: Ground, compute: Compute, targets: Targets) -> Floats:
        recipe, trajectory = ground.training.recipe, ground.trajectory
        estimate = CurvatureEstimate(
            Training(recipe, compute), trajectory, samples=self.samples, core=self.core
        )
        bent = make_replay(
            EKFAC,
            ADJOINT,
            Training(recipe, compute),
            trajectory,
            ground.tracked,
            curvature=estimate.run(),
            targets=targets.gradient,
        )
        found = bent.run().contributions().astype(np.float64)
        bent.close()
        return found


def _spread(values_Qn: Floats) -> Floats:
    """Return each test sample's standard deviation over the training samples, (Q, 1)."""
    found: Floats = values_Qn.std(axis=1, keepdims=True)
    return found


def _scaled(values_Qn: Floats, size_Q1: Floats) -> Floats:
    """Return the values by their size, 0 where that is 0."""
    found: Floats = np.divide(values_Qn, size_Q1, out=np.zeros_like(values_Qn), where=size_Q1 > 0)
    return found
