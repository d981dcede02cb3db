"""The recursion with curvature in EKFAC form: replay in the eigenbasis, forward or adjoint.

In a fixed eigenbasis Q the recursion is diagonal and the closed form of ``fast`` holds with one
coefficient an eigendirection: ``sum_t c_t(eigenvalue) (N / B_t) (rotated g_{t-1,i})``, rotated back
at the end. With Adam Q is the basis of its metric (see ``ekfac.metric``): rotated are P^1/2 g, and back go
the rows by P^1/2 Q. Clipping turns the gradients first into what it makes of them, G being the step's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.curvature import Curvature
from ...storage.trajectory import Trajectory
from ..ekfac.eigenbasis import Eigenbasis, wide_tile
from ..ekfac.eigengradients import EigenGradients
from ..model.row_map import RowMap
from ..persample.engine import TILE, PerSampleGradients
from ..recipe import Batch
from ..recursion.clipping import Clip
from ..recursion.coefficients import Settings, recorded_settings
from ..recursion.eigencoefficients import EigenCoefficients
from ..recursion.family import Moment
from ..recursion.steps import lanes_of
from ..training.training import Training
from ..training.trials import tried_ways
from .base import HeldBatch, ProductSink, RowSink, share
from .mapped import MappedSums
from .projection import Projections


class TurnedGradients:
    """Per-sample gradients of a replay in the eigenbasis, and rows from there back.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        curvature: Basis, eigenvalues, metric.

    Attributes:
        looks: Whether some step was clipped, so that each such step must be met.
    """

    def __init__(self, training: Training, trajectory: Trajectory, curvature: Curvature) -> None:
        layout, device, dtype = training.layout, training.device, training.dtype
        self._training = training
        self.settings: Settings = recorded_settings(trajectory)
        # Not with SGD: there tiles of another size would change the bits that runs have.
        tile = TILE if curvature.metric is None else wide_tile(layout.dimension)
        self.basis = Eigenbasis(curvature.blocks, layout, dtype, device, curvature.core, tile)
        self.lanes = self.basis.lanes(lanes_of(self.settings, layout))
        scale = None if curvature.metric is None else curvature.metric.scale
        ways = tried_ways(training, trajectory)
        self.engine = EigenGradients(training.recipe, training.model, layout, ways, self.basis, scale)
        self.root = self.engine.root
        clips = self.settings.clip_factor
        self.looks = clips is not None and bool((clips < 1).any())
        self._clip: Clip | None = None

    def meet(self, step: int, _moment: Callable[[], Moment]) -> None:
        """Note how a step that is about to be taken clips: no copies of all that a moment holds."""
        clips = self.settings.clip_factor
        clip = None
        if clips is not None and clips[self.settings.update(step)] < 1:
            clip = self._training.clip()
        if self.root is not None:  # clipping is of the gradient as it is, before the metric
            self.engine.clips(clip)
        elif clip is None:
            self._clip = None
        else:  # turning alone changes no product
            self._clip = replace(clip, gradient=self.basis.to_eigen(clip.gradient[None])[0])

    def take_(self, block: Tensor) -> None:
        """Turn rows (R, D) that the engine handed over into what clipping makes of them, in place."""
        if self._clip is not None:
            self._clip.map_(block)

    def targets(self, targets_QD: Tensor) -> Tensor:
        """Turn gradients of targets, (Q, D), left as they are."""
        return self.basis.to_eigen(targets_QD if self.root is None else targets_QD * self.root)

    def to_parameters(self, rows_nD: Tensor) -> Tensor:
        """Turn rows back."""
        out = self.basis.to_parameters(rows_nD)
        return out if self.root is None else out.mul_(self.root)


class Turned:
    """What both sinks share: turned gradients and their coefficients.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        curvature: Basis, eigenvalues, metric.
        first: First step that is replayed.
    """

    def __init__(
        self, training: Training, trajectory: Trajectory, curvature: Curvature, first: int = 0
    ) -> None:
        self.training = training
        self.turned = TurnedGradients(training, trajectory, curvature)
        self.basis = self.turned.basis
        self.engine: PerSampleGradients = self.turned.engine
        self.coefficients = EigenCoefficients(
            self.turned.settings, self.turned.lanes, curvature, training.device, training.dtype, first
        )

    @property
    def looks(self) -> bool:
        """Whether the step's own clipping is in the rows."""
        return self.turned.looks

    def meet(self, step: int, moment: Callable[[], Moment], held: Sequence[HeldBatch]) -> None:
        """Note it."""
        self.turned.meet(step, moment)

    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """Note the step's coefficients, one an eigendirection."""
        if len(members):
            self.scale = self.coefficients.at(step) * share(self.training, step)


