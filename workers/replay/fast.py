"""The Hessian dropped: hypergradients of the tracked samples from the steps that train.

Per tracked sample i of the shard: ``sum_t c_t (N / B_t) g_{t-1,i}`` (see ``coefficients``), with
g taken from the hooks of the very step that trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..model.layout import Layout
from ..model.row_map import RowMap
from ..persample.engine import PerSampleGradients
from ..persample.ways import Ways
from ..recipe import Batch
from ..recursion.clipping import Clip
from ..recursion.coefficients import coefficients, recorded_settings
from ..recursion.family import Moment
from ..recursion.rest import Rest
from ..recursion.steps import Steps, lanes_of
from ..training.training import Training
from ..training.trials import tried_ways
from .base import HeldBatch, RowSink, share
from .buffers import HypergradientBuffers, factor_slots, row_numbers
from .graphs import graphed
from .mapped import MappedSums, asked_ways, is_mapped, unasked


class Scaled:
    """What sinks share whose rows are scaled by their step; ``_scales`` says with what."""

    _scales: Scales

    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """Note the step's coefficients."""
        if len(members):
            self._scales.begin(step)

    @property
    def looks(self) -> bool:
        """Whether the step's own preconditioner or clipping is in the rows."""
        return self._scales.steps.looks

    def meet(self, step: int, moment: Callable[[], Moment], held: Sequence[HeldBatch]) -> None:
        """Note them."""
        self._scales.steps.meet(step, moment)

    @property
    def rest(self) -> Rest:
        """See ``Sink``."""
        return self._scales.steps.rest


