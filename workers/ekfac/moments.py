"""Second moments of per-sample gradients in an eigenbasis: eigenvalues, and the full matrix of a few coordinates.

Where gradients are outer products d x^T of turned factors, their squares sum to ``(d^2)^T x^2``: one matrix product
a batch, and no gradient is formed. Letters as in ``ekfac``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..model.layout import Layout
from ..persample.engine import TakeFactors, TakeRows
from ..persample.ways import Ways
from ..recipe import Recipe
from .eigenbasis import Eigenbasis
from .eigengradients import EigenGradients

Matrix = npt.NDArray[np.float64]


class Moments(EigenGradients):
    """Sums over the gradients of batches; see ``EigenGradients`` for the arguments.

    Args:
        coordinates: (C,) whose full matrix of second moments is wanted; None: of none.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        layout: Layout,
        ways: Ways,
        basis: Eigenbasis,
        scale: Matrix | None,
        coordinates: Tensor | None,
    ) -> None:
        like = layout.parameters(model)[0]
        wanted = torch.empty(0, dtype=torch.int64, device=like.device) if coordinates is None else coordinates
        super().__init__(recipe, model, layout, ways, basis, scale, wanted)
        self._squares = torch.zeros(layout.dimension, dtype=torch.float64, device=like.device)
        self._products = self._squares.new_zeros(len(wanted), len(wanted))
        self._count = 0

    def take(self) -> tuple[Matrix, Matrix]:
        """Return E[g_k^2], (D,), and E[g_k g_l] of the coordinates, (C, C), since this was asked last."""
        found = tuple((sums / self._count).cpu().numpy() for sums in (self._squares, self._products))
        self._squares.zero_()
        self._products.zero_()
        self._count = 0
        return found[0], found[1]

    def hand_over(
        self, positions: Tensor, size: int, sink: TakeRows, factors: TakeFactors | None = None
    ) -> None:
        """Add the rows of a batch to the sums; see ``PerSampleGradients.hand_over``."""
        chosen: list[Tensor] = []
        super().hand_over(positions, size, lambda _start, rows: chosen.append(rows.clone()), factors)
        self._count += len(positions)
        if len(self._products):
            rows = torch.cat(chosen)
            self._products += torch.mm(rows.T, rows)

    def put_factors(self, k: int, d_R: Tensor, x_R: Tensor) -> None:
        """Take a block whose rows are outer products."""
        self._squares[self.basis.span(k)] += torch.mm(d_R.square().T, x_R.square()).flatten()
        super().put_factors(k, d_R, x_R)

    def turned_block(self, k: int, parts: Sequence[Tensor], count: int) -> Tensor:
        """Take a block whose rows are formed."""
        turned = super().turned_block(k, parts, count)
        self._squares[self.basis.span(k)] += turned.square().sum(0).flatten()
        return turned

    def put(self, k: int, parts: Sequence[Tensor] | None, count: int) -> None:
        """Take a block whose rows are formed, whether any of its coordinates is wanted or not."""
        if parts is not None and not self.wants(k):
            self.turned_block(k, parts, count)
            return
        super().put(k, parts, count)
