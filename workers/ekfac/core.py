"""The core of an eigenbasis: its leading coordinates, turned once more so that they do not couple.

A Kronecker-factored basis is fixed layer by layer and, inside a layer, for inputs and outputs apart.
The few coordinates that hold most of the curvature are coupled all the same, across layers too. Their
full matrix of second moments is small: C x C, whatever D is. Its eigenvectors turn these coordinates
into ones that are coupled no more; all others stay as they are, and the whole stays orthogonal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.curvature import CoreBasis
from ..persample.engine import TILE
from ..persample.rules import ALIGNMENT

Matrix = npt.NDArray[np.float64]


class Core:
    """Turns the core of rows in an eigenbasis, in place.

    On a CPU rows go through in tiles of a fixed size, padded: a row's bits depend on no other row.

    Args:
        basis: Coordinates and eigenvectors.
        dtype: Of the rows.
        device: Where they are.
        tile: Rows of a tile.
    """

    def __init__(self, basis: CoreBasis, dtype: torch.dtype, device: torch.device, tile: int = TILE) -> None:
        self.basis, self.count, self.tile = basis, len(basis.coordinates), tile
        self.index = torch.from_numpy(basis.coordinates).to(device)
        width = -(-self.count // ALIGNMENT) * ALIGNMENT
        vectors = torch.zeros(width, width, dtype=dtype, device=device)
        vectors[: self.count, : self.count] = torch.from_numpy(basis.vectors).to(device=device, dtype=dtype)
        self._forth, self._back = vectors, vectors.T.contiguous()
        self._taken = torch.zeros(tile, width, dtype=dtype, device=device)
        self._turned = torch.empty_like(self._taken)

    @property
    def like(self) -> Tensor:
        """A tensor of the rows' type and place."""
        return self._taken

    def among(self, coordinates: Tensor) -> Core:
        """Return the same for rows of some coordinates, ascending, the core's own being among them."""
        places = torch.searchsorted(coordinates, self.index).cpu().numpy()
        moved = CoreBasis(coordinates=places, vectors=self.basis.vectors)
        return Core(moved, self.like.dtype, self.like.device, self.tile)

    def turn(self, rows_nD: Tensor, *, back: bool = False) -> None:
        """Replace the core x of every row by ``x vectors``, or with ``back`` by ``x vectors^T``."""
        matrix = self._back if back else self._forth
        if rows_nD.device.type != "cpu":
            matrix = matrix[: self.count, : self.count]
            rows_nD.index_copy_(1, self.index, rows_nD.index_select(1, self.index) @ matrix)
            return
        for start in range(0, len(rows_nD), self.tile):
            rows = rows_nD[start : start + self.tile]
            self._taken[: len(rows), : self.count] = rows.index_select(1, self.index)
            torch.mm(self._taken, matrix, out=self._turned)
            rows.index_copy_(1, self.index, self._turned[: len(rows), : self.count])


def leading(eigenvalues_KD: Matrix, groups_D: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Return the coordinates of the largest mean eigenvalue, ascending; frozen ones (group -1) never."""
    mean = np.where(groups_D < 0, -1.0, eigenvalues_KD.mean(0))
    count = min(count, int((groups_D >= 0).sum()))
    chosen: npt.NDArray[np.int64] = np.sort(np.argsort(-mean, kind="stable")[:count])
    return chosen


def decoupled(moments_KCC: Matrix, groups_C: npt.NDArray[np.int64]) -> tuple[Matrix, Matrix]:
    """Return the eigenvectors of the mean of second moments, and their moments at each checkpoint.

    Coordinates of different parameter groups are never mixed: each group has its own learning rate.

    Args:
        moments_KCC: E[x x^T] of the core at each of K checkpoints.
        groups_C: Parameter group of each coordinate.

    Returns:
        Eigenvectors (C, C) as columns; ``E[(x vectors)^2]``, (K, C).
    """
    mean = moments_KCC.mean(0)
    vectors = np.zeros_like(mean)
    for group in np.unique(groups_C):
        own = np.flatnonzero(groups_C == group)
        vectors[np.ix_(own, own)] = axes(mean[np.ix_(own, own)])
    return vectors, np.einsum("ci,kcd,di->ki", vectors, moments_KCC, vectors, optimize=True)


def axes(matrix: Matrix) -> Matrix:
    """Return the eigenvectors of a symmetric matrix as columns, signs fixed."""
    _values, vectors = np.linalg.eigh(matrix)
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    result: Matrix = vectors * np.where(signs == 0, 1, signs)
    return result
