"""Adjoint mode with the Hessian dropped: contributions without storing hypergradients.

Without the Hessian the adjoint vector of a target is just c_t times the target's gradient, so a
visit's share of ``C(i, j)`` is ``-(c_t / B_t) <g_{t-1,i}, gradient_j>``: the rows that the forward
mode would add to its buffers are multiplied with the targets instead.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..persample.engine import PerSampleGradients
from ..training.training import Training
from ..training.trials import tried_ways
from .base import ProductSink
from .fast import Scaled, Scales, StepScales

TARGET_TILE = 64
"""Targets multiplied at a time, padded: a contribution's bits do not depend on the other targets."""


class Projections:
    """Sums of (scaled gradient of i, target j): what ``HypergradientBuffers`` is to the forward mode."""

    def __init__(self, rows: int, targets_QD: Tensor) -> None:
        self.count = len(targets_QD)
        missing = -self.count % TARGET_TILE
        padding = targets_QD.new_zeros(missing, targets_QD.shape[1])
        self.tiles = torch.cat([targets_QD, padding]).split(TARGET_TILE)
        self.sums = targets_QD.new_zeros(rows, self.count + missing)

    def add(self, rows: Tensor, block: Tensor, scale: float | Tensor) -> None:
        """Add ``scale * block @ targets^T`` to the given rows (``block`` is overwritten); see ``HypergradientBuffers.add``."""
        where = rows.to(self.sums.device)
        block *= scale
        for k, tile in enumerate(self.tiles):
            self.sums[:, k * TARGET_TILE : (k + 1) * TARGET_TILE].index_add_(0, where, block @ tile.T)

    def contributions(self, n_train: int) -> npt.NDArray[np.floating]:
        """Return ``-sums^T / N`` without the padding, (Q, n)."""
        result: npt.NDArray[np.floating] = np.ascontiguousarray(
            (self.sums[:, : self.count].T / -float(n_train)).cpu().numpy()
        )
        return result


class FastProducts(Scaled, ProductSink):
    """Products of the scaled gradients with a block of targets; see ``Replay``.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        rows: n.
        targets_QD: Gradients of the targets at w_T.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        rows: int,
        targets_QD: npt.NDArray[np.floating],
    ) -> None:
        self._training = training
        ways = tried_ways(training, trajectory)
        self.engine = PerSampleGradients(training.recipe, training.model, training.layout, ways)
        self.sums = Projections(rows, torch.from_numpy(np.array(targets_QD)).to(training.device))
        self._scales = Scales(training, StepScales(training, trajectory))

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the products of the scaled gradients."""
        self._scales.steps.clip_(block)
        self.sums.add(rows, block, self._scales.block())

    def contributions(self) -> npt.NDArray[np.floating]:
        """Return the contributions; see ``Replay``."""
        return self.sums.contributions(self._training.n_train)
