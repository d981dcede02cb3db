"""Clipping by the global norm, as ``torch.nn.utils.clip_grad_norm_`` does it, and its derivative.

    k = min(1, c / (n + 1e-6)),  n = |G|:   g = k G,   dg = k (dG - G <G, dG> / (n (n + 1e-6)))   where k < 1

The derivative is symmetric: the same map takes tangents forwards and adjoint vectors backwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...storage.errors import RecipeError

EPSILON = 1e-6
"""What torch adds to the norm."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clip:
    """What clipping makes of one step's gradient.

    Attributes:
        gradient: G (D,), unclipped.
        norm: n; NaN where nothing clips.
        factor: k; 1: nothing happens.
    """

    gradient: Tensor
    norm: float = float("nan")
    factor: float = 1.0

    @property
    def active(self) -> bool:
        """Whether the gradient is made shorter."""
        return self.factor < 1.0

    @property
    def share(self) -> float:
        """What <G, dG> G is multiplied with in the derivative, 1 / (n (n + 1e-6))."""
        return 1.0 / (self.norm * (self.norm + EPSILON))

    def clipped(self) -> Tensor:
        """Return the gradient that the optimiser sees, (D,)."""
        return self.gradient * self.factor if self.active else self.gradient

    def map_(self, changes_RD: Tensor) -> Tensor:
        """Turn changes of G into changes of the clipped gradient, in place."""
        if self.active:
            along = (changes_RD * self.gradient).sum(-1, keepdim=True)
            changes_RD.sub_(along * (self.gradient / (self.norm * (self.norm + EPSILON)))).mul_(self.factor)
        return changes_RD

    def lost(self) -> Tensor | None:
        """Return what the map takes from the mean of all samples' gradients, k G <G, G> / (n (n + 1e-6))."""
        if not self.active:
            return None
        share = float(torch.dot(self.gradient, self.gradient)) / (self.norm * (self.norm + EPSILON))
        return self.gradient * (self.factor * share)


def max_norm_of(value: object) -> float | None:
    """Return a largest norm, checked.

    Raises:
        RecipeError: It is no positive number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise RecipeError(f"clip_grad_norm is {value!r}; it must be a positive number, or None")
    return float(value)


def clipped(norm: Tensor, most: float) -> tuple[float, float]:
    """Return a gradient's norm and what clipping multiplies it with."""
    found = float(norm)
    return found, min(1.0, most / (found + EPSILON))
