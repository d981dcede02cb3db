"""The hypergradient buffers of a shard: what has been summed up of n rows of D numbers.

Most parameters have a dense accumulator, added to whenever a tracked sample is visited. The weight
of a Linear layer is kept as factors instead: a visit's gradient is an outer product of O + I
numbers, not O x I, so the visits of a few epochs are cheaper to keep than to add up. The rows are
formed from them when they are read, a few at a time. Every row's sum is taken in the same order
and with the same shapes whatever other rows the shard has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..model.layout import Layout
from ..persample.engine import TILE
from ..persample.rules import ALIGNMENT

logger = logging.getLogger(__name__)

DEVICE_SHARE = 0.8
"""Largest share of the free device memory that buffers may take; the training step needs the rest."""

FACTOR_SHARE = 0.25
"""Factors of a weight that needs a dense buffer too may take this share of it."""


def factor_slots(shape: Sequence[int], epochs: int) -> int:
    """Return how many visits of a Linear weight (O, I) are kept as factors; 0: none.

    All ``epochs`` of them when that takes less room than the dense rows, else as many as fit
    ``FACTOR_SHARE`` of those.
    """
    if len(shape) != 2:
        return 0
    dense, visit = shape[0] * shape[1], _up(shape[0]) + _up(shape[1])
    if epochs * visit <= dense:
        return epochs
    slots = int(FACTOR_SHARE * dense / visit)
    return slots if slots >= 2 else 0


def row_numbers(
    layout: Layout, factored: frozenset[int], epochs: int, left_out: frozenset[int] = frozenset()
) -> int:
    """Return how many numbers the buffers hold per tracked sample."""
    total = 0
    for i, entry in enumerate(layout.entries):
        if i in left_out:
            continue
        slots = factor_slots(entry.shape, epochs) if i in factored else 0
        if slots:
            total += slots * (_up(entry.shape[0]) + _up(entry.shape[1]))
        total += 0 if slots == epochs else layout.size(i)
    return total


def _up(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class HypergradientBuffers:
    """Sums of per-sample gradients, on the device or in pinned host memory.

    Args:
        rows: Tracked samples of the shard.
        layout: Where each parameter lies.
        factored: Entries whose gradients come as factors.
        columns: First column of the other entries in the blocks that are added; None: not asked for.
        epochs: Epochs of the run: visits of each sample.
        dtype: Of the hypergradients.
        device: Where the training runs.
    """

    def __init__(
        self,
        rows: int,
        layout: Layout,
        factored: frozenset[int],
        columns: Sequence[int | None],
        epochs: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rows, self.layout, self.columns = rows, layout, columns
        left_out = frozenset(i for i, c in enumerate(columns) if c is None) - factored
        self._kept = [i for i in range(len(columns)) if i not in left_out]
        numbers = rows * row_numbers(layout, factored, epochs, left_out)
        self.home, pinned = home_of(numbers * dtype.itemsize, device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.home, pin_memory=pinned)

        width = sum(layout.size(i) for i, column in enumerate(columns) if column is not None)
        self.dense = zeros(rows, width)
        self.factors = {
            i: _Factors(
                rows, layout.entries[i].shape, factor_slots(layout.entries[i].shape, epochs), epochs, zeros
            )
            for i in sorted(factored)
        }

    def add(self, rows: Tensor, block: Tensor, scale: float | Tensor) -> None:
        """Add ``scale * block`` to the dense part of the given rows.

        Args:
            rows: (R,) distinct row numbers.
            block: (R, width) per-sample gradients; overwritten.
            scale: One factor, or (width,) one per column.
        """
        factor = 1.0
        if isinstance(scale, float):
            factor = scale
        else:
            block *= scale
        self.dense.index_add_(0, rows.to(self.home), block.to(self.home), alpha=factor)

    def add_factors(
        self, entry: int, rows: Tensor, d_R: Tensor, x_R: Tensor | None, scale: float | Tensor
    ) -> None:
        """Note a visit: the gradient of row r is ``scale`` times the outer product of d_R[r] and x_R[r].

        Where x_R is None, d_R holds the gradients themselves, (R, O, I); see ``engine.TakeFactors``.
        """
        if x_R is not None:
            self.factors[entry].note(rows.to(self.home), (d_R * scale).to(self.home), x_R.to(self.home))
            return
        if isinstance(scale, Tensor):
            d_R, scale = d_R * scale, 1.0
        self.factors[entry].add(rows.to(self.home), d_R.to(self.home), scale)

    def end_epoch(self) -> None:
        """Fold factors into the dense rows where their slots are used up; fixed epochs, all rows."""
        for factors in self.factors.values():
            factors.end_epoch()

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return rows as a (stop - start, D) array on the host: of the parameters that are asked for."""
        width = sum(self.layout.size(i) for i in self._kept)
        out, at = torch.empty(stop - start, width, dtype=self.dense.dtype), 0
        for i in self._kept:
            size, column = self.layout.size(i), self.columns[i]
            target = out[:, at : at + size]
            at += size
            if column is not None:
                target.copy_(self.dense[start:stop, column : column + size])
            else:
                self.factors[i].form(start, stop, target.view(-1, *self.layout.entries[i].shape))
        array: npt.NDArray[np.floating] = out.numpy()
        return array


