"""Exact forward mode: two tangents a tracked sample, the Hessian kept (Eq. 10-11 and 33-34).

    r  = H du + L du + 1[i in batch t] (N / B_t) g_{t-1,i}
    dm <- p dm + k r
    du <- du - h (s dm + q r)                  (SGD; other families: see ``recursion``)

One Hessian-vector product a tracked sample and step: the gold standard, at its price. Rows are worked
on in padded tiles (see ``hessian.tiles``), and a row's bits do not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..hessian.tiles import TILE, HessianTiles, StepTiles
from ..model.row_map import RowMap
from ..model.state import buffers_from
from ..persample.engine import PerSampleGradients
from ..recipe import Batch
from ..recursion.coefficients import recorded_settings
from ..recursion.family import Moment
from ..recursion.steps import Steps
from ..training.training import Training
from ..training.trials import tried_ways
from .base import HeldBatch, RowSink, share


class ExactRows(RowSink):
    """(n, D) buffers of du and dm; see ``Replay``.

    The training's ``batch_norm`` must be ``coupled``: the exact form differentiates through the
    batch statistics.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        rows: n.
        share: Of the Hessian in the products; see ``HessianTiles``.
        row_map: What is kept of a row; tangents are carried whole. None: all.
        sampled: Rows of which ``whole`` is asked.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        rows: int,
        *,
        share: float = 1.0,
        row_map: RowMap | None = None,
        sampled: Sequence[int] = (),
    ) -> None:
        assert training.compute.batch_norm == "coupled"
        self.training, layout = training, training.layout
        self._steps = Steps(recorded_settings(trajectory), layout, training.dtype, training.device)
        self.engine = PerSampleGradients(
            training.recipe, training.model, layout, tried_ways(training, trajectory)
        )
        self.weights = torch.zeros(rows, layout.dimension, dtype=training.dtype, device=training.device)
        self.state = [torch.zeros_like(self.weights) for _ in range(self._steps.vectors)]
        self.tiles = HessianTiles(training, alone=True, share=share)
        self._touched = torch.zeros(rows, dtype=torch.bool)
        self._row_map, self._sampled = row_map, list(sampled)

    @property
    def deferred(self) -> bool:
        """Whether a step must be known before tangents are moved: they are moved by it as a whole."""
        return self._steps.needs_moment or self.training.schedule.accumulates

    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """Move every tangent by the linearised step, unless that was done when it was met."""
        if not self.deferred:
            self._linear = self._steps.linear(step)
            if self._touched.any():
                self._move([self.tiles.at(step, batch)])
        # The graph of the products is gone with this call, before the optimiser moves the weights.
        self._touched[members] = True
        self._share = share(self.training, step)

    def meet(self, step: int, moment: Callable[[], Moment], held: Sequence[HeldBatch]) -> None:
        """Move every tangent by the step that is about to be taken."""
        if not self.deferred:
            return
        self._linear = self._steps.linear(step, moment() if self._steps.needs_moment else None)
        if not self._touched.any():
            return
        products = []
        for one in held:
            with buffers_from(one.kept):
                products.append(self.tiles.at(one.step, one.batch))
        self._move(products)

    def _move(self, products: Sequence[StepTiles]) -> None:
        moving = torch.nonzero(self._touched).flatten()
        for start in range(0, len(moving), TILE):
            chosen = moving[start : start + TILE].to(self.training.device)
            du, state = self.weights[chosen], [vector[chosen] for vector in self.state]
            source, part = torch.empty_like(du), torch.empty_like(du)
            for k, second in enumerate(products):
                second.tile(du, part if k else source)
                if k:
                    source.add_(part)
            self._linear.push(du, state, source)
            for vector, moved in zip([self.weights, *self.state], [du, *state], strict=True):
                vector[chosen] = moved

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the members' own gradients."""
        chosen = rows.to(self.training.device)
        on_weights, on_state = self._linear.kick(block * self._share)
        self.weights.index_add_(0, chosen, on_weights)
        for vector, kick in zip(self.state, on_state, strict=True):
            vector.index_add_(0, chosen, kick)

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows on the host; see ``Replay``."""
        array: npt.NDArray[np.floating] = self.weights[start:stop].cpu().numpy()
        return array if self._row_map is None else self._row_map.apply(array)

    def whole(self) -> npt.NDArray[np.floating] | None:
        """Return sampled rows before they are folded; see ``RowSink``."""
        if self._row_map is None or not self._row_map.folds:
            return None
        return self._row_map.whole.apply(self.weights[self._sampled].cpu().numpy())

    def told(self) -> dict[str, Any]:
        """Return how the gradients and the products were had."""
        return super().told() | self.tiles.told()
