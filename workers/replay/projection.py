"""Adjoint mode with the Hessian dropped: contributions without storing hypergradients.

Without the Hessian the adjoint vector of a target is just c_t times the target's gradient, so a
visit's share of ``C(i, j)`` is ``-(c_t / B_t) <g_{t-1,i}, gradient_j>``: the rows that the forward
mode would add to its buffers are multiplied with the targets instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..persample.ghost import GhostProducts
from ..recipe import Batch
from ..recursion.family import Moment
from ..training.training import Training
from ..training.trials import tried_ways
from .base import HeldBatch, ProductSink
from .fast import Scaled, Scales, StepScales

TARGET_TILE = 64
"""Targets multiplied at a time, padded: a contribution's bits do not depend on the other targets."""


def padded_tiles(targets_QD: Tensor) -> tuple[Tensor, ...]:
    """Return targets in tiles of ``TARGET_TILE``, the last one filled up with zeros."""
    missing = -len(targets_QD) % TARGET_TILE
    whole = torch.cat([targets_QD, targets_QD.new_zeros(missing, targets_QD.shape[1])])
    tiles: tuple[Tensor, ...] = whole.split(TARGET_TILE)
    return tiles


def contributions_of(sums_RQ: Tensor, n_train: int) -> npt.NDArray[np.floating]:
    """Return ``-sums^T / N``, (Q, n), on the host."""
    result: npt.NDArray[np.floating] = np.ascontiguousarray((sums_RQ.T / -float(n_train)).cpu().numpy())
    return result


class Projections:
    """Sums of (scaled gradient of i, target j): what ``HypergradientBuffers`` is to the forward mode."""

    def __init__(self, rows: int, targets_QD: Tensor) -> None:
        self.count = len(targets_QD)
        self.tiles = padded_tiles(targets_QD)
        self.sums = targets_QD.new_zeros(rows, len(self.tiles) * TARGET_TILE)

    def add(self, rows: Tensor, block: Tensor, scale: float | Tensor) -> None:
        """Add ``scale * block @ targets^T`` to the given rows (``block`` is overwritten); see ``HypergradientBuffers.add``."""
        where = rows.to(self.sums.device)
        block *= scale
        for k, tile in enumerate(self.tiles):
            self.sums[:, k * TARGET_TILE : (k + 1) * TARGET_TILE].index_add_(0, where, block @ tile.T)

    def contributions(self, n_train: int) -> npt.NDArray[np.floating]:
        """Return the contributions without the padding, (Q, n)."""
        return contributions_of(self.sums[:, : self.count], n_train)


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
        self.engine = GhostProducts(
            training.recipe,
            training.model,
            training.layout,
            tried_ways(training, trajectory),
            targets_QD=torch.from_numpy(np.array(targets_QD)).to(training.device),
            tile=TARGET_TILE,
            weighed=training.family.scaled,
        )
        self._scales = Scales(training, StepScales(training, trajectory))
        self._sums = torch.zeros(rows, len(targets_QD), dtype=training.dtype, device=training.device)

    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """Note the step's coefficients."""
        super().begin(step, batch, members)
        if len(members):
            self.engine.scales = [self._scales.of_entry(i) for i in range(len(self._training.layout.entries))]

    def meet(self, step: int, moment: Callable[[], Moment], held: Sequence[HeldBatch]) -> None:
        """Note the preconditioner and the clipping of a step."""
        super().meet(step, moment, held)
        steps = self._scales.steps
        if steps.looks:
            self.engine.weigh(steps.preconditioner)
            clip = steps.clip
            self.engine.clips(None) if clip is None else self.engine.clips(
                clip.gradient, clip.share, clip.factor
            )

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the products (R, Q) of a batch."""
        self._sums.index_add_(0, rows.to(self._sums.device), block)

    def contributions(self) -> npt.NDArray[np.floating]:
        """Return the contributions; see ``Replay``."""
        return contributions_of(self._sums, self._training.n_train)
