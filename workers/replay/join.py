"""The join: contributions of a strip of tracked samples to all test samples, by matrix product.

``C(i, j) = -(1/N) <hypergradient_i, gradient_j>`` (Eq. 8 and 9). Shape letters: n tracked samples of
a strip, M test samples, R test samples of a panel, D parameters.
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
    """Rows of a store in panels, read one ahead into two buffers; kept when there is only one.

    Fresh memory is slow to touch for the first time, so the same two buffers serve every panel: a
    panel is valid until the next but one is asked for.

    Args:
        read: Fills a given array with rows ``start`` to ``stop``, shape (R, D), and returns it.
        bounds: Start and stop of each panel.
        columns: D.
        dtype: Of the rows.
        device: Where they are multiplied.
    """

    def __init__(
        self,
        read: Callable[[int, int, Floats], Floats],
        bounds: Bounds,
        columns: int,
        dtype: npt.DTypeLike,
        device: torch.device,
    ) -> None:
        self.read, self.bounds, self.device = read, bounds, device
        longest = max((stop - start for start, stop in bounds), default=0)
        self._buffers = [np.empty((longest, columns), dtype) for _ in range(min(2, len(bounds)))]
        self._only: torch.Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        if len(self.bounds) == 1:
            if self._only is None:
                self._only = self._panel(0)
            yield (*self.bounds[0], self._only)
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._panel, 0)
            for index, (start, stop) in enumerate(self.bounds):
                panel = coming.result()
                if index + 1 < len(self.bounds):
                    coming = ahead.submit(self._panel, index + 1)
                yield start, stop, panel

    def _panel(self, index: int) -> torch.Tensor:
        start, stop = self.bounds[index]
        array = self.read(start, stop, self._buffers[index % 2][: stop - start])
        return torch.from_numpy(array).to(self.device)


def contributions(hypergradient_nD: torch.Tensor, panels: Panels, n_train: int, out_nM: Floats) -> None:
    """Write C of one strip into ``out_nM``, shape (n, M), in the stores' dtype.

    Args:
        hypergradient_nD: The strip, on the panels' device; in the panels' dtype or a narrower one.
        panels: The test gradients, columns 0 to M.
        n_train: N.
        out_nM: Receives the contributions.
    """
    out = torch.from_numpy(out_nM)
    for start, stop, right in panels:
        out[:, start:stop] = torch.mm(hypergradient_nD.to(right.dtype), right.T)
    out /= -float(n_train)