class EkfacRows(Turned, RowSink):
    """Dense sums of rows in the eigenbasis; see ``Replay`` and ``Turned``.

    Attributes:
        mapped: The sums in parameters, where rows are kept in part; None: they are in ``sums``.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        rows: int,
        curvature: Curvature,
        first: int = 0,
        row_map: RowMap | None = None,
        sampled: Sequence[int] = (),
    ) -> None:
        super().__init__(training, trajectory, curvature, first)
        self.mapped: MappedSums | None = None
        if row_map is not None:  # they are turned back visit by visit, so that no whole sum is held
            self.mapped = MappedSums(rows, row_map, sampled, training.dtype, training.device)
            return
        like = torch.empty(0, dtype=training.dtype, device=training.device)
        tile = self.basis.tile
        self.sums = like.new_zeros(-(-rows // tile) * tile, training.layout.dimension)

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the scaled rows."""
        self.turned.take_(block)
        if self.mapped is not None:
            self._add_back(rows, block.mul_(self.scale), self.mapped)
            return
        if self.sums.device.type != "cpu" or self.basis.tile > TILE:
            self.sums.index_add_(0, rows.to(self.sums.device), block.mul_(self.scale))
            return
        for row, gradient in zip(rows.tolist(), block, strict=True):  # one pass through memory, not two
            self.sums[row].addcmul_(gradient, self.scale)

    def _add_back(self, rows: Tensor, block: Tensor, sums: MappedSums) -> None:
        """Turn rows back, in whole tiles, and add what is kept of them."""
        size = self.basis.tile
        for start in range(0, len(block), size):
            part = block[start : start + size]
            tile = part.new_zeros(size, part.shape[1])
            tile[: len(part)] = part
            sums.add(rows[start : start + size], self.turned.to_parameters(tile)[: len(part)], 1.0)

    def whole(self) -> npt.NDArray[np.floating] | None:
        """Return sampled rows before they are folded; see ``RowSink``."""
        return None if self.mapped is None else self.mapped.whole()

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows in parameter order, on the host; see ``Replay``."""
        if self.mapped is not None:
            return self.mapped.numpy(start, stop)
        parts, size = [], self.basis.tile
        for tile in range(start - start % size, stop, size):  # whole tiles: the same bits for any shard
            turned = self.turned.to_parameters(self.sums[tile : tile + size])
            parts.append(turned[max(start - tile, 0) : stop - tile])
        array: npt.NDArray[np.floating] = torch.cat(parts).cpu().numpy()
        return array


class EkfacProducts(Turned, ProductSink):
    """Products of the scaled rows with turned targets; see ``Replay`` and ``Turned``.

    Args:
        targets_QD: Gradients of the targets at w_T.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        rows: int,
        curvature: Curvature,
        targets_QD: npt.NDArray[np.floating],
    ) -> None:
        super().__init__(training, trajectory, curvature)
        targets = torch.from_numpy(np.array(targets_QD)).to(training.device)
        self.sums = Projections(rows, self.turned.targets(targets))

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the products of the scaled rows."""
        self.turned.take_(block)
        self.sums.add(rows, block, self.scale)

    def contributions(self) -> npt.NDArray[np.floating]:
        """Return the contributions; see ``Replay``."""
        return self.sums.contributions(self.training.n_train)
