"""Exact forward mode: two tangents a tracked sample, the Hessian kept (Eq. 10-11 and 33-34).

    dm_t = p dm_{t-1} + k (H du_{t-1} + L du_{t-1} + 1[i in batch t] (N / B_t) g_{t-1,i})
    du_t = du_{t-1} - h (a dm_t + b (...))

One Hessian-vector product a tracked sample and step: the gold standard, at its price. Rows are worked
on in padded tiles (see ``hessian_tiles``), and a row's bits do not depend on the others.
"""

from __future__ import annotations

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
from ..training.verified import Report, Rows, VerifiedReplay


class Tangents:
    """(n, D) buffers of du and dm."""

    def __init__(self, rows: int, dimension: int, dtype: torch.dtype, device: torch.device) -> None:
        self.weights = torch.zeros(rows, dimension, dtype=dtype, device=device)
        self.momentum = torch.zeros(rows, dimension, dtype=dtype, device=device)

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows on the host."""
        array: npt.NDArray[np.floating] = self.weights[start:stop].cpu().numpy()
        return array


class ExactReplay(VerifiedReplay):
    """Replays the record and carries exact tangents; see ``VerifiedReplay`` for the arguments.

    The training's ``batch_norm`` must be ``coupled``: the exact form differentiates through the
    batch statistics.
    """

    def __init__(self, training: Training, trajectory: Trajectory, tracked: Rows) -> None:
        assert training.compute.batch_norm == "coupled"
        super().__init__(training, trajectory, tracked)
        layout = training.layout
        self._linear = LinearSteps(
            recorded_settings(trajectory), Columns(layout, training.dtype, training.device)
        )
        self.engine = PerSampleGradients(
            training.recipe, training.model, layout, tried_ways(training, trajectory)
        )
        self.buffers = Tangents(len(tracked), layout.dimension, training.dtype, training.device)
        self.tiles = HessianTiles(training, alone=True)
        self._touched = np.zeros(len(tracked), dtype=bool)

    def run(self, report: Report | None = None) -> Tangents:
        """Replay every step and return the buffers; raises as ``VerifiedReplay.replay``."""
        self.replay(report)
        return self.buffers

    def step(self, step: int, batch: Batch, rows: Rows) -> None:
        """Move every tangent by the linearised step, then train and add the members' own gradients."""
        training, tangents = self.training, self.buffers
        carry, gain, along, direct, decay = self._linear.at(step)
        moving = np.flatnonzero(self._touched)
        if len(moving):
            second = self.tiles.at(step, batch)
            for start in range(0, len(moving), TILE):
                chosen = torch.from_numpy(moving[start : start + TILE]).to(training.device)
                du, dm = tangents.weights[chosen], tangents.momentum[chosen]
                source = torch.empty_like(du)
                second.tile(du, source)
                source.add_(decay * du)
                dm.mul_(carry).add_(gain * source)
                tangents.momentum[chosen] = dm
                tangents.weights[chosen] = du - (along * dm + direct * source)
            del second  # the graph must be gone before the optimiser moves the weights
        positions = np.flatnonzero(rows >= 0)
        members = torch.from_numpy(rows[positions]).to(training.device)
        share = training.n_train / training.batch_size(step)

        def add(start: int, block: Tensor) -> None:
            chosen = members[start : start + len(block)]
            source = block * share
            tangents.momentum[chosen] += gain * source
            tangents.weights[chosen] -= (along * gain + direct) * source

        watch = self.engine.watch(torch.from_numpy(positions).to(training.device), add)
        loss = training.step(step, batch, watch if len(positions) else None)
        training.check_finite(step, float(loss))
        self._touched[rows[positions]] = True