class FastRows(Scaled, RowSink):
    """Sums of scaled gradients, Linear weights as factors where that is less; see ``Replay``.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        rows: n.
        epochs: Epochs that are replayed, begun or whole; None: all.
        row_map: What is kept of a row; None: all.
        sampled: Rows of which ``whole`` is asked.

    Attributes:
        mapped: The sums, where rows are folded or picked from whole ones; None: they are in ``buffers``.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        rows: int,
        epochs: int | None = None,
        row_map: RowMap | None = None,
        sampled: Sequence[int] = (),
    ) -> None:
        left_out = unasked(training, row_map)
        ways = asked_ways(tried_ways(training, trajectory), left_out)
        layout, epochs = training.layout, training.epochs if epochs is None else epochs
        scaling = StepScales(training, trajectory)
        mapped = is_mapped(training, row_map)
        factored = frozenset() if mapped else kept_as_factors(training, ways, epochs)
        largest = training.batches.shape[1]
        self.engine = PerSampleGradients(training.recipe, training.model, layout, ways, factored, largest)
        columns, dtype, device = self.engine.columns, training.dtype, training.device
        self.spare = rows if graphed(training) and not mapped else None
        kept = rows if self.spare is None else rows + 1
        self.mapped: MappedSums | None = None
        if mapped:
            assert row_map is not None
            self.mapped = MappedSums(rows, row_map, sampled, dtype, device, columns)
        else:
            self.buffers = HypergradientBuffers(kept, layout, factored, columns, epochs, dtype, device)
        placed = device.type != "cpu" or graphed(training)
        self._scales = Scales(training, scaling, factored | left_out, placed=placed)

    def refuses_graphs(self) -> str | None:
        """See ``graphs.CapturableSink``."""
        if self.looks:
            return "the optimiser's preconditioner or clipping is read at every step"
        if self.mapped is not None:
            return "rows are folded, or picked from whole ones, before they are added up"
        if self.buffers.home.type != self.engine.views[0].device.type:
            return "the sums are in host memory, because they do not fit the device's"
        return None if self.spare is not None else "the sums have no spare row"

    def graph_key(self) -> Hashable:
        """See ``graphs.CapturableSink``: factors of an epoch have a place of their own."""
        return tuple(factors.slot for factors in self.buffers.factors.values())

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the scaled gradients to the dense rows."""
        self._scales.steps.clip_(block)
        (self.mapped or self.buffers).add(rows, block, self._scales.block())

    def add_factors(self, entry: int, rows: Tensor, d_R: Tensor, x_R: Tensor | None) -> None:
        """Note a visit of a factored entry."""
        self.buffers.add_factors(entry, rows, d_R, x_R, self._scales.placed_entry(entry))

    def end_epoch(self) -> None:
        """Let the buffers fold their factors."""
        (self.mapped or self.buffers).end_epoch()

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows on the host; see ``Replay``."""
        return (self.mapped or self.buffers).numpy(start, stop)

    def whole(self) -> npt.NDArray[np.floating] | None:
        """Return sampled rows before they are folded; see ``RowSink``."""
        return None if self.mapped is None else self.mapped.whole()


class Scales:
    """Gives c_t N / B_t of the batch that was begun last, times the step's preconditioner where it has one.

    Args:
        training: The training that is replayed.
        steps: Coefficients and preconditioners.
        absent: Entries that are no columns of the blocks.
        placed: Whether numbers are handed out where the gradients are, put there for all steps at once.
    """

    def __init__(
        self,
        training: Training,
        steps: StepScales,
        absent: frozenset[int] = frozenset(),
        *,
        placed: bool = False,
    ) -> None:
        self._training, self.steps = training, steps
        layout, self._lanes = training.layout, steps.lanes
        lanes = set(self._lanes)
        self._lane = lanes.pop() if len(lanes) == 1 else None
        columns = [layout.column_groups()[:0]]
        there = torch.ones(layout.dimension, dtype=torch.bool)
        for i, lane in enumerate(self._lanes):
            if i not in absent:
                columns.append(torch.full((layout.size(i),), lane))
            else:
                start = layout.entries[i].start
                there[start : start + layout.size(i)] = False
        self._there = there.to(training.device) if absent else None
        groups = torch.cat(columns).to(training.device)
        self._groups = groups if self._lane is None else None
        # One place holds the present step's: what was captured as a graph reads it, and nothing waits for the host.
        self._placed = placed
        self._table: Tensor | None = None
        self._now: Tensor | None = None

    def begin(self, step: int) -> None:
        """Stand at a batch."""
        self._per_lane = self._of(step)
        self._block: float | Tensor | None = None
        if not self._placed:
            return
        if self._table is None or self._now is None:
            self._table = self._lay_out()
            self._now = self._table[step].clone()
        self._now.copy_(self._table[step])

    def _of(self, step: int) -> npt.NDArray[np.float64]:
        return self.steps.coefficient(step) * share(self._training, step)

    def _lay_out(self) -> Tensor:
        """Return the numbers of all steps, (T, L + 1): group -1 picks the appended zero."""
        every = np.array([np.append(self._of(step), 0.0) for step in range(self._training.steps)])
        return torch.from_numpy(every).to(device=self._training.device, dtype=self._training.dtype)

    def block(self) -> float | Tensor:
        """Return one number where it is the same for all columns of the blocks, else one per column."""
        if self._block is None:
            if self._now is not None:
                self._block = self._now[self._lane] if self._groups is None else self._now[self._groups]
            elif self._groups is None:
                self._block = float(self._per_lane[self._lane])
            else:
                table = torch.from_numpy(np.append(self._per_lane, 0.0))
                self._block = table.to(self._training.dtype)[self._groups]
            if self.steps.preconditioner is not None:
                whole = self.steps.preconditioner
                self._block = (whole if self._there is None else whole[self._there]) * self._block
        return self._block

    def of_entry(self, entry: int) -> float:
        """Return the number of one parameter; 0 where it is not optimised."""
        lane = self._lanes[entry]
        return float(self._per_lane[lane]) if lane >= 0 else 0.0

    def placed_entry(self, entry: int) -> float | Tensor:
        """Return the same, on the device where numbers are placed."""
        return self.of_entry(entry) if self._now is None else self._now[self._lanes[entry]]


class StepScales:
    """What the steps of a record make of gradients when the Hessian is dropped: c_t, and what the step adds.

        row of a visit = (N / B_t) c_t D_t clip_t(g)

    with D_t the preconditioner of the step (1 for SGD) and clip_t the derivative of clipping.

    Args:
        training: The training that is replayed.
        trajectory: The record.

    Attributes:
        looks: Whether there is more than c_t, so that each step must be met.
        preconditioner: D_t of the step that was met last, (D,); None: 1.
        clip: How that step was clipped; None: it was not.
        rest: What the rows leave out of what training did.
    """

    def __init__(self, training: Training, trajectory: Trajectory) -> None:
        settings = recorded_settings(trajectory)
        self._steps = Steps(settings, training.layout, training.dtype, training.device)
        self._coefficients = coefficients(settings)
        self._training = training
        self.lanes = lanes_of(settings, training.layout)
        self.looks = self._steps.needs_moment
        self.preconditioner: Tensor | None = None
        self.clip: Clip | None = None
        spans = [slice(e.start, e.start + math.prod(e.shape)) for e in training.layout.entries]
        self.rest = Rest(self._steps, self._coefficients, spans, self.lanes)

    def coefficient(self, step: int) -> npt.NDArray[np.float64]:
        """Return c_t of the step that a batch belongs to, (L,)."""
        found: npt.NDArray[np.float64] = self._coefficients[self._steps.settings.update(step)]
        return found

    def meet(self, step: int, moment: Callable[[], Moment]) -> None:
        """Note the preconditioner and the clipping of a step."""
        if not self.looks:
            return
        now = moment()
        self.preconditioner = self._steps.preconditioner(step, now)
        self.clip = now.clip if now.clip.active else None
        self.rest.add(step, now, self.preconditioner)

    def clip_(self, block: Tensor) -> None:
        """Turn rows (R, D) of gradients into what clipping makes of them, in place."""
        if self.clip is not None:
            self.clip.map_(block)


def numbers_per_row(training: Training, ways: Ways, row_map: RowMap | None) -> int:
    """Return how many numbers the buffers of the fast form hold per tracked sample."""
    if row_map is not None and is_mapped(training, row_map):
        return row_map.columns
    left_out = unasked(training, row_map)
    factored = kept_as_factors(training, asked_ways(ways, left_out))
    return row_numbers(training.layout, factored, training.epochs, left_out)


def factored_shapes(training: Training, ways: Ways, row_map: RowMap | None) -> tuple[tuple[int, ...], ...]:
    """Return the shapes (O, I) of the weights whose visits are kept as factors in a replay of one epoch."""
    if is_mapped(training, row_map):
        return ()
    factored = kept_as_factors(training, asked_ways(ways, unasked(training, row_map)), epochs=1)
    return tuple(tuple(training.layout.entries[i].shape) for i in sorted(factored))


def kept_as_factors(training: Training, ways: Ways, epochs: int | None = None) -> frozenset[int]:
    """Return the weights whose visits are kept as factors, where steps are numbers times gradients.

    Before a record is there, clipping counts as if it happened. ``epochs``: that are replayed; None: all.
    """
    if training.family.scaled or training.max_norm is not None or not training.schedule.distinct:
        return frozenset()  # a factored visit is one a sample and epoch
    return factored_entries(training.layout, ways, training.epochs if epochs is None else epochs)


def factored_entries(layout: Layout, ways: Ways, epochs: int) -> frozenset[int]:
    """Return the weights whose visits are kept as factors (see ``buffers``)."""
    return frozenset(
        i
        for i, strategy in enumerate(ways.strategies)
        if strategy == "outer" and factor_slots(layout.entries[i].shape, epochs)
    )
