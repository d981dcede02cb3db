"""The flat vector in the eigenbasis of the curvature: rotations there and back.

D coordinates, block after block (see ``storage.curvature``); n rows. A block's coordinates are
``left^T w right``, w the (O, I) matrix of a weight with its bias as last column. The core is turned last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.curvature import BlockBasis, CoreBasis
from ..model.layout import Layout
from ..persample.engine import TILE
from ..persample.rules import aligned
from .core import Core

TURN_NUMBERS = 1 << 16
"""Numbers of rows that are rotated at a time: they stay in a core's cache."""

MOST_ROWS, TILE_NUMBERS = 64, 1 << 18
"""Rows of a tile of a small model, at most, and numbers of a tile: what stays in a core's cache."""

TURNED_AXES = 8
"""Axes of the core that are turned back at a time."""


def wide_tile(dimension: int) -> int:
    """Return how many rows to take at a time where a call costs more than its numbers; ``TILE`` at least."""
    return max(TILE, min(MOST_ROWS, TILE_NUMBERS // max(1, dimension) // TILE * TILE))


class Eigenbasis:
    """Rotates rows of D numbers between parameters and eigenbasis.

    Args:
        blocks: Every parameter of the layout in exactly one block.
        layout: Where parameters lie in the flat vector.
        dtype: Of the rows.
        device: Where they are.
        core: Coordinates that are turned once more, all blocks together; None: none are. No default:
            eigenvalues belong to the basis with its core.
        tile: Rows taken at a time on a CPU.
    """

    def __init__(
        self,
        blocks: Sequence[BlockBasis],
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        core: CoreBasis | None,
        tile: int = TILE,
    ) -> None:
        self.blocks, self.layout = tuple(blocks), layout
        self.core = None if core is None else Core(core, dtype, device, tile)
        self.tile = tile

        self._turns = [_Turn(block, dtype, device) for block in self.blocks]
        self.left = [turn.left for turn in self._turns]
        self.right = [turn.right for turn in self._turns]
        self.starts: list[int] = []
        start = 0
        for block in self.blocks:
            self.starts.append(start)
            start += block.rows * block.columns
        assert start == layout.dimension

    def span(self, k: int) -> slice:
        """Return the coordinates of block ``k``."""
        return slice(self.starts[k], self.starts[k] + self.blocks[k].rows * self.blocks[k].columns)

    def lanes(self, lanes: Sequence[int]) -> Tensor:
        """Return the lane of every coordinate, (D,), given that of every parameter."""
        out = torch.empty(self.layout.dimension, dtype=torch.int64)
        for k, block in enumerate(self.blocks):
            out[self.span(k)] = lanes[block.entries[0]]
        return out

    def turn(self, k: int, parts: Sequence[Tensor], out_nOI: Tensor) -> None:
        """Rotate block ``k`` into the eigenbasis.

        Args:
            k: Which block.
            parts: Its parameters' rows, each (n, O, width), which side by side are (n, O, I).
            out_nOI: Where the result goes.
        """
        self._turns[k].there(parts, out_nOI)

    def to_eigen(self, rows_nD: Tensor) -> Tensor:
        """Rotate rows from parameters into the eigenbasis."""
        out = torch.empty_like(rows_nD)
        for k, block in enumerate(self.blocks):
            parts = []
            for i in block.entries:
                start = self.layout.entries[i].start
                part = rows_nD[:, start : start + self.layout.size(i)]
                parts.append(part.unflatten(1, (block.rows, -1)))
            self.turn(k, parts, out[:, self.span(k)].unflatten(1, (block.rows, block.columns)))
        if self.core is not None:
            self.core.turn(out)
        return out

    def matrix(self, flat_D: Tensor, k: int) -> Tensor:
        """Return the part of a vector in parameters that is block ``k``, (O, I)."""
        parts = []
        for i in self.blocks[k].entries:
            start = self.layout.entries[i].start
            part = flat_D[start : start + self.layout.size(i)]
            parts.append(part.reshape(self.blocks[k].rows, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def turned(self, flat_D: Tensor) -> Tensor:
        """Rotate one vector from parameters into the eigenbasis, (D,): no row of many, so without their padding."""
        parts = []
        for k in range(len(self.blocks)):
            matrix, left, right = self.matrix(flat_D, k), self.left[k], self.right[k]
            matrix = matrix if right is None else torch.mm(matrix, right)
            matrix = matrix if left is None else torch.mm(left.T, matrix)
            parts.append(matrix.reshape(-1))
        out = torch.cat(parts)
        if self.core is not None:
            self.core.turn(out[None])
        return out

    def to_parameters(self, rows_nD: Tensor) -> Tensor:
        """Rotate rows from the eigenbasis back to parameters."""
        out = torch.empty_like(rows_nD)
        if self.core is not None:
            rows_nD = rows_nD.clone()
            self.core.turn(rows_nD, back=True)
        for k, block in enumerate(self.blocks):
            parts = []
            for i in block.entries:
                start = self.layout.entries[i].start
                part = out[:, start : start + self.layout.size(i)]
                parts.append(part.unflatten(1, (block.rows, -1)))
            self._turns[k].back(rows_nD[:, self.span(k)].unflatten(1, (block.rows, block.columns)), parts)
        return out


def diagonal(basis: Eigenbasis, values_D: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the diagonal of Q^T diag(values) Q, in the order of the eigenbasis, (D,) float64."""
    out = np.empty(basis.layout.dimension)
    for k, block in enumerate(basis.blocks):
        parts = []
        for i in block.entries:
            start = basis.layout.entries[i].start
            parts.append(values_D[start : start + basis.layout.size(i)].reshape(block.rows, -1))
        matrix = np.concatenate(parts, 1)
        matrix = matrix if block.left is None else np.square(block.left).T @ matrix
        matrix = matrix if block.right is None else matrix @ np.square(block.right)
        out[basis.span(k)] = matrix.reshape(-1)
    if basis.core is not None:  # coordinates across blocks: their axes one after the other
        index = basis.core.index.cpu().numpy()
        like, values = basis.core.like, torch.from_numpy(values_D)
        for start in range(0, len(index), TURNED_AXES):
            some = index[start : start + TURNED_AXES]
            axes = like.new_zeros(len(some), basis.layout.dimension)
            axes[np.arange(len(some)), some] = 1.0
            out[some] = (basis.to_parameters(axes).cpu().double().square() * values).sum(1).numpy()
    return out


class _Turn:
    """Rotates the rows of one block, a few at a time, in buffers that stay in cache.

    Everything is padded to whole cache lines, so that each row is the same product wherever it lies
    among the others and however many there are: then its bits are, too.
    """

    def __init__(self, block: BlockBasis, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.columns = block.rows, block.columns
        self._buffer: Tensor | None

        def put(matrix: npt.NDArray[np.float64] | None) -> Tensor | None:
            return None if matrix is None else torch.from_numpy(matrix).to(device=device, dtype=dtype)

        self.left, self.right = put(block.left), put(block.right)
        self._left = None if self.left is None else _padded(self.left)
        self._right = None if self.right is None else _padded(self.right)
        if self.left is None and self.right is None:
            self._buffer = None
            return
        like = torch.empty(0, dtype=dtype, device=device)
        per_row = math.prod(aligned(like, 1, self.rows, self.columns).shape)
        self._buffer = aligned(like, max(1, TURN_NUMBERS // per_row), self.rows, self.columns)

    def there(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Write ``left^T w right`` of every row; w is the parts side by side."""
        left = None if self._left is None else self._left.T
        for span in self._spans(len(out)):
            out[span] = self._product(left, [part[span] for part in parts], self._right)

    def back(self, matrix: Tensor, parts: Sequence[Tensor]) -> None:
        """Write ``left w right^T`` of every row into the parts."""
        right = None if self._right is None else self._right.T
        for span in self._spans(len(matrix)):
            found = self._product(self._left, [matrix[span]], right)
            for part, columns in zip(parts, found.split([part.shape[2] for part in parts], 2), strict=True):
                part[span] = columns

    def _spans(self, count: int) -> list[slice]:
        step = max(1, count) if self._buffer is None else len(self._buffer)
        return [slice(start, min(count, start + step)) for start in range(0, count, step)]

    def _product(self, left: Tensor | None, parts: Sequence[Tensor], right: Tensor | None) -> Tensor:
        if self._buffer is None:
            return parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)
        count = len(parts[0])
        value, start = self._buffer[:count], 0
        for part in parts:
            value[:, : self.rows, start : start + part.shape[2]] = part
            start += part.shape[2]
        if right is not None:
            value = torch.bmm(value, right.expand(count, -1, -1))
        if left is not None:
            value = torch.bmm(left.expand(count, -1, -1), value)
        return value[:, : self.rows, : self.columns]


def _padded(matrix: Tensor) -> Tensor:
    """Return a square matrix with zeros up to whole cache lines."""
    out = aligned(matrix, 1, *matrix.shape)[0]
    out[: len(matrix), : len(matrix)] = matrix
    return out
