"""Per-sample gradients straight in the eigenbasis of the curvature.

The gradient of a Linear weight is an outer product: rotating its two factors, once for the whole
batch, costs far less than rotating the product. Everything else is rotated a tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..model.layout import Layout
from ..persample.capture import Call
from ..persample.engine import PerSampleGradients, TakeFactors, TakeRows
from ..persample.ways import RULED, Ways
from ..recipe import Recipe
from .eigenbasis import Eigenbasis


class EigenGradients(PerSampleGradients):
    """Hands over rows in the eigenbasis; see ``PerSampleGradients`` for the other arguments.

    Args:
        basis: The eigenbasis.
        scale: (D,) what gradients are multiplied with before they are turned; None: nothing.

    Attributes:
        changed: Called with gradients (R, D) before they are scaled, to change them in place; only where
            there is a scale.
    """

    changed: Callable[[Tensor], None] | None = None

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        layout: Layout,
        ways: Ways,
        basis: Eigenbasis,
        scale: Tensor | None = None,
    ) -> None:
        # A row that is scaled coordinate by coordinate is no outer product any more.
        blocks = basis.blocks if scale is None else ()
        outer = frozenset(
            block.entries[0]
            for block in blocks
            if ways.strategies[block.entries[0]] == "outer"
            and block.left is not None
            and all(ways.strategies[i] in RULED for i in block.entries)
        )
        super().__init__(recipe, model, layout, ways, outer)
        self.basis, self.scale = basis, scale
        self._block_of = {block.entries[0]: k for k, block in enumerate(basis.blocks)}
        self._rotated = torch.empty(
            self.tile, layout.dimension, dtype=self._block.dtype, device=self._block.device
        )
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        self._whole: dict[int, Tensor] = {}

    def hand_over(
        self, positions: Tensor, size: int, sink: TakeRows, factors: TakeFactors | None = None
    ) -> None:
        """Hand over rotated rows; see ``PerSampleGradients.hand_over``."""
        self._factors, self._whole = {}, {}

        def keep(entry: int, d_R: Tensor, x_R: Tensor | None) -> None:
            if x_R is None:
                self._whole[entry] = d_R
            else:
                self._factors[self._block_of[entry]] = (d_R, x_R)

        def rotate(start: int, block: Tensor) -> None:
            if self.scale is not None:
                if self.changed is not None:
                    self.changed(block)
                block *= self.scale
            sink(start, self._rotate(start, len(block)))

        super().hand_over(positions, size, rotate, keep)
        self._factors, self._whole = {}, {}

    def factors_of(self, call: Call, entry: int, d_B: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate a layer's factors for the whole batch, so that bits do not depend on the rows wanted."""
        k = self._block_of[entry]
        left, right = self.basis.left[k], self.basis.right[k]
        assert left is not None
        assert right is not None
        x_B = call.x_B
        if len(self.basis.blocks[k].entries) == 2:
            x_B = torch.cat([x_B, x_B.new_ones(len(x_B), 1)], 1)
        return torch.mm(d_B, left), torch.mm(x_B, right)

    def _rotate(self, start: int, count: int) -> Tensor:
        """Assemble the tile that begins at row ``start`` in the eigenbasis."""
        for k, block in enumerate(self.basis.blocks):
            target = self._rotated[:, self.basis.span(k)].unflatten(1, (block.rows, block.columns))
            if k in self._factors:
                d_R, x_R = (f[start : start + count] for f in self._factors[k])
                torch.mul(d_R.unsqueeze(2), x_R.unsqueeze(1), out=target[:count])
                continue
            if block.entries[0] in self.factored and block.entries[0] not in self._whole:
                target.zero_()  # its layer was not called in this step
                continue
            rows = {i: self._whole[i][start : start + count] for i in block.entries if i in self._whole}
            parts = [rows.get(i, self.views[i][:count]).reshape(count, block.rows, -1) for i in block.entries]
            self.basis.turn(k, parts, target[:count])
        if self.basis.core is not None:
            self.basis.core.turn(self._rotated[:count])
        return self._rotated[:count]
