"""Sums of rows as they are kept (see ``model.row_map``): rows are folded before they are added up.

Folding is linear: the sum of folded rows is the folded sum, and no row of D numbers is ever held, but of a few samples whose
whole rows say what folding loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..model.row_map import Folds, RowMap
from ..persample.ways import Ways
from ..training.training import Training
from .buffers import home_of


class MappedSums:
    """What ``HypergradientBuffers`` is to whole rows.

    Args:
        rows: Tracked samples of the shard.
        row_map: What is kept of a row.
        sampled: Rows that are kept whole, too.
        dtype: Of the hypergradients.
        device: Where the training runs.
        columns: First column of each parameter in the blocks that are added; None: its place in the flat vector.
    """

    def __init__(
        self,
        rows: int,
        row_map: RowMap,
        sampled: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        columns: Sequence[int | None] | None = None,
    ) -> None:
        whole = row_map.whole
        numbers = rows * row_map.columns + len(sampled) * whole.columns
        self.home, pinned = home_of(numbers * dtype.itemsize, device)
        self._folds = Folds(row_map, dtype, device, columns)
        self._selects = Folds(whole, dtype, device, columns)
        self.sums = torch.zeros(rows, row_map.columns, dtype=dtype, device=self.home, pin_memory=pinned)
        self.sampled = torch.zeros(len(sampled), whole.columns, dtype=dtype, device=self.home)
        slots = torch.full((rows,), -1)
        slots[list(sampled)] = torch.arange(len(sampled))
        self._slot = slots.to(device) if len(sampled) else None

    def add(self, rows: Tensor, block: Tensor, scale: float | Tensor) -> None:
        """Add ``scale * block`` to the given rows; see ``HypergradientBuffers.add``."""
        block *= scale
        if self._slot is not None:
            slots = self._slot[rows.to(self._slot.device)]
            at = torch.nonzero(slots >= 0).flatten()
            if len(at):
                picked = self._selects.apply_(block[at])
                self.sampled.index_add_(0, slots[at].to(self.home), picked.to(self.home))
        kept = self._folds.apply_(block)
        self.sums.index_add_(0, rows.to(self.home), kept.to(self.home))

    def end_epoch(self) -> None:
        """Nothing is kept by visit."""

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return rows as a (stop - start, columns) array on the host."""
        array: npt.NDArray[np.floating] = self.sums[start:stop].cpu().numpy()
        return array

    def whole(self) -> npt.NDArray[np.floating]:
        """Return the sampled rows before they are folded."""
        array: npt.NDArray[np.floating] = self.sampled.cpu().numpy().copy()
        return array


def unasked(training: Training, row_map: RowMap | None) -> frozenset[int]:
    """Return the parameters whose gradients nobody needs.

    None where steps are clipped: what clipping makes of a row depends on all of it.
    """
    if row_map is None or training.max_norm is not None:
        return frozenset()
    return frozenset(range(len(row_map.entries))) - row_map.picked


def asked_ways(ways: Ways, left_out: frozenset[int]) -> Ways:
    """Return the ways to the gradients of all parameters but some."""
    if not left_out:
        return ways
    strategies = tuple("none" if i in left_out else way for i, way in enumerate(ways.strategies))
    return replace(ways, strategies=strategies, untried=ways.untried - left_out)


def is_mapped(training: Training, row_map: RowMap | None) -> bool:
    """Whether rows are folded, or picked from whole ones, before they are added up."""
    return row_map is not None and (row_map.folds or training.max_norm is not None)
