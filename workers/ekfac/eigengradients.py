"""Per-sample gradients straight in the eigenbasis of the curvature.

The gradient of a Linear weight is an outer product: rotating its two factors, once for the whole
batch, costs far less than rotating the product. Everything else is rotated a tile at a time.

In a metric gradients are multiplied with P^1/2 first; where P is itself an outer product, factors stay factors.
With ``clip`` rows are what clipping makes of them, k (g - G <G, g> / (n (n + 1e-6))), the products with G being
taken before anything is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..model.layout import Layout
from ..persample.capture import Call
from ..persample.engine import PerSampleGradients, TakeFactors, TakeRows, views_of
from ..persample.ways import RULED, Ways
from ..recipe import Recipe
from ..recursion.clipping import EPSILON, Clip
from .eigenbasis import Eigenbasis
from .metric import outer_factors


def are_outer(ways: Ways, entries: Sequence[int]) -> bool:
    """Whether the gradients of a weight, and of a bias beside it, are one outer product a row."""
    return ways.strategies[entries[0]] == "outer" and all(ways.strategies[i] in RULED for i in entries)


class EigenGradients(PerSampleGradients):
    """Hands over rows in the eigenbasis; see ``PerSampleGradients`` for the other arguments.

    Args:
        basis: The eigenbasis.
        scale: (D,) P of the metric in which gradients are turned; None: as they are.
        coordinates: (C,) those that rows consist of, ascending; None: all, and so they must be where steps clip.
        factored: Entries that are no columns of the tiles; None: the weights of all blocks that come as factors.

    Attributes:
        root: P^1/2, (D,).
        sides: By block whose gradients come as factors: what output gradients and inputs are turned and scaled with.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        layout: Layout,
        ways: Ways,
        basis: Eigenbasis,
        scale: npt.NDArray[np.float64] | None = None,
        coordinates: Tensor | None = None,
        factored: frozenset[int] | None = None,
    ) -> None:
        like = layout.parameters(model)[0]
        root = None if scale is None else torch.from_numpy(np.sqrt(scale)).to(like)
        self.sides: dict[int, tuple[Tensor, Tensor]] = {}
        for k, block in enumerate(basis.blocks):
            left, right = basis.left[k], basis.right[k]
            if left is None or right is None or not are_outer(ways, block.entries):
                continue
            if scale is not None:
                found = outer_factors(basis.matrix(torch.from_numpy(scale), k).numpy())
                if found is None:
                    continue
                p, q = (torch.from_numpy(np.sqrt(side)).to(like).unsqueeze(1) for side in found)
                left, right = p * left, q * right
            self.sides[k] = (left, right)
        if factored is None:
            factored = frozenset(basis.blocks[k].entries[0] for k in self.sides)
        self.basis, self.root = basis, root
        super().__init__(recipe, model, layout, ways, factored)
        self._block_of = {block.entries[0]: k for k, block in enumerate(basis.blocks)}
        self._column_root = None if root is None else self._of_columns(root)
        inside = {i for k in self.sides for i in basis.blocks[k].entries}
        outside = [
            torch.full((layout.size(i),), 0.0 if i in inside else 1.0)
            for i in range(len(layout.entries))
            if i not in factored
        ]
        self._outside = torch.cat(outside).to(like) if len(inside) < len(layout.entries) else None
        self._picks = None if coordinates is None else _picks(basis, coordinates)
        width = layout.dimension if coordinates is None else len(coordinates)
        self._rotated = self._block.new_empty(self.tile, width)
        self._core = (
            basis.core if coordinates is None or basis.core is None else basis.core.among(coordinates)
        )
        self._given = self.views
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        self._whole: dict[int, Tensor] = {}
        self._clip: Clip | None = None
        self._along: Tensor | None = None

    def tile_for(self, like: Tensor) -> int:
        """See ``PerSampleGradients``: what the basis was made for."""
        return self.basis.tile if like.device.type == "cpu" else super().tile_for(like)

    def clips(self, clip: Clip | None) -> None:
        """Note how the step clips whose rows are handed over next; only in a metric."""
        assert self.root is not None
        self._clip = clip
        if clip is not None:
            if self._outside is not None:
                self._column_gradient = self._of_columns(clip.gradient) * self._outside
            self._pull = self.basis.turned(clip.gradient * self.root)

    def hand_over(
        self, positions: Tensor, size: int, sink: TakeRows, factors: TakeFactors | None = None
    ) -> None:
        """Hand over rotated rows; see ``PerSampleGradients.hand_over``."""
        self._factors, self._whole, self._along = {}, {}, None

        def keep(entry: int, d_R: Tensor, x_R: Tensor | None) -> None:
            if x_R is None:
                self._whole[entry] = d_R
            else:
                self._factors[self._block_of[entry]] = (d_R, x_R)

        def rotate(start: int, block: Tensor) -> None:
            self.given(block)
            along = self._along_of(start, block, positions)
            if self._column_root is not None:
                block *= self._column_root
            rows = self.rotated(start, len(block))
            if along is not None:
                assert self._clip is not None
                rows.addcmul_(along.neg_().unsqueeze(1), self._pull).mul_(self._clip.factor)
            sink(start, rows)

        super().hand_over(positions, size, rotate, keep)
        self._factors, self._whole = {}, {}

    def factors_of(self, call: Call, entry: int, d_B: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate a layer's factors for the whole batch, so that bits do not depend on the rows wanted."""
        k = self._block_of[entry]
        x_B = call.x_B
        if len(self.basis.blocks[k].entries) == 2:
            x_B = torch.cat([x_B, x_B.new_ones(len(x_B), 1)], 1)
        if self._clip is not None:
            found = (torch.mm(d_B, self.basis.matrix(self._clip.gradient, k)) * x_B).sum(1)
            self._along = found if self._along is None else self._along + found
        left, right = self.sides[k]
        return torch.mm(d_B, left), torch.mm(x_B, right)

    def _along_of(self, start: int, block: Tensor, positions: Tensor) -> Tensor | None:
        """Return <G, g> / (n (n + 1e-6)) of a tile of rows that is still as it was handed over, (R,); None: no clip."""
        clip = self._clip
        if clip is None:
            return None
        found = block.new_zeros(len(block))
        if self._outside is not None:
            found += (block * self._column_gradient).sum(1)
        if self._along is not None:
            found += self._along[positions[start : start + len(block)]]
        for entry, rows in self._whole.items():
            k = self._block_of[entry]
            whole = self._side_by_side(k, start, len(block), rows)
            found += (whole * self.basis.matrix(clip.gradient, k)).flatten(1).sum(1)
        return found / (clip.norm * (clip.norm + EPSILON))

    def _side_by_side(self, k: int, start: int, count: int, weight_R: Tensor) -> Tensor:
        """Return a block's rows (count, O, I) where its weight came whole; the bias is in the tile."""
        block = self.basis.blocks[k]
        parts = [weight_R[start : start + count], *(self._given[i][:count] for i in block.entries[1:])]
        return torch.cat([part.reshape(count, block.rows, -1) for part in parts], 2)

    def _of_columns(self, flat: Tensor) -> Tensor:
        """Return the part of a vector that the columns of blocks stand for."""
        parts = [flat[:0]]
        for i, entry in enumerate(self.layout.entries):
            if i not in self.factored:
                parts.append(flat[entry.start : entry.start + self.layout.size(i)])
        return torch.cat(parts)

    def given(self, block: Tensor) -> None:
        """Note a tile as it was handed over: on a device another than the engine's, where not all rows are wanted."""
        own = block.data_ptr() == self._block.data_ptr()
        self._given = self.views if own else views_of(block, self.layout, self.columns)

    def rotated(self, start: int, count: int) -> Tensor:
        """Assemble the tile that begins at row ``start`` in the eigenbasis."""
        for k, block in enumerate(self.basis.blocks):
            if k in self._factors:
                d_R, x_R = (f[start : start + count] for f in self._factors[k])
                self.put_factors(k, d_R, x_R)
                continue
            if block.entries[0] in self.factored and block.entries[0] not in self._whole:
                self.put(k, None, count)  # its layer was not called in this step
                continue
            rows = {i: self._scaled_whole(i, start, count) for i in block.entries if i in self._whole}
            parts = [
                rows.get(i, self._given[i][:count]).reshape(count, block.rows, -1) for i in block.entries
            ]
            self.put(k, parts, count)
        if self._core is not None:
            self._core.turn(self._rotated[:count])
        return self._rotated[:count]

    def put_factors(self, k: int, d_R: Tensor, x_R: Tensor) -> None:
        """Write a block whose rows are the outer products of turned factors."""
        count = len(d_R)
        if self._picks is None:
            torch.mul(d_R.unsqueeze(2), x_R.unsqueeze(1), out=self._target(k)[:count])
        elif (pick := self._picks[k]) is not None:
            d, x = d_R.index_select(1, pick.rows), x_R.index_select(1, pick.columns)
            torch.mul(d, x, out=self._rotated[:count, pick.span])

    def put(self, k: int, parts: Sequence[Tensor] | None, count: int) -> None:
        """Turn and write a block's rows, as for ``Eigenbasis.turn``; None: zeros."""
        pick = None if self._picks is None else self._picks[k]
        if self._picks is not None and pick is None:
            return
        target = self._target(k)[:count] if pick is None else self._rotated[:count, pick.span]
        if parts is None:
            target.zero_()
        elif pick is None:
            self.basis.turn(k, parts, target)
        else:
            turned = self.turned_block(k, parts, count)
            torch.index_select(turned.flatten(1), 1, pick.flat, out=target)

    def turned_block(self, k: int, parts: Sequence[Tensor], count: int) -> Tensor:
        """Return a block's rows turned, (count, O, I)."""
        block = self.basis.blocks[k]
        turned = self._rotated.new_empty(count, block.rows, block.columns)
        self.basis.turn(k, parts, turned)
        return turned

    def wants(self, k: int) -> bool:
        """Whether rows hold any coordinate of a block."""
        return self._picks is None or self._picks[k] is not None

    def _target(self, k: int) -> Tensor:
        block = self.basis.blocks[k]
        rows = self._rotated[:, self.basis.span(k)]
        target: Tensor = rows.unflatten(1, (block.rows, block.columns))
        return target

    def _scaled_whole(self, entry: int, start: int, count: int) -> Tensor:
        rows = self._whole[entry][start : start + count]
        if self.root is None:
            return rows
        first = self.layout.entries[entry].start
        root = self.root[first : first + self.layout.size(entry)]
        return rows * root.view(rows.shape[1:])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pick:
    """The coordinates of a block that are wanted: their columns among all wanted, their places in the block."""

    span: slice
    flat: Tensor
    rows: Tensor
    columns: Tensor


def _picks(basis: Eigenbasis, coordinates: Tensor) -> list[_Pick | None]:
    """Return the coordinates block by block; None where none is wanted."""
    found: list[_Pick | None] = []
    for k, block in enumerate(basis.blocks):
        own = basis.span(k)
        start, stop = torch.searchsorted(coordinates, coordinates.new_tensor([own.start, own.stop])).tolist()
        if start == stop:
            found.append(None)
            continue
        flat = coordinates[start:stop] - own.start
        pick = _Pick(
            span=slice(start, stop), flat=flat, rows=flat // block.columns, columns=flat % block.columns
        )
        found.append(pick)
    return found
