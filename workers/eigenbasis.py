"""The flat vector in the eigenbasis of the curvature: rotations there and back.

D coordinates, block after block (see ``storage.curvature``); n rows. A block's coordinates are
``left^T G right``, G the (O, K) matrix of a weight with its bias as last column. The core is turned last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..storage.curvature import BlockBasis, CoreBasis
from .core import Core
from .layout import Layout


class Eigenbasis:
    """Rotates rows of D numbers between parameters and eigenbasis.

    Args:
        blocks: Every parameter of the layout in exactly one block.
        layout: Where parameters lie in the flat vector.
        dtype: Of the rows.
        device: Where they are.
        core: Coordinates that are turned once more, all blocks together; None: none are. No default:
            eigenvalues belong to the basis with its core.
    """

    def __init__(
        self,
        blocks: Sequence[BlockBasis],
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        core: CoreBasis | None,
    ) -> None:
        self.blocks, self.layout = tuple(blocks), layout
        self.core = None if core is None else Core(core, dtype, device)

        def put(matrix: npt.NDArray[np.float64] | None) -> Tensor | None:
            return None if matrix is None else torch.from_numpy(matrix).to(device=device, dtype=dtype)

        self.left = [put(block.left) for block in self.blocks]
        self.right = [put(block.right) for block in self.blocks]
        self.starts: list[int] = []
        start = 0
        for block in self.blocks:
            self.starts.append(start)
            start += block.rows * block.columns
        assert start == layout.dimension

    def span(self, k: int) -> slice:
        """Return the coordinates of block ``k``."""
        return slice(self.starts[k], self.starts[k] + self.blocks[k].rows * self.blocks[k].columns)

    def groups(self) -> Tensor:
        """Return the optimiser group of every coordinate, (D,)."""
        out = torch.empty(self.layout.dimension, dtype=torch.int64)
        for k, block in enumerate(self.blocks):
            out[self.span(k)] = self.layout.entries[block.entries[0]].group
        return out

    def matrix(self, k: int, rows_nD: Tensor) -> Tensor:
        """Return block ``k`` of rows in parameter order, (n, O, K)."""
        block, parts = self.blocks[k], []
        for i in block.entries:
            start = self.layout.entries[i].start
            parts.append(
                rows_nD[:, start : start + self.layout.size(i)].reshape(len(rows_nD), block.rows, -1)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def turn(self, k: int, matrix_nOK: Tensor) -> Tensor:
        """Rotate block ``k`` into the eigenbasis, (n, O, K)."""
        return _between(self.left[k], matrix_nOK, self.right[k], back=False)

    def to_eigen(self, rows_nD: Tensor) -> Tensor:
        """Rotate rows from parameters into the eigenbasis."""
        out = torch.empty_like(rows_nD)
        for k in range(len(self.blocks)):
            out[:, self.span(k)] = self.turn(k, self.matrix(k, rows_nD)).flatten(1)
        if self.core is not None:
            self.core.turn(out)
        return out

    def to_parameters(self, rows_nD: Tensor) -> Tensor:
        """Rotate rows from the eigenbasis back to parameters."""
        out = torch.empty_like(rows_nD)
        if self.core is not None:
            rows_nD = rows_nD.clone()
            self.core.turn(rows_nD, back=True)
        for k, block in enumerate(self.blocks):
            value = rows_nD[:, self.span(k)].reshape(-1, block.rows, block.columns)
            value = _between(self.left[k], value, self.right[k], back=True)
            first = 0
            for i in block.entries:
                size = self.layout.size(i)
                width = size // block.rows
                start = self.layout.entries[i].start
                out[:, start : start + size] = value[:, :, first : first + width].flatten(1)
                first += width
        return out


def _between(left: Tensor | None, matrix_nOK: Tensor, right: Tensor | None, *, back: bool) -> Tensor:
    """Return ``left^T M right`` (``back``: ``left M right^T``) of every row, (n, O, K).

    On a CPU each row is multiplied alone, copied to memory that begins on a cache line: then its
    bits depend neither on its place among the rows nor on their number.
    """
    if left is None and right is None:
        return matrix_nOK
    a = None if left is None else (left if back else left.T)
    b = None if right is None else (right.T if back else right)
    if matrix_nOK.device.type != "cpu":
        out = matrix_nOK if b is None else torch.matmul(matrix_nOK, b)
        return out if a is None else torch.matmul(a, out)
    out = torch.empty(matrix_nOK.shape, dtype=matrix_nOK.dtype)
    row = torch.empty(matrix_nOK.shape[1:], dtype=matrix_nOK.dtype)
    half, whole = torch.empty_like(row), torch.empty_like(row)
    for r in range(len(matrix_nOK)):
        row.copy_(matrix_nOK[r])
        turned = row if b is None else torch.mm(row, b, out=half)
        out[r] = turned if a is None else torch.mm(a, turned, out=whole)
    return out
