"""The EKFAC part of ``dense``: stored blocks applied as matrices, and the cut of their eigenvalues."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...storage.curvature import Curvature
from ...storage.trajectory import Trajectory


def step_settings(trajectory: Trajectory, step: int, group: int) -> tuple[float, float, float, float, bool]:
    """Return (learning rate, momentum, weight decay, dampening, Nesterov) of a step as recorded."""
    names = ("learning_rate", "momentum", "weight_decay", "dampening")
    h, p, decay, damp = (float(getattr(trajectory, name)[step, group]) for name in names)
    return h, p, decay, damp, bool(trajectory.nesterov[step, group])


class DenseCurvature:
    """The curvature of ``--hessian ekfac`` as matrix products, in the order of ``storage.curvature``.

    Each block M of a direction becomes ``left^T M right``, the core's coordinates x among them
    ``x vectors``; then all are multiplied with their eigenvalues, and go the same way back.
    """

    def __init__(self, trajectory: Trajectory, curvature: Curvature, device: torch.device) -> None:
        self.blocks, self.steps = curvature.blocks, curvature.steps
        self.matrices = [
            [None if m is None else torch.from_numpy(m).to(device) for m in (block.left, block.right)]
            for block in self.blocks
        ]
        self.core = None
        if curvature.core is not None:
            parts = (curvature.core.coordinates, curvature.core.vectors)
            self.core = tuple(torch.from_numpy(part).to(device) for part in parts)
        cut, start = [], 0
        for block in self.blocks:
            stop = start + block.rows * block.columns
            group = trajectory.parameters[block.entries[0]].group
            limit = largest_stable_curvature(trajectory, group) if group >= 0 else 0.0
            cut.append(np.clip(curvature.eigenvalues[:, start:stop], 0.0, max(limit, 0.0)))
            start = stop
        self.values = torch.from_numpy(np.concatenate(cut, 1)).to(device)

    def apply(self, step: int, du: list[Tensor]) -> list[Tensor]:
        """Return the curvature of a step times a direction, a tensor a parameter."""
        coordinates = []
        for block, (left, right) in zip(self.blocks, self.matrices, strict=True):
            matrix = torch.cat([du[i].reshape(block.rows, -1) for i in block.entries], 1)
            matrix = matrix if left is None else left.T @ matrix
            matrix = matrix if right is None else matrix @ right
            coordinates.append(matrix.reshape(-1))
        values = self.values[int(np.abs(self.steps - step).argmin())]
        bent = self._turned(self._turned(torch.cat(coordinates)) * values, back=True)
        out = [torch.zeros_like(u) for u in du]
        sizes = [block.rows * block.columns for block in self.blocks]
        for block, (left, right), part in zip(self.blocks, self.matrices, bent.split(sizes), strict=True):
            matrix = part.view(block.rows, block.columns)
            matrix = matrix if left is None else left @ matrix
            matrix = matrix if right is None else matrix @ right.T
            widths = [du[i].numel() // block.rows for i in block.entries]
            for i, columns in zip(block.entries, matrix.split(widths, 1), strict=True):
                out[i] = columns.reshape(du[i].shape)
        return out

    def _turned(self, coordinates: Tensor, *, back: bool = False) -> Tensor:
        if self.core is None:
            return coordinates
        index, vectors = self.core
        out = coordinates.clone()
        out[index] = coordinates[index] @ (vectors.T if back else vectors)
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
