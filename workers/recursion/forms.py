"""The words for how a run replays: forms of the Hessian, which name their methods too, and modes."""

from __future__ import annotations

from typing import Literal

Form = Literal["hydra", "hydra-ekfac", "hydra-exact"]
FAST: Literal["hydra"] = "hydra"
EKFAC: Literal["hydra-ekfac"] = "hydra-ekfac"
EXACT: Literal["hydra-exact"] = "hydra-exact"

Mode = Literal["forward", "adjoint"]
FORWARD: Literal["forward"] = "forward"
ADJOINT: Literal["adjoint"] = "adjoint"
