"""The Hessian dropped: hypergradients of the tracked samples from the steps that train.

Per tracked sample i of the shard: ``sum_t c_t (N / B_t) g_{t-1,i}`` (see ``coefficients``), with
g taken from the hooks of the very step that trains.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..model.layout import Layout
from ..persample.engine import PerSampleGradients
from ..persample.ways import Ways
from ..recipe import Batch
from ..recursion.columns import Columns
from ..training.training import Training
from ..training.trials import tried_ways
from .base import RowSink, share
from .buffers import HypergradientBuffers, factor_slots


class FastRows(RowSink):
    """Sums of scaled gradients, Linear weights as factors where that is less; see ``Replay``."""

    def __init__(self, training: Training, trajectory: Trajectory, rows: int) -> None:
        ways = tried_ways(training, trajectory)
        layout, epochs = training.layout, training.recipe.epochs
        factored = factored_entries(layout, ways, epochs)
        self.engine = PerSampleGradients(training.recipe, training.model, layout, ways, factored)
        self.buffers = HypergradientBuffers(
            rows, layout, factored, self.engine.columns, epochs, training.dtype, training.device
        )
        self._scales = Scales(training, trajectory, factored)

    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """Note the step's coefficients."""
        if len(members):
            self._scales.begin(step)

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the scaled gradients to the dense rows."""
        self.buffers.add(rows, block, self._scales.block)

    def add_factors(self, entry: int, rows: Tensor, d_R: Tensor, x_R: Tensor | None) -> None:
        """Note a visit of a factored entry."""
        scale = self._scales.of_entry(entry)
        if x_R is None:
            self.buffers.add_whole(entry, rows, d_R, scale)
        else:
            self.buffers.add_factors(entry, rows, d_R, x_R, scale)

    def end_epoch(self) -> None:
        """Let the buffers fold their factors."""
        self.buffers.end_epoch()

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows on the host; see ``Replay``."""
        return self.buffers.numpy(start, stop)


class Scales:
    """Gives c_t N / B_t of the step that was begun last.

    Args:
        training: The training that is replayed.
        trajectory: The record.
        factored: Entries that are no columns of the blocks.

    Attributes:
        block: One number where all parameters share a group, else one per column of the blocks.
    """

    block: float | Tensor

    def __init__(
        self, training: Training, trajectory: Trajectory, factored: frozenset[int] = frozenset()
    ) -> None:
        self._training, self._trajectory = training, trajectory
        layout = training.layout
        groups = {entry.group for entry in layout.entries}
        self._group = groups.pop() if len(groups) == 1 else None
        columns = [layout.column_groups()[:0]]
        for i, entry in enumerate(layout.entries):
            if i not in factored:
                columns.append(torch.full((layout.size(i),), entry.group))
        self._columns = Columns(torch.cat(columns), training.dtype, training.device)

    def begin(self, step: int) -> None:
        """Stand at a step."""
        self._per_group = self._trajectory.coefficient[step] * share(self._training, step)
        one = self._group is not None
        self.block = float(self._per_group[self._group]) if one else self._columns.whole(self._per_group)

    def of_entry(self, entry: int) -> float:
        """Return the number of one parameter; 0 where it is not optimised."""
        group = self._training.layout.entries[entry].group
        return float(self._per_group[group]) if group >= 0 else 0.0


def factored_entries(layout: Layout, ways: Ways, epochs: int) -> frozenset[int]:
    """Return the weights whose visits are kept as factors (see ``buffers``)."""
    return frozenset(
        i
        for i, strategy in enumerate(ways.strategies)
        if strategy == "outer" and factor_slots(layout.entries[i].shape, epochs)
    )
