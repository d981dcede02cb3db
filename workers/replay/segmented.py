"""Replays that know (du, dm) of every tracked sample at chosen moments, without per-step updates.

Two buffers a sample and a recursion. At the beginning of a segment the buffers are moved to its end
by the 2 x 2 map; each visit inside it then adds the sample's own gradient with the coefficients of
that step (see ``segments``). So a sample is touched when it is visited and at the borders alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...storage.curvature import Curvature
from ...storage.trajectory import Trajectory
from ..persample.engine import TILE, PerSampleGradients
from ..recipe import Batch
from ..recursion.coefficients import Settings
from ..recursion.columns import Columns
from ..recursion.eigencoefficients import BentSteps
from ..recursion.family import Moment
from ..recursion.segments import Segment, Segments
from ..recursion.steps import lanes_of
from ..training.training import Training
from ..training.trials import tried_ways
from .base import HeldBatch, Sink, share
from .ekfac import TurnedGradients
from .fast import StepScales

TABLE_BYTES = 64 << 20
"""Coefficients of a segment with one an eigendirection; longer stretches get borders of their own."""


class SegmentSums:
    """(n, D) buffers of du and dm, in the basis of the rows that are added.

    Args:
        rows: n.
        like: An empty (0, D) tensor of the right type and place.
        segments: The recursion.
        factor: Turns (W,) coefficients into a factor for rows: (1,) or (D,), of the rows' type.
    """

    def __init__(
        self, rows: int, like: Tensor, segments: Segments, factor: Callable[[Tensor], Tensor]
    ) -> None:
        self.weights = like.new_zeros(rows, like.shape[-1])
        self.momentum = torch.zeros_like(self.weights)
        self._segments, self._factor = segments, factor
        self._segment: Segment | None = None

    def begin(self, first: int, stop: int) -> None:
        """Move the buffers from step ``first`` to ``stop``, but for what is visited between."""
        self._segment = segment = self._segments.between(first, stop)
        (uu, um), (mu, mm) = ([self._factor(part) for part in row] for row in segment.carried)
        for start in range(0, len(self.weights), TILE):  # small pieces: no third buffer
            span = slice(start, start + TILE)
            du, dm = self.weights[span], self.momentum[span]
            moved = uu * du + um * dm
            dm.copy_(mu * du + mm * dm)
            du.copy_(moved)

    def scales(self, step: int, share: float) -> tuple[Tensor, Tensor]:
        """Return the factors of a step's gradients on du and dm; ``share`` is N / B_t."""
        assert self._segment is not None
        on = self._segment.on[:, step - self._segment.first].double() * share
        return self._factor(on[0]), self._factor(on[1])

    def add(self, rows: Tensor, block: Tensor, scales: tuple[Tensor, Tensor]) -> None:
        """Add a visit's gradients (R, D) to rows."""
        self.weights.index_add_(0, rows, block * scales[0])
        self.momentum.index_add_(0, rows, block * scales[1])


class SegmentRows(Sink):
    """Hypergradients at chosen moments, of one or several recursions carried in the same replay.

    Args:
        training: The training that is replayed.
        engine: Gives the rows.
        borders: Steps between which the buffers rest, ascending from 0.
        sums: The buffers of each recursion.
        turned: What the rows are turned into; None: nothing.
        steps: What each step makes of gradients beside the scalars; None: nothing.
    """

    def __init__(
        self,
        training: Training,
        engine: PerSampleGradients,
        borders: Sequence[int],
        sums: Sequence[SegmentSums],
        turned: TurnedGradients | None = None,
        steps: StepScales | None = None,
    ) -> None:
        self.training, self.engine, self.borders = training, engine, list(borders)
        self.sums, self.turned, self.steps = list(sums), turned, steps

    @property
    def looks(self) -> bool:
        """Whether the step's own preconditioner or clipping is in the rows."""
        return any(one is not None and one.looks for one in (self.steps, self.turned))

    def meet(self, step: int, moment: Callable[[], Moment], held: Sequence[HeldBatch]) -> None:
        """Note them."""
        for one in (self.steps, self.turned):
            if one is not None:
                one.meet(step, moment)

    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """At a border move the buffers; note the step's factors."""
        if step in self.borders[:-1]:
            for sums in self.sums:
                sums.begin(step, self.borders[self.borders.index(step) + 1])
        if len(members):
            self._scales = [sums.scales(step, share(self.training, step)) for sums in self.sums]

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the members' gradients to every recursion."""
        chosen = rows.to(self.training.device)
        if self.turned is not None:
            self.turned.take_(block)
        if self.steps is not None:
            self.steps.clip_(block)
            if self.steps.preconditioner is not None:
                block = block * self.steps.preconditioner
        for sums, both in zip(self.sums, self._scales, strict=True):
            sums.add(chosen, block, both)

    def state(self, which: int = 0) -> Tensor:
        """Return the hypergradients (n, D) of a recursion; true at a border, and not between."""
        rows = self.sums[which].weights
        if self.turned is None:
            return rows
        out = torch.empty_like(rows)
        for start in range(0, len(rows), TILE):
            out[start : start + TILE] = self.turned.to_parameters(rows[start : start + TILE])
        return out


def fast_segments(
    training: Training,
    trajectory: Trajectory,
    rows: int,
    *,
    borders: Sequence[int],
    settings: Sequence[Settings],
) -> SegmentRows:
    """Return the sink of the fast form; see ``Replay`` for the first arguments.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        rows: n.
        borders: Steps after which the state is wanted, ascending.
        settings: One or several recursions, such as with another decay.
    """
    layout, device, dtype = training.layout, training.device, training.dtype
    ways = tried_ways(training, trajectory)
    engine = PerSampleGradients(training.recipe, training.model, layout, ways)
    columns = Columns(layout.column_groups(lanes_of(settings[0], layout)), dtype, device)
    like = torch.empty(0, layout.dimension, dtype=dtype, device=device)

    def factor(per_group: Tensor) -> Tensor:
        return columns.spread(per_group.numpy())

    sums = [SegmentSums(rows, like, Segments(one, torch.from_numpy), factor) for one in settings]
    return SegmentRows(training, engine, [0, *borders], sums, steps=StepScales(training, trajectory))


def ekfac_segments(
    training: Training,
    trajectory: Trajectory,
    rows: int,
    *,
    borders: Sequence[int],
    curvature: Curvature,
) -> SegmentRows:
    """Return the sink with EKFAC curvature; see ``fast_segments`` and ``ekfac``."""
    layout, device, dtype = training.layout, training.device, training.dtype
    turned = TurnedGradients(training, trajectory, curvature)
    bent = BentSteps(turned.settings, turned.lanes, curvature, device)
    columns = Columns(turned.lanes, torch.float64, device)
    like = torch.empty(0, layout.dimension, dtype=dtype, device=device)
    segments = Segments(turned.settings, columns.whole, bent.curvature, dtype, bent.form)
    sums = SegmentSums(rows, like, segments, lambda on: on.to(dtype))
    longest = max(1, TABLE_BYTES // (2 * layout.dimension * dtype.itemsize))
    pairs = itertools.pairwise([0, *borders])
    cut = [step for first, stop in pairs for step in range(first, stop, longest)]
    return SegmentRows(training, turned.engine, [*cut, borders[-1]], [sums], turned)
