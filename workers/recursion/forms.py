"""The words for how a run replays: forms of the Hessian, which name their methods too, and modes."""

from __future__ import annotations

from typing import Literal

Form = Literal["hydra", "hydra-ekfac", "hydra-exact", "hydra-gauss-newton", "hydra-mixed"]
FAST: Literal["hydra"] = "hydra"
EKFAC: Literal["hydra-ekfac"] = "hydra-ekfac"
EXACT: Literal["hydra-exact"] = "hydra-exact"
GAUSS_NEWTON: Literal["hydra-gauss-newton"] = "hydra-gauss-newton"
MIXED: Literal["hydra-mixed"] = "hydra-mixed"
CARRIED: tuple[Form, ...] = (EXACT, GAUSS_NEWTON, MIXED)
"""Forms that carry vectors step by step, by products with a matrix of every batch."""

Mode = Literal["forward", "adjoint"]
FORWARD: Literal["forward"] = "forward"
ADJOINT: Literal["adjoint"] = "adjoint"
