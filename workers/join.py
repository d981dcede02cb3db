"""The join: contributions of a strip of tracked samples to all test samples, by matrix product.

``C(i, j) = -(1/N) <hypergradient_i, gradient_j>`` (Eq. 8 and 9). Shape letters: R tracked samples of
a strip, M test samples, P test samples of a panel, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.floating]
Bounds = Sequence[tuple[int, int]]


class Panels:
    """Test gradients in panels of a few rows, read one ahead; kept when there is only one.

    Args:
        read: Gives rows ``start`` to ``stop``, shape (P, D).
        bounds: Start and stop of each panel.
        device: Where they are multiplied.
    """

    def __init__(self, read: Callable[[int, int], Floats], bounds: Bounds, device: torch.device) -> None:
        self.read, self.bounds, self.device = read, bounds, device
        self._only: torch.Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        if len(self.bounds) == 1:
            if self._only is None:
                self._only = torch.from_numpy(self.read(*self.bounds[0])).to(self.device)
            yield (*self.bounds[0], self._only)
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.read, *self.bounds[0])
            for index, (start, stop) in enumerate(self.bounds):
                panel = torch.from_numpy(coming.result()).to(self.device)
                if index + 1 < len(self.bounds):
                    coming = ahead.submit(self.read, *self.bounds[index + 1])
                yield start, stop, panel


def contributions(hypergradient_RD: Floats, panels: Panels, n_train: int, out_RM: Floats) -> None:
    """Write C of one strip into ``out_RM``, shape (R, M), in the stores' dtype.

    Args:
        hypergradient_RD: The strip.
        panels: The test gradients, columns 0 to M.
        n_train: N.
        out_RM: Receives the contributions.
    """
    left = torch.from_numpy(hypergradient_RD).to(panels.device)
    out = torch.from_numpy(out_RM)
    for start, stop, right in panels:
        out[:, start:stop] = torch.mm(left, right.T)
    out /= -float(n_train)
