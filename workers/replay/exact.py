"""Exact forward mode: two tangents a tracked sample, the Hessian kept (Eq. 10-11 and 33-34).

    r  = H du + L du + 1[i in batch t] (N / B_t) g_{t-1,i}
    dm <- p dm + k r
    du <- du - h (s dm + q r)

One Hessian-vector product a tracked sample and step: the gold standard, at its price. Rows are worked
on in padded tiles (see ``hessian.tiles``), and a row's bits do not depend on the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..hessian.tiles import TILE, HessianTiles
from ..persample.engine import PerSampleGradients
from ..recipe import Batch
from ..recursion.coefficients import recorded_settings
from ..recursion.columns import Columns, LinearSteps
from ..training.training import Training
from ..training.trials import tried_ways
from .base import RowSink, share


class ExactRows(RowSink):
    """(n, D) buffers of du and dm; see ``Replay``.

    The training's ``batch_norm`` must be ``coupled``: the exact form differentiates through the
    batch statistics.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        rows: n.
        share: Of the Hessian in the products; see ``HessianTiles``.
    """

    def __init__(self, training: Training, trajectory: Trajectory, rows: int, *, share: float = 1.0) -> None:
        assert training.compute.batch_norm == "coupled"
        self.training, layout = training, training.layout
        columns = Columns(layout.column_groups(), training.dtype, training.device)
        self._linear = LinearSteps(recorded_settings(trajectory), columns)
        self.engine = PerSampleGradients(
            training.recipe, training.model, layout, tried_ways(training, trajectory)
        )
        self.weights = torch.zeros(rows, layout.dimension, dtype=training.dtype, device=training.device)
        self.momentum = torch.zeros_like(self.weights)
        self.tiles = HessianTiles(training, alone=True, share=share)
        self._touched = torch.zeros(rows, dtype=torch.bool)

    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """Move every tangent by the linearised step."""
        carry, gain, along, direct, decay = self._linear.at(step)
        moving = torch.nonzero(self._touched).flatten()
        if len(moving):
            second = self.tiles.at(step, batch)
            for start in range(0, len(moving), TILE):
                chosen = moving[start : start + TILE].to(self.training.device)
                du, dm = self.weights[chosen], self.momentum[chosen]
                source = torch.empty_like(du)
                second.tile(du, source)
                source.add_(decay * du)
                dm.mul_(carry).add_(gain * source)
                self.momentum[chosen] = dm
                self.weights[chosen] = du - (along * dm + direct * source)
        # The graph of the products is gone with this call, before the optimiser moves the weights.
        self._touched[members] = True
        self._share, self._gain, self._step = share(self.training, step), gain, along * gain + direct

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the members' own gradients."""
        chosen = rows.to(self.training.device)
        source = block * self._share
        self.momentum[chosen] += self._gain * source
        self.weights[chosen] -= self._step * source

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows on the host; see ``Replay``."""
        array: npt.NDArray[np.floating] = self.weights[start:stop].cpu().numpy()
        return array

    def told(self) -> dict[str, Any]:
        """Return how the gradients and the products were had."""
        return super().told() | self.tiles.told()
