"""Per-group settings spread over coordinates: the one place where groups become columns."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Columns:
    """Turns one value per parameter group into factors for coordinates.

    Args:
        groups_D: Parameter group of each coordinate, -1: not optimised; of parameters, of some of their
            columns, or of eigendirections.
        dtype: Of the factors.
        device: Where they are used.
    """

    def __init__(self, groups_D: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        one = bool(len(groups_D)) and bool((groups_D == groups_D[0]).all())
        self.single = int(groups_D[0]) if one else None
        self.groups = groups_D.to(device)
        self.dtype, self.device = dtype, device

    def spread(self, per_group: npt.NDArray[np.float64]) -> Tensor:
        """Return (1,) when all coordinates share a group, else (D,); not optimised coordinates get 0."""
        if self.single is None:
            return self.whole(per_group)
        return self._table(per_group)[self.single].reshape(1)

    def whole(self, per_group: npt.NDArray[np.float64]) -> Tensor:
        """Return (D,) in any case."""
        return self._table(per_group)[self.groups]

    def spans(self) -> Iterator[tuple[slice, int]]:
        """Yield the runs of neighbouring coordinates in one group; those in none are left out."""
        values, counts = torch.unique_consecutive(self.groups, return_counts=True)
        start = 0
        for group, count in zip(values.tolist(), counts.tolist(), strict=True):
            if group >= 0:
                yield slice(start, start + count), group
            start += count

    def _table(self, per_group: npt.NDArray[np.float64]) -> Tensor:
        # Group -1 picks the appended zero.
        return torch.from_numpy(np.append(per_group, 0.0)).to(device=self.device, dtype=self.dtype)
