"""The recursion with curvature in EKFAC form: replay in the eigenbasis, forward or adjoint.

In a fixed eigenbasis the recursion is diagonal and the closed form of ``replay`` holds with one
coefficient an eigendirection: ``sum_t c_t(eigenvalue) (N / B_t) (rotated g_{t-1,i})``, rotated back
at the end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.curvature import Curvature
from ...storage.trajectory import Trajectory
from ..ekfac.eigenbasis import Eigenbasis
from ..ekfac.eigengradients import EigenGradients
from ..persample.engine import TILE
from ..recipe import Batch
from ..recursion.coefficients import recorded_settings
from ..recursion.eigencoefficients import EigenCoefficients
from ..training.training import Training
from ..training.trials import tried_ways
from ..training.verified import Report, Rows, VerifiedReplay
from .projection import Projections


class _Rows:
    """Dense sums of rows in the eigenbasis: what ``Projections`` is to the adjoint mode."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.sums = like.new_zeros(-(-rows // TILE) * TILE, like.shape[-1])

    def add(self, rows: Tensor, block: Tensor, scale: Tensor) -> None:
        if self.sums.device.type != "cpu":
            self.sums.index_add_(0, rows.to(self.sums.device), block.mul_(scale))
            return
        for row, gradient in zip(rows.tolist(), block, strict=True):  # one pass through memory, not two
            self.sums[row].addcmul_(gradient, scale)


class EkfacReplay(VerifiedReplay):
    """Replays the record with EKFAC curvature; see ``VerifiedReplay`` for the first arguments.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        tracked: Train indices.
        curvature: Basis and eigenvalues.
        targets_KD: In adjoint mode the gradients of the targets at w_T; None: forward mode.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        tracked: Rows,
        curvature: Curvature,
        targets_KD: npt.NDArray[np.floating] | None = None,
    ) -> None:
        super().__init__(training, trajectory, tracked)
        layout = training.layout
        self.basis = Eigenbasis(curvature.blocks, layout, training.dtype, training.device, curvature.core)
        self.coefficients = EigenCoefficients(
            recorded_settings(trajectory),
            self.basis.groups(),
            curvature.eigenvalues,
            curvature.steps,
            training.device,
            training.dtype,
        )
        self.engine = EigenGradients(
            training.recipe, training.model, layout, tried_ways(training, trajectory), self.basis
        )
        like = torch.empty(0, layout.dimension, dtype=training.dtype, device=training.device)
        if targets_KD is None:
            self.sums: _Rows | Projections = _Rows(len(tracked), like)
        else:
            targets = torch.from_numpy(np.array(targets_KD)).to(training.device)
            self.sums = Projections(len(tracked), self.basis.to_eigen(targets))

    def step(self, step: int, batch: Batch, rows: Rows) -> None:
        """Train, and add the tracked members' rotated, scaled gradients to the sums."""
        training = self.training
        positions = np.flatnonzero(rows >= 0)
        if not len(positions):
            training.step(step, batch)
            return
        scale = self.coefficients.at(step) * (training.n_train / training.batch_size(step))
        numbers = torch.from_numpy(rows[positions])

        def add(start: int, block: Tensor) -> None:
            self.sums.add(numbers[start : start + len(block)], block, scale)

        watch = self.engine.watch(torch.from_numpy(positions).to(training.device), add)
        loss = training.step(step, batch, watch)
        training.check_finite(step, float(loss))

    def run(self, report: Report | None = None) -> EkfacReplay:
        """Replay every step; raises as ``VerifiedReplay.replay``."""
        self.replay(report)
        return self

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows (stop - start, D) in parameter order, on the host (forward mode)."""
        assert isinstance(self.sums, _Rows)
        parts = []
        for tile in range(start - start % TILE, stop, TILE):  # whole tiles: the same bits for any shard
            turned = self.basis.to_parameters(self.sums.sums[tile : tile + TILE])
            parts.append(turned[max(start - tile, 0) : stop - tile])
        array: npt.NDArray[np.floating] = torch.cat(parts).cpu().numpy()
        return array

    def contributions(self) -> npt.NDArray[np.floating]:
        """Return the contributions of the tracked samples to each target, (K, n) (adjoint mode)."""
        assert isinstance(self.sums, Projections)
        return self.sums.contributions(self.training.n_train)
