"""Replays that know (du, dm) of every tracked sample at chosen moments, without per-step updates.

Two buffers a sample and a recursion. At the beginning of a segment the buffers are moved to its end
by the 2 x 2 map; each visit inside it then adds the sample's own gradient with the coefficients of
that step (see ``segments``). So a sample is touched when it is visited and at the borders alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.curvature import Curvature
from ...storage.trajectory import Trajectory
from ..ekfac.eigenbasis import Eigenbasis
from ..ekfac.eigengradients import EigenGradients
from ..persample.engine import TILE, PerSampleGradients
from ..recipe import Batch
from ..recursion.coefficients import Settings, recorded_settings
from ..recursion.columns import Columns
from ..recursion.eigencoefficients import EigenCoefficients
from ..recursion.segments import Segment, Segments
from ..training.training import Training
from ..training.trials import tried_ways
from ..training.verified import Rows, VerifiedReplay

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
        """Add a visit's gradients (R, D) to distinct rows."""
        self.weights.index_add_(0, rows, block * scales[0])
        self.momentum.index_add_(0, rows, block * scales[1])


class SegmentReplay(VerifiedReplay):
    """The fast form at chosen moments; see ``VerifiedReplay`` for the first arguments.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        tracked: Train indices.
        borders: Steps after which the state is wanted, ascending.
        settings: One or several recursions carried in the same replay, such as with another decay.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        tracked: Rows,
        borders: Sequence[int],
        settings: Sequence[Settings],
    ) -> None:
        super().__init__(training, trajectory, tracked)
        layout = training.layout
        self.engine = PerSampleGradients(
            training.recipe, training.model, layout, tried_ways(training, trajectory)
        )
        columns = Columns(layout, training.dtype, training.device)
        like = torch.empty(0, layout.dimension, dtype=training.dtype, device=training.device)

        def factor(per_group: Tensor) -> Tensor:
            return columns.spread(per_group.numpy())

        self.borders = [0, *borders]
        self.sums = [
            SegmentSums(len(tracked), like, Segments(one, torch.from_numpy), factor) for one in settings
        ]

    def step(self, step: int, batch: Batch, rows: Rows) -> None:
        """Train, and add the tracked members' gradients; at a border move the buffers first."""
        training = self.training
        if step in self.borders[:-1]:
            for sums in self.sums:
                sums.begin(step, self.borders[self.borders.index(step) + 1])
        positions = np.flatnonzero(rows >= 0)
        share = training.n_train / training.batch_size(step)
        numbers = torch.from_numpy(rows[positions]).to(training.device)
        scales = [sums.scales(step, share) for sums in self.sums] if len(positions) else []

        def add(start: int, block: Tensor) -> None:
            for sums, both in zip(self.sums, scales, strict=True):
                sums.add(numbers[start : start + len(block)], block, both)

        watch = self.engine.watch(torch.from_numpy(positions).to(training.device), add)
        loss = training.step(step, batch, watch if len(positions) else None)
        training.check_finite(step, float(loss))

    def state(self, which: int = 0) -> Tensor:
        """Return the hypergradients (n, D) of a recursion; true at a border, and not between."""
        return self.sums[which].weights


class EkfacSegmentReplay(SegmentReplay):
    """The same with EKFAC curvature; see ``SegmentReplay`` and ``ekfac``."""

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        tracked: Rows,
        borders: Sequence[int],
        curvature: Curvature,
    ) -> None:
        super().__init__(training, trajectory, tracked, borders, ())
        self.engine.close()
        layout, device, dtype = training.layout, training.device, training.dtype
        settings = recorded_settings(trajectory)
        self.basis = Eigenbasis(curvature.blocks, layout, dtype, device, curvature.core)
        groups = self.basis.groups().to(device)
        values = EigenCoefficients(
            settings, groups, curvature.eigenvalues, curvature.steps, device, dtype
        ).eigenvalues_at

        def spread(per_group: npt.NDArray[np.float64]) -> Tensor:
            table = torch.from_numpy(np.append(per_group, 0.0)).to(device)
            return table[groups]  # -1, not optimised, picks the appended zero

        segments = Segments(settings, spread, values, dtype)
        like = torch.empty(0, layout.dimension, dtype=dtype, device=device)
        self.sums = [SegmentSums(len(tracked), like, segments, lambda on: on.to(dtype))]
        self.engine = EigenGradients(
            training.recipe, training.model, layout, tried_ways(training, trajectory), self.basis
        )
        longest = max(1, TABLE_BYTES // (2 * layout.dimension * dtype.itemsize))
        pairs = zip(self.borders[:-1], self.borders[1:], strict=True)
        self.borders = [step for first, stop in pairs for step in range(first, stop, longest)]
        self.borders.append(borders[-1])

    def state(self, which: int = 0) -> Tensor:
        """Return the hypergradients (n, D), rotated back to parameters."""
        rows = super().state(which)
        out = torch.empty_like(rows)
        for start in range(0, len(rows), TILE):
            out[start : start + TILE] = self.basis.to_parameters(rows[start : start + TILE])
        return out
