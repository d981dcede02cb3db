"""The hypergradient buffers of a shard: one row of D numbers per tracked sample."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DEVICE_SHARE = 0.8
"""Largest share of the free device memory that buffers may take; the training step needs the rest."""


class HypergradientBuffers:
    """Zero-initialised (rows, D) accumulators, on the device or in pinned host memory.

    Args:
        rows: Tracked samples of the shard.
        dimension: D.
        dtype: Of the hypergradients.
        device: Where the training runs.
    """

    def __init__(self, rows: int, dimension: int, dtype: torch.dtype, device: torch.device) -> None:
        self.home = device
        pinned = False
        if device.type == "cuda":
            free, _total = torch.cuda.mem_get_info(device)
            needed = rows * dimension * dtype.itemsize
            if needed > DEVICE_SHARE * free:
                logger.info("buffers of %d bytes go to pinned host memory (%d free on device)", needed, free)
                self.home, pinned = torch.device("cpu"), True
        self.data = torch.zeros(rows, dimension, dtype=dtype, device=self.home, pin_memory=pinned)

    def add(self, rows: Tensor, block: Tensor, scale: Tensor) -> None:
        """Add ``scale * block`` to the given rows.

        Args:
            rows: (R,) distinct row numbers.
            block: (R, D) per-sample gradients; overwritten.
            scale: (1,) one factor, or (D,) one per coordinate.
        """
        if len(scale) == 1:
            factor = float(scale)
        else:
            block *= scale
            factor = 1.0
        self.data.index_add_(0, rows.to(self.home), block.to(self.home), alpha=factor)

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return rows as a numpy array on the host."""
        array: npt.NDArray[np.floating] = self.data[start:stop].cpu().numpy()
        return array
