"""The EKFAC part of ``reference_dense``: stored blocks applied as matrices, and the cut of their eigenvalues."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..storage.curvature import Curvature
from ..storage.trajectory import Trajectory


def step_settings(trajectory: Trajectory, step: int, group: int) -> tuple[float, float, float, float, bool]:
    """Return (learning rate, momentum, weight decay, dampening, Nesterov) of a step as recorded."""
    names = ("learning_rate", "momentum", "weight_decay", "dampening")
    h, p, decay, damp = (float(getattr(trajectory, name)[step, group]) for name in names)
    return h, p, decay, damp, bool(trajectory.nesterov[step, group])


class DenseCurvature:
    """The curvature of ``--hessian ekfac`` as a matrix product: ``left ((left^T M right) * values) right^T``."""

    def __init__(self, trajectory: Trajectory, curvature: Curvature, device: torch.device) -> None:
        self.blocks, self.steps = curvature.blocks, curvature.steps
        self.matrices = [
            [None if m is None else torch.from_numpy(m).to(device) for m in (block.left, block.right)]
            for block in self.blocks
        ]
        self.values: list[Tensor] = []
        start = 0
        for block in self.blocks:
            stop = start + block.rows * block.columns
            group = trajectory.parameters[block.entries[0]].group
            limit = largest_stable_curvature(trajectory, group) if group >= 0 else 0.0
            values = np.clip(curvature.eigenvalues[:, start:stop], 0.0, max(limit, 0.0))
            self.values.append(torch.from_numpy(values).view(-1, block.rows, block.columns).to(device))
            start = stop

    def apply(self, step: int, du: list[Tensor]) -> list[Tensor]:
        """Return the curvature of a step times a direction, a tensor a parameter."""
        nearest = int(np.abs(self.steps - step).argmin())
        out = [torch.zeros_like(u) for u in du]
        for block, (left, right), values in zip(self.blocks, self.matrices, self.values, strict=True):
            parts = [du[i].reshape(block.rows, -1) for i in block.entries]
            matrix = torch.cat(parts, 1)
            matrix = matrix if left is None else left.T @ matrix
            matrix = matrix if right is None else matrix @ right
            matrix = matrix * values[nearest]
            matrix = matrix if left is None else left @ matrix
            matrix = matrix if right is None else matrix @ right.T
            widths = [part.shape[1] for part in parts]
            for i, part in zip(block.entries, matrix.split(widths, 1), strict=True):
                out[i] = part.reshape(du[i].shape)
        return out


def largest_stable_curvature(trajectory: Trajectory, group: int) -> float:
    """Return what eigenvalues are cut at: 0.999 of where the step of any t would begin to grow."""
    limits = []
    for t in range(len(trajectory.learning_rate)):
        h, p, decay, damp, nesterov = step_settings(trajectory, t, group)
        scale = h * (1 - damp if p != 0 else 1.0)
        bound = 2 * (1 + p) / max(scale, 1e-300)
        limits.append(0.999 * (bound / (1 + 2 * p) if nesterov else bound) - decay)
    return min(limits)
