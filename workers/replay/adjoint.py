"""Adjoint mode: contributions of all training samples at once, a few trainings a target.

From w_T back to w_0, for each target j with a_u = d loss_j / d w_T and a_m = 0 (the step being
m' = p m + k r, w' = w - h (s m' + q r), r = gradient + L w):

    a_m' = a_m - h s a_u;   v = k a_m' - h q a_u
    C(i, j) = -sum over the steps whose batch holds i of  <g_{t-1,i}, v> / B_t
    a_u <- a_u + L v + H v;   a_m <- p a_m'

Both products come out of one pass for a tile of targets (see ``second_order``). The weights of each
step are had by replaying segments between the record's checkpoints, halved until one fits in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..hessian.tiles import TILE, HessianTiles
from ..model.layout import load_flat
from ..model.state import Kept, kept_buffers, load_buffers, pack_buffers, put_back
from ..recipe import Batch
from ..recursion.coefficients import Settings, recorded_settings
from ..recursion.columns import Columns, LinearSteps
from ..training.training import Training
from ..training.verified import Report, Rows, VerifiedReplay

SEGMENT_BYTES = 512 << 20
"""Weights of a segment that are kept in memory at a time."""


_Held: TypeAlias = tuple[int, Tensor, Kept, Batch]
"""(step, weights and buffers before it, its batch)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """Where training stands before ``step``: enough to go on from there with the same bits."""

    step: int
    weights: Tensor
    momentum: Tensor
    exists: list[bool]
    buffers: bytes


class Adjoint(VerifiedReplay):
    """Carries target vectors backwards through a recorded trajectory; see ``VerifiedReplay``.

    Args:
        training: A fresh ``Training`` of the recipe, ``batch_norm`` coupled.
        trajectory: The record.
        tracked: Train indices whose contributions are kept, in the order of the result's columns.
        targets_QD: Gradients of the targets at w_T; left as they are. They are worked on ``TILE`` at a
            time from the first; the bits of a target are those of its tile.
        settings: Of the recursion, where they are not the record's; the training keeps those.
        share: Of the Hessian in the products; see ``HessianTiles``.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        tracked: Rows,
        targets_QD: npt.NDArray[np.floating],
        settings: Settings | None = None,
        *,
        share: float = 1.0,
    ) -> None:
        assert training.compute.batch_norm == "coupled"
        super().__init__(training, trajectory, tracked)
        self._targets = targets_QD
        columns = Columns(training.layout.column_groups(), training.dtype, training.device)
        self._linear = LinearSteps(settings or recorded_settings(trajectory), columns)
        self.tiles = HessianTiles(training, transposed=True, share=share)
        row = training.layout.dimension * training.dtype.itemsize
        self.held_steps = max(1, SEGMENT_BYTES // row)
        self._held: list[_Held] | None = None

    def run(self, report: Report | None = None) -> Self:
        """Carry the targets back to the first step.

        Args:
            report: Told of (steps done, T).

        Raises:
            ReplayDiverged, NonFiniteLoss: See ``VerifiedReplay.replay``.
        """
        training = self.training
        on_weight = torch.from_numpy(np.array(self._targets)).to(training.device)
        on_momentum = torch.zeros_like(on_weight)
        out = torch.zeros(len(on_weight), len(self.tracked) + 1, dtype=training.dtype, device=training.device)
        for done, (step, weights, state, batch) in enumerate(self._backwards(), start=1):
            with torch.no_grad():
                load_flat(training.parameters, weights)
            put_back(state)
            self._back_step(step, batch, on_weight, on_momentum, out)
            if report:
                report(done, training.steps)
        self._found: npt.NDArray[np.floating] = out[:, :-1].cpu().numpy()
        return self

    def contributions(self) -> npt.NDArray[np.floating]:
        """Return the contributions of the tracked samples to each target, (Q, n)."""
        return self._found

    def told(self) -> dict[str, Any]:
        """Return how the products were had."""
        return self.tiles.told()

    def close(self) -> None:
        """Nothing is hooked to the model."""

    def _back_step(
        self, step: int, batch: Batch, on_weight: Tensor, on_momentum: Tensor, out: Tensor
    ) -> None:
        carry, gain, along, direct, decay = self._linear.at(step)
        # Members that are not tracked (-1) fall into the last, discarded column.
        columns = torch.from_numpy(self.rows(step)).to(out.device)
        second = self.tiles.at(step, batch)
        share = 1.0 / self.training.batch_size(step)
        for start in range(0, len(on_weight), TILE):
            tile = slice(start, start + TILE)
            a_u, a_m, sums = on_weight[tile], on_momentum[tile], out[tile]
            a_m.sub_(along * a_u)
            v = gain * a_m - direct * a_u
            product = torch.empty_like(v)
            sums[:, columns] -= second.tile(v, product) * share
            a_u.add_(product).add_(decay * v)
            a_m.mul_(carry)

    def _backwards(self) -> Iterator[_Held]:
        """Yield (step, weights and buffers before it, its batch) from the last step to the first."""
        stop = self.training.steps
        for k in range(len(self.trajectory.checkpoint_steps) - 2, -1, -1):
            kept = self.trajectory.checkpoint(k)
            start = _State(
                step=kept.step,
                weights=torch.from_numpy(kept.weights),
                momentum=torch.from_numpy(kept.momentum),
                exists=kept.has_momentum.tolist(),
                buffers=kept.buffers,
            )
            yield from self._segment(start, stop)
            stop = kept.step

    def _segment(self, start: _State, stop: int) -> Iterator[_Held]:
        if stop - start.step > self.held_steps:
            middle = start.step + (stop - start.step) // 2
            self._restore(start)
            self.advance(middle)
            yield from self._segment(self._state(middle), stop)
            yield from self._segment(start, middle)
            return
        held: list[_Held] = []
        self._restore(start)
        self._held = held
        self.advance(stop)
        self._held = None
        while held:
            yield held.pop()

    def step(self, step: int, batch: Batch, rows: Rows) -> Tensor:
        """Train, and note what the way back needs."""
        if self._held is not None:
            self._held.append((step, self.training.weights().clone(), self._state_of_layers(), batch))
        return self.training.step(step, batch)

    def _state_of_layers(self) -> Kept:
        """Return copies of the buffers that a step both moves and reads; batch statistics are not read."""
        training = self.training
        return kept_buffers(training.model, statistics=False) if training.keeps_state else []

    def _state(self, step: int) -> _State:
        momentum, exists = self.training.momentum()
        return _State(
            step=step,
            weights=self.training.weights().clone(),
            momentum=momentum.clone(),
            exists=exists,
            buffers=pack_buffers(self.training.model),
        )

    def _restore(self, state: _State) -> None:
        training = self.training
        load_flat(training.parameters, state.weights.to(training.device))
        load_buffers(training.model, state.buffers)
        training.load_momentum(state.momentum.cpu().numpy(), state.exists)
        self.done = state.step
