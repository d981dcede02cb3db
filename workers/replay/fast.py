"""Replay, Hessian dropped: hypergradients of the tracked samples from the steps that train.

Per tracked sample i of the shard: ``sum_t c_t (N / B_t) g_{t-1,i}`` (see ``coefficients``), with
g taken from the hooks of the very step that trains.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..model.layout import Layout
from ..persample.engine import PerSampleGradients, Ways
from ..recipe import Batch
from ..training.training import Training
from ..training.trials import tried_ways
from ..training.verified import Report, Rows, VerifiedReplay
from .buffers import HypergradientBuffers, factor_slots


class Accumulator(Protocol):
    """What a replay adds scaled per-sample gradients to; see ``HypergradientBuffers``."""

    def add(self, rows: Tensor, block: Tensor, scale: Tensor) -> None:
        """Add ``scale * block`` to the given rows."""

    def add_factors(self, entry: int, rows: Tensor, d_R: Tensor, x_R: Tensor, scale: float) -> None:
        """Add a Linear weight's gradients, given as factors."""

    def add_whole(self, entry: int, rows: Tensor, block: Tensor, scale: float) -> None:
        """Add the gradients of such a weight where a step does not give them as factors."""

    def end_epoch(self) -> None:
        """Called when every sample has been visited once more."""


class Replay(VerifiedReplay):
    """One replay of a recorded trajectory for one set of tracked samples; see ``VerifiedReplay``."""

    def __init__(self, training: Training, trajectory: Trajectory, tracked: Rows) -> None:
        super().__init__(training, trajectory, tracked)
        layout = training.layout
        self.ways = tried_ways(training, trajectory)
        factored = self.choose_factored()
        self.engine = PerSampleGradients(training.recipe, training.model, layout, self.ways, factored)
        self.buffers = self.make_buffers(factored)
        self._one_scale = len({e.group for e in layout.entries}) == 1
        dense = [i for i in range(len(layout.entries)) if i not in factored]
        groups = [torch.full((layout.size(i),), layout.entries[i].group) for i in dense]
        self._groups = torch.cat([torch.zeros(0, dtype=torch.int64), *groups]).to(training.device)

    def choose_factored(self) -> frozenset[int]:
        """Return the entries whose visits are kept as factors."""
        return factored_entries(self.training.layout, self.ways, self.training.recipe.epochs)

    def make_buffers(self, factored: frozenset[int]) -> Accumulator:
        """Return what adds up the scaled gradients."""
        return HypergradientBuffers(
            len(self.tracked),
            self.training.layout,
            factored,
            self.engine.columns,
            self.training.recipe.epochs,
            self.training.dtype,
            self.training.device,
        )

    def run(self, report: Report | None = None) -> HypergradientBuffers:
        """Replay every step and return the buffers; raises as ``VerifiedReplay.replay``."""
        self.replay(report)
        assert isinstance(self.buffers, HypergradientBuffers)
        return self.buffers

    def end_epoch(self) -> None:
        """Let the buffers fold their factors."""
        self.buffers.end_epoch()

    def step(self, step: int, batch: Batch, rows: Rows) -> None:
        """Train, and add the tracked members' scaled gradients to the buffers."""
        training = self.training
        positions = np.flatnonzero(rows >= 0)
        if not len(positions):
            training.step(step, batch)
            return
        per_group = self.trajectory.coefficient[step] * (training.n_train / training.batch_size(step))
        scale = self._scale(per_group)
        numbers = torch.from_numpy(rows[positions])

        def add(start: int, block: Tensor) -> None:
            self.buffers.add(numbers[start : start + len(block)], block, scale)

        def note(entry: int, d_R: Tensor, x_R: Tensor | None) -> None:
            group = training.layout.entries[entry].group
            factor = float(per_group[group]) if group >= 0 else 0.0
            if x_R is None:
                self.buffers.add_whole(entry, numbers, d_R, factor)
            else:
                self.buffers.add_factors(entry, numbers, d_R, x_R, factor)

        watch = self.engine.watch(torch.from_numpy(positions).to(training.device), add, note)
        loss = training.step(step, batch, watch)
        if training.device.type == "cpu":
            training.check_finite(step, float(loss))

    def _scale(self, per_group: npt.NDArray[np.float64]) -> Tensor:
        """Return c_t N / B_t: (1,) when all parameters share one group, else one per dense column."""
        values = torch.from_numpy(per_group)
        if self._one_scale:
            group = self.training.layout.entries[0].group
            return values[group : group + 1]
        # Group -1 (not optimised) picks the appended zero.
        table = torch.cat([values, values.new_zeros(1)]).to(self.training.device)
        return table[self._groups].to(self.training.dtype)


def factored_entries(layout: Layout, ways: Ways, epochs: int) -> frozenset[int]:
    """Return the weights whose visits are kept as factors (see ``buffers``)."""
    return frozenset(
        i
        for i, strategy in enumerate(ways.strategies)
        if strategy == "outer" and factor_slots(layout.entries[i].shape, epochs)
    )
