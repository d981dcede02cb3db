"""The EKFAC part of ``dense``: stored blocks applied as matrices, and the cut of their eigenvalues.

With k what clipping multiplied the gradient of a step with (1 where it was not clipped) and E the matrix of the
blocks, a step of SGD has ``k E du`` in the place of ``H du``. With Adam E belongs to gradients times P^1/2, and with
its stored P and rho_t

    dm <- b1 dm + (1 - b1) (s + P^-1/2 E_t P^-1/2 du),   du <- (1 - h L) du - h rho_t P dm / (1 - b1^t)

where s are the samples' own gradients, clipped, and E_t = Q min(k e + L c, limit_t) Q^T with eigenvalues e, L the
decay that is part of the gradient, c the stored diagonal for it, and

    limit_t = 0.999 (1 + b1) (2 - h L') (1 - b1^t) / ((1 - b1) h rho_t)      (L' the decay that is not)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
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

    Attributes:
        scaled: Whether there is a metric: Adam.
    """

    def __init__(self, trajectory: Trajectory, curvature: Curvature, device: torch.device) -> None:
        self.trajectory, self.blocks = trajectory, curvature.blocks
        self.matrices = [
            [None if m is None else torch.from_numpy(m).to(device) for m in (block.left, block.right)]
            for block in self.blocks
        ]
        self.core = None
        if curvature.core is not None:
            parts = (curvature.core.coordinates, curvature.core.vectors)
            self.core = tuple(torch.from_numpy(part).to(device) for part in parts)
        ends = np.ones(len(trajectory.batches), dtype=bool)
        if trajectory.updates is not None:
            ends = trajectory.updates
        self.made = np.append(0, np.cumsum(ends))  # steps of the optimiser before each batch
        self.steps = self.made[curvature.steps]
        self.entry_of = [block.entries[0] for block in self.blocks]
        self.sizes = [block.rows * block.columns for block in self.blocks]
        self.metric = curvature.metric
        self.scaled = self.metric is not None
        values = np.maximum(curvature.eigenvalues, 0.0)
        if self.metric is None:
            limits = {-1: 0.0}
            for entry in trajectory.parameters:
                if entry.group not in limits:
                    limits[entry.group] = max(0.0, largest_stable_curvature(trajectory, entry.group))
            most = [limits[trajectory.parameters[i].group] for i in self.entry_of]
            values = np.minimum(values, np.repeat(most, self.sizes))
        else:
            self.lane_of = lanes(trajectory, ends)
            scale = [
                self.metric.scale[entry.start : entry.start + math.prod(entry.shape)].reshape(entry.shape)
                for entry in trajectory.parameters
            ]
            self.scale = [torch.from_numpy(part).to(device) for part in scale]
        self.values, self.device = values, device

    def rho(self, step: int, k: int) -> float:
        """Return rho_t of parameter ``k``."""
        assert self.metric is not None
        return float(self.metric.rate[self.made[step], self.lane_of[k]])

    def _eigenvalues(self, step: int) -> npt.NDArray[np.float64]:
        trajectory = self.trajectory
        values: npt.NDArray[np.float64] = self.values[int(np.abs(self.steps - self.made[step]).argmin())]
        if trajectory.clip_factor is not None:
            values = values * min(1.0, float(trajectory.clip_factor[step]))
        if self.metric is None:
            return values
        coupled, most = [], []
        for i in self.entry_of:
            group = trajectory.parameters[i].group
            if group < 0 or not self._stepped(step, i):
                coupled.append(0.0)
                most.append(0.0)
                continue
            decay = float(trajectory.weight_decay[step, group])
            decoupled = bool(trajectory.optimizer["decoupled"][group])
            coupled.append(0.0 if decoupled else decay)
            most.append(self._most(step, i, decay if decoupled else 0.0))
        if self.metric.decay is not None:
            values = values + np.repeat(coupled, self.sizes) * self.metric.decay
        cut: npt.NDArray[np.float64] = np.minimum(values, np.repeat(most, self.sizes))
        return cut

    def _stepped(self, step: int, k: int) -> bool:
        return self.trajectory.active is None or bool(self.trajectory.active[step, k])

    def _most(self, step: int, k: int, shrink: float) -> float:
        """Return what eigenvalues of Adam's recursion are cut at in a step."""
        trajectory, group = self.trajectory, self.trajectory.parameters[k].group
        assert trajectory.beta1 is not None
        h, beta1 = (float(a[step, group]) for a in (trajectory.learning_rate, trajectory.beta1))
        before = int(np.asarray(trajectory.optimizer.get("count", np.zeros(k + 1)))[k])
        ends = np.flatnonzero(np.diff(self.made))
        count = before + sum(self._stepped(int(t), k) for t in ends[ends <= step])
        push = (1 - beta1) * h * self.rho(step, k) / (1 - beta1**count)
        return 0.999 * (1 + beta1) * (2 - h * shrink) / max(push, 1e-300)

    def apply(self, step: int, du: list[Tensor]) -> list[Tensor]:
        """Return the curvature of a step times a direction, a tensor a parameter."""
        if self.scaled:
            du = [self._over_root(u, scale) for u, scale in zip(du, self.scale, strict=True)]
        coordinates = []
        for block, (left, right) in zip(self.blocks, self.matrices, strict=True):
            matrix = torch.cat([du[i].reshape(block.rows, -1) for i in block.entries], 1)
            matrix = matrix if left is None else left.T @ matrix
            matrix = matrix if right is None else matrix @ right
            coordinates.append(matrix.reshape(-1))
        values = torch.from_numpy(self._eigenvalues(step)).to(self.device)
        bent = self._turned(self._turned(torch.cat(coordinates)) * values, back=True)
        out = [torch.zeros_like(u) for u in du]
        for block, (left, right), part in zip(
            self.blocks, self.matrices, bent.split(self.sizes), strict=True
        ):
            matrix = part.view(block.rows, block.columns)
            matrix = matrix if left is None else left @ matrix
            matrix = matrix if right is None else matrix @ right.T
            widths = [du[i].numel() // block.rows for i in block.entries]
            for i, columns in zip(block.entries, matrix.split(widths, 1), strict=True):
                out[i] = columns.reshape(du[i].shape)
        if self.scaled:
            return [self._over_root(part, scale) for part, scale in zip(out, self.scale, strict=True)]
        return out

    @staticmethod
    def _over_root(values: Tensor, scale: Tensor) -> Tensor:
        return torch.where(scale > 0, values / scale.sqrt(), torch.zeros_like(values))

    def _turned(self, coordinates: Tensor, *, back: bool = False) -> Tensor:
        if self.core is None:
            return coordinates
        index, vectors = self.core
        out = coordinates.clone()
        out[index] = coordinates[index] @ (vectors.T if back else vectors)
        return out


def lanes(trajectory: Trajectory, ends: npt.NDArray[np.bool_]) -> list[int]:
    """Return which column of rho each parameter has: its group's, or that of those stepped when it was."""
    noted = trajectory.optimizer
    count = len(trajectory.parameters)
    history = []
    for k, entry in enumerate(trajectory.parameters):
        before = (int(noted.get("count", [0] * count)[k]), bool(noted.get("begun", [False] * count)[k]))
        seen = b"" if trajectory.active is None else trajectory.active[ends][:, k].tobytes()
        history.append((entry.group, before, seen))
    optimised = [one for one in history if one[0] >= 0]
    if trajectory.active is None and len({before for _group, before, _seen in optimised}) <= 1:
        return [group for group, _before, _seen in history]
    order = list(dict.fromkeys(optimised))
    return [order.index(one) if one[0] >= 0 else -1 for one in history]


def largest_stable_curvature(trajectory: Trajectory, group: int) -> float:
    """Return what eigenvalues are cut at: 0.999 of where the step of any t would begin to grow."""
    limits = []
    for t in range(len(trajectory.learning_rate)):
        h, p, decay, damp, nesterov = step_settings(trajectory, t, group)
        scale = h * (1 - damp if p != 0 else 1.0)
        bound = 2 * (1 + p) / max(scale, 1e-300)
        limits.append(0.999 * (bound / (1 + 2 * p) if nesterov else bound) - decay)
    return min(limits)
