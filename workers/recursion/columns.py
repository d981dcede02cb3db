"""Per-group settings spread over the flat coordinates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..model.layout import Layout
from .coefficients import Settings, linear_form


class Columns:
    """Turns one value per parameter group into a factor for flat vectors.

    Args:
        layout: Where the groups lie.
        dtype: Of the factors.
        device: Where they are used.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        groups = layout.column_groups()
        self.single = int(groups[0]) if bool((groups == groups[0]).all()) else None
        self.groups = groups.to(device)
        self.dtype, self.device = dtype, device

    def spread(self, per_group: npt.NDArray[np.float64]) -> Tensor:
        """Return (1,) when all coordinates share a group, else (D,); not optimised coordinates get 0."""
        table = torch.from_numpy(np.append(per_group, 0.0)).to(device=self.device, dtype=self.dtype)
        return table[self.single].reshape(1) if self.single is not None else table[self.groups]


class LinearSteps:
    """The optimiser's step as ``m' = p m + k G``, ``w' = w - h (a m' + b G)``, G = gradient + L w.

    Each factor is a tensor that multiplies flat vectors; see ``coefficients.linear_form``.
    """

    def __init__(self, settings: Settings, columns: Columns) -> None:
        self.columns = columns
        self.carry, self.gain, self.along, self.direct = linear_form(settings)
        self.rate, self.decay = settings.learning_rate, settings.weight_decay

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return (p, k, h a, h b, L) of a step."""
        spread = self.columns.spread
        rate = self.rate[step]
        return (
            spread(self.carry[step]),
            spread(self.gain[step]),
            spread(rate * self.along[step]),
            spread(rate * self.direct[step]),
            spread(self.decay[step]),
        )
