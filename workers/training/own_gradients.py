"""The gradient of each training sample's own loss at weights that stay, and what is asked of it.

Letters: R rows worked on at a time, D parameters in P tensors, G parameter groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset

from ...storage.errors import InputError
from ..model.layout import Layout
from .test_gradients import TestGradients

Floats = npt.NDArray[np.float64]

MOST_DIMENSIONS = 5120
"""Up to so many numbers rows are looked at as they are; longer ones are projected."""

DISTORTION = 0.1
"""Johnson and Lindenstrauss's eps of a projection, where that asks for fewer than `MOST_DIMENSIONS`."""


class OwnGradients(TestGradients):
    """d loss_i(w) / d w for training samples i: eval mode, the record's w_T unless another checkpoint is loaded."""

    WHAT = "train"

    def _dataset(self) -> Dataset[Any]:
        return self.training.dataset


def norms(rows: Tensor, layout: Layout) -> tuple[Floats, Floats]:
    """Return the sums of absolute values and of squares of each parameter tensor's part of rows (R, D).

    Returns:
        Two (R, P) arrays, summed in float64, the work of one tensor at a time.
    """
    absolute = np.empty((len(rows), len(layout.entries)))
    square = np.empty_like(absolute)
    for k, entry in enumerate(layout.entries):
        part = rows[:, entry.start : entry.start + layout.size(k)].double()
        absolute[:, k] = part.abs().sum(1).numpy()
        square[:, k] = part.square().sum(1).numpy()
    return absolute, square


def products(rows: Tensor, others: npt.NDArray[np.floating]) -> Floats:
    """Return <rows[r], others[r]> of two (R, D) blocks, in float64, (R,); a row at a time is widened."""
    pairs = zip(rows.numpy(), others, strict=True)
    return np.array([float(a.astype(np.float64) @ b.astype(np.float64)) for a, b in pairs])


def chosen_tensors(names: Sequence[str], layer: str) -> list[int]:
    """Return which parameter tensors a layer is: all, one by its name, or those of a module.

    Args:
        names: Of all parameters, in the order of the flat vector.
        layer: ``all``, the name of a parameter, or that of a module: all parameters below it.

    Raises:
        InputError: There is none of that name; names those there are.
    """
    if layer == "all":
        return list(range(len(names)))
    found = [k for k, name in enumerate(names) if name == layer or name.startswith(f"{layer}.")]
    if not found:
        modules = [name.rpartition(".")[0] for name in names if "." in name]
        there = list(dict.fromkeys(["last", "all", *modules, *names]))
        shown = ", ".join(there[:40]) + (", ..." if len(there) > 40 else "")
        raise InputError(f"layer {layer!r}: the model has no such layer or parameter; it has {shown}")
    return found


def projected_width(dimensions: int, samples: int) -> int:
    """Return how many numbers rows of ``dimensions`` have as they are looked at.

    As many as they have, up to `MOST_DIMENSIONS`; else as many as Johnson and Lindenstrauss ask for that many
    samples (``eps`` `DISTORTION`), and at most `MOST_DIMENSIONS`.
    """
    if dimensions <= MOST_DIMENSIONS:
        return dimensions
    from sklearn.random_projection import johnson_lindenstrauss_min_dim

    asked = int(johnson_lindenstrauss_min_dim(n_samples=samples, eps=DISTORTION))
    return max(1, min(asked, MOST_DIMENSIONS))


class Projection:
    """Takes rows of D numbers to fewer by a seeded sparse random matrix, or leaves them as they are.

    scikit-learn's ``SparseRandomProjection`` of density 1 / sqrt(D): about ``width * sqrt(D)`` numbers are held.

    Args:
        dimensions: Of a row.
        samples: How many rows there are in all.
        seed: Of the matrix.

    Attributes:
        width: Numbers of a row afterwards.
    """

    def __init__(self, dimensions: int, samples: int, seed: int) -> None:
        self.width = projected_width(dimensions, samples)
        self._matrix: Any = None
        if self.width < dimensions:
            from sklearn.random_projection import SparseRandomProjection

            made = SparseRandomProjection(n_components=self.width, dense_output=True, random_state=seed)
            self._matrix = made.fit(np.zeros((1, dimensions), dtype=np.float32))

    def __call__(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Return (R, width) float32."""
        wide = np.ascontiguousarray(rows, dtype=np.float32)
        if self._matrix is None:
            return wide
        return np.ascontiguousarray(self._matrix.transform(wide), dtype=np.float32)
