"""How far a number of a run may be from the dense form: what the documentation promises, in one place.

Relative to the largest one of what is compared: rows by their norms, contributions by their sizes.
"""

from __future__ import annotations

from typing import Literal

Form = Literal["none", "ekfac", "exact", "gauss-newton", "mixed"]

CARRIED: tuple[Form, ...] = ("exact", "gauss-newton", "mixed")
"""Forms with products of the batch's own matrix."""

FORM: dict[Form, dict[str, float]] = {
    "none": {"float64": 1e-12, "float32": 1e-4},
    "ekfac": {"float64": 1e-11, "float32": 1e-4},
    "exact": {"float64": 1e-9, "float32": 1e-3},
    "gauss-newton": {"float64": 1e-9, "float32": 1e-3},
    "mixed": {"float64": 1e-9, "float32": 1e-3},
}
"""Hypergradients, and contributions before they are stored as float32, by form of the Hessian and dtype."""

GRADIENT: dict[str, float] = {"float64": 1e-12, "float32": 1e-4}
"""Test gradients."""

ROUNDINGS = 4.0
"""How many times what plain autograd in the run's dtype loses a test gradient may lose, where that is more."""

STORED: dict[str, float] = {"float64": 1e-6, "float32": 1e-4}
"""Contributions in Parquet, float32 there, against the products of the stores."""

DIFFERENCES = 1e-4
"""Products with the derivative of the update, against differences of the gradient."""

LOSS: dict[str, float] = {"float64": 1e-12, "float32": 1e-4}
"""Batch losses at the recorded weights, computed in float64, against the recorded ones."""