class _Factors:
    """Visits of one Linear weight (O, I): left (n, V, O) and right (n, V, I), padded, V visits."""

    def __init__(
        self, rows: int, shape: Sequence[int], slots: int, epochs: int, zeros: Callable[..., Tensor]
    ) -> None:
        self.shape, self.slots, self.zeros = shape, slots, zeros
        self.count = -(-rows // TILE) * TILE
        self.left = zeros(self.count, slots, _up(shape[0]))
        self.right = zeros(self.count, slots, _up(shape[1]))
        self.folds = slots < epochs
        self.sum = zeros(self.count, *shape) if self.folds else None
        self.slot = 0

    def note(self, rows: Tensor, d_R: Tensor, x_R: Tensor) -> None:
        self.left[rows, self.slot, : self.shape[0]] = d_R
        self.right[rows, self.slot, : self.shape[1]] = x_R

    def add(self, rows: Tensor, block: Tensor, scale: float) -> None:
        if self.sum is None:  # no room was planned: a layer that is called otherwise is rare
            self.sum = self.zeros(self.count, *self.shape)
        self.sum.index_add_(0, rows, block, alpha=scale)

    def end_epoch(self) -> None:
        self.slot += 1
        if self.folds and self.slot == self.slots:
            assert self.sum is not None
            for start in range(0, self.count, TILE):
                self.sum[start : start + TILE] += self._tile(start)
            self.left.zero_()
            self.right.zero_()
            self.slot = 0

    def form(self, start: int, stop: int, out: Tensor) -> None:
        if self.slots == 1 and self.sum is None:  # one visit in all: the product goes straight to its place
            pair = zip((self.left, self.right), self.shape, strict=True)
            left, right = (factor[start:stop, 0, :size].cpu() for factor, size in pair)
            torch.mul(left.unsqueeze(2), right.unsqueeze(1), out=out)
            return
        first = start - start % TILE
        for tile in range(first, stop, TILE):
            total = self._tile(tile)
            if self.sum is not None:
                total = total + self.sum[tile : tile + TILE]
            low, high = max(start, tile), min(stop, tile + TILE)
            out[low - start : high - start] = total[low - tile : high - tile]

    def _tile(self, start: int) -> Tensor:
        left, right = self.left[start : start + TILE], self.right[start : start + TILE]
        return torch.bmm(left.transpose(1, 2), right)[:, : self.shape[0], : self.shape[1]]


def home_of(needed: int, device: torch.device) -> tuple[torch.device, bool]:
    """Return where buffers of ``needed`` bytes live, and whether that is pinned host memory."""
    if device.type != "cuda":
        return device, False
    free, _total = torch.cuda.mem_get_info(device)
    if needed <= DEVICE_SHARE * free:
        return device, False
    logger.info("buffers of %d bytes go to pinned host memory (%d free on the device)", needed, free)
    return torch.device("cpu"), True
