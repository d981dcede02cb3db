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
from ..training.training import Training
from ..training.verified import Report, Rows
from .fast import Accumulator, Replay

TARGET_TILE = 64
"""Targets multiplied at a time, padded: a contribution's bits do not depend on the other targets."""


class Projections:
    """Sums of (scaled gradient of i, target j): what ``HypergradientBuffers`` is to the forward mode."""

    def __init__(self, rows: int, targets_KD: Tensor) -> None:
        self.count = len(targets_KD)
        missing = -self.count % TARGET_TILE
        padding = targets_KD.new_zeros(missing, targets_KD.shape[1])
        self.tiles = torch.cat([targets_KD, padding]).split(TARGET_TILE)
        self.sums = targets_KD.new_zeros(rows, self.count + missing)

    def add(self, rows: Tensor, block: Tensor, scale: Tensor) -> None:
        """Add ``scale * block @ targets^T`` to the given rows (``block`` is overwritten); see ``HypergradientBuffers.add``."""
        where = rows.to(self.sums.device)
        block *= scale.to(device=block.device, dtype=block.dtype)
        for k, tile in enumerate(self.tiles):
            self.sums[where, k * TARGET_TILE : (k + 1) * TARGET_TILE] += block @ tile.T

    def contributions(self, n_train: int) -> npt.NDArray[np.floating]:
        """Return ``-sums^T / N`` without the padding, (K, rows)."""
        result: npt.NDArray[np.floating] = np.ascontiguousarray(
            (self.sums[:, : self.count].T / -float(n_train)).cpu().numpy()
        )
        return result

    def add_factors(self, entry: int, rows: Tensor, d_R: Tensor, x_R: Tensor, scale: float) -> None:
        """Never called: no entry is factored."""
        raise AssertionError(entry)

    def add_whole(self, entry: int, rows: Tensor, block: Tensor, scale: float) -> None:
        """Never called either."""
        raise AssertionError(entry)

    def end_epoch(self) -> None:
        """Nothing is kept as factors here."""


class ProjectedReplay(Replay):
    """Replays the record once for a block of targets; see ``VerifiedReplay``.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        tracked: Train indices whose contributions are kept.
        targets_KD: Gradients of the targets at w_T.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        tracked: Rows,
        targets_KD: npt.NDArray[np.floating],
    ) -> None:
        self._targets = torch.from_numpy(np.array(targets_KD)).to(training.device)
        super().__init__(training, trajectory, tracked)

    def make_buffers(self, factored: frozenset[int]) -> Accumulator:
        """Return the sums that replace the forward mode's buffers."""
        return Projections(len(self.tracked), self._targets)

    def choose_factored(self) -> frozenset[int]:
        """Nothing: rows are multiplied at once."""
        return frozenset()

    def contributions(self, report: Report | None = None) -> npt.NDArray[np.floating]:
        """Replay and return the contributions of the tracked samples to each target, (K, n)."""
        self.replay(report)
        assert isinstance(self.buffers, Projections)
        return self.buffers.contributions(self.training.n_train)
