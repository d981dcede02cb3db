"""The recursion with curvature in EKFAC form: replay in the eigenbasis, forward or adjoint.

In a fixed eigenbasis the recursion is diagonal and the closed form of ``fast`` holds with one
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
from ..persample.engine import TILE, PerSampleGradients
from ..recipe import Batch
from ..recursion.coefficients import recorded_settings
from ..recursion.eigencoefficients import EigenCoefficients
from ..training.training import Training
from ..training.trials import tried_ways
from .base import ProductSink, RowSink, share
from .projection import Projections


class Turned:
    """What both sinks share: the eigenbasis, its coefficients, and the engine that gives rotated rows.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        curvature: Basis and eigenvalues.
    """

    def __init__(self, training: Training, trajectory: Trajectory, curvature: Curvature) -> None:
        self.training, layout = training, training.layout
        self.basis = Eigenbasis(curvature.blocks, layout, training.dtype, training.device, curvature.core)
        self.coefficients = EigenCoefficients(
            recorded_settings(trajectory),
            self.basis.groups(),
            curvature.eigenvalues,
            curvature.steps,
            training.device,
            training.dtype,
        )
        self.engine: PerSampleGradients = EigenGradients(
            training.recipe, training.model, layout, tried_ways(training, trajectory), self.basis
        )

    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """Note the step's coefficients, one an eigendirection."""
        if len(members):
            self.scale = self.coefficients.at(step) * share(self.training, step)


class EkfacRows(Turned, RowSink):
    """Dense sums of rows in the eigenbasis; see ``Replay`` and ``Turned``."""

    def __init__(self, training: Training, trajectory: Trajectory, rows: int, curvature: Curvature) -> None:
        super().__init__(training, trajectory, curvature)
        like = torch.empty(0, dtype=training.dtype, device=training.device)
        self.sums = like.new_zeros(-(-rows // TILE) * TILE, training.layout.dimension)

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the scaled rows."""
        if self.sums.device.type != "cpu":
            self.sums.index_add_(0, rows.to(self.sums.device), block.mul_(self.scale))
            return
        for row, gradient in zip(rows.tolist(), block, strict=True):  # one pass through memory, not two
            self.sums[row].addcmul_(gradient, self.scale)

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows in parameter order, on the host; see ``Replay``."""
        parts = []
        for tile in range(start - start % TILE, stop, TILE):  # whole tiles: the same bits for any shard
            turned = self.basis.to_parameters(self.sums[tile : tile + TILE])
            parts.append(turned[max(start - tile, 0) : stop - tile])
        array: npt.NDArray[np.floating] = torch.cat(parts).cpu().numpy()
        return array


class EkfacProducts(Turned, ProductSink):
    """Products of the scaled rows with turned targets; see ``Replay`` and ``Turned``.

    Args:
        targets_QD: Gradients of the targets at w_T.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        rows: int,
        curvature: Curvature,
        targets_QD: npt.NDArray[np.floating],
    ) -> None:
        super().__init__(training, trajectory, curvature)
        targets = torch.from_numpy(np.array(targets_QD)).to(training.device)
        self.sums = Projections(rows, self.basis.to_eigen(targets))

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the products of the scaled rows."""
        self.sums.add(rows, block, self.scale)

    def contributions(self) -> npt.NDArray[np.floating]:
        """Return the contributions; see ``Replay``."""
        return self.sums.contributions(self.training.n_train)
