"""Conjugate gradients for several right-hand sides in step, and what to do when they cannot work."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...storage.errors import EstimatorDiverged, NegativeCurvature

logger = logging.getLogger(__name__)

Product = Callable[[list[int], Tensor], Tensor]
"""Takes numbers of right-hand sides (R,) and a vector for each (R, D); returns A v for each."""

LANCZOS_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Solution:
    """What the solver came to.

    Attributes:
        x: (Q, D) float64.
        iterations: Iterations of each right-hand side.
        residual: ||b - A x|| / ||b|| of each, as the recursion has it; 0 for b = 0.
        tolerance: What was asked for.
    """

    x: Tensor
    iterations: list[int]
    residual: list[float]
    tolerance: float

    def notes(self, what: str, indices: Sequence[int]) -> dict[str, Any]:
        """Return iterations and residuals for the manifest; warn of those that did not converge."""
        late = [
            int(j) for j, r in zip(indices, self.residual, strict=True) if r > self.tolerance * (1 + 1e-9)
        ]
        if late:
            logger.warning(
                "%s: %d of %d solutions stopped at max_iterations above the tolerance %g "
                "(largest residual %.2e, first at index %d); raise max_iterations or damping",
                what,
                len(late),
                len(self.residual),
                self.tolerance,
                max(self.residual),
                late[0],
            )
        return {"iterations": self.iterations, "residual": self.residual, "not_converged": late}


def conjugate_gradients(
    product: Product, right_QD: Tensor, *, tolerance: float, max_iterations: int, report: Callable[[], None]
) -> Solution:
    """Solve A x = b for each row of ``right_QD``, A symmetric and positive definite.

    Args:
        product: Multiplies with A.
        right_QD: The right-hand sides, float64.
        tolerance: Stop when ||r|| <= tolerance ||b||.
        max_iterations: Stop anyway after so many.
        report: Called once an iteration.

    Raises:
        NegativeCurvature: A direction with <p, A p> <= 0 came up; the message names the damping to use.
    """
    count = len(right_QD)
    x = torch.zeros_like(right_QD)
    residual, direction = right_QD.clone(), right_QD.clone()
    square = [float(row @ row) for row in residual]
    goal = [tolerance * tolerance * value for value in square]
    start = [value or 1.0 for value in square]
    iterations = [0] * count
    active = [k for k in range(count) if square[k] > goal[k]]
    while active:
        moved = product(active, direction[active])
        for row, k in enumerate(active):
            curvature = float(direction[k] @ moved[row])
            if not math.isfinite(curvature):
                raise EstimatorDiverged(
                    "a Hessian product is not finite at w_T; train with --dtype float64 or look at the losses"
                )
            if curvature <= 0:
                _refuse(product, k, direction[k])
            step = square[k] / curvature
            x[k] += step * direction[k]
            residual[k] -= step * moved[row]
            before, square[k] = square[k], float(residual[k] @ residual[k])
            direction[k] = residual[k] + (square[k] / before) * direction[k]
            iterations[k] += 1
        active = [k for k in active if square[k] > goal[k] and iterations[k] < max_iterations]
        report()
    relative = [(square[k] / start[k]) ** 0.5 for k in range(count)]
    return Solution(x=x, iterations=iterations, residual=relative, tolerance=tolerance)


def _refuse(product: Product, k: int, direction_D: Tensor) -> None:
    """Raise NegativeCurvature with a damping that would do, from a few steps of Lanczos."""
    least = least_eigenvalue(lambda v_D: product([k], v_D[None])[0], direction_D)
    extra = float(f"{2.0 * max(-least, 1e-12):.1e}")
    raise NegativeCurvature(
        f"the damped Hessian at w_T is not positive definite: it has an eigenvalue of {least:.3g} or less; "
        f"add at least {extra:g} to the option damping (training is not at a minimum, as deep models never "
        "are), or use an estimator that inverts nothing"
    )


def least_eigenvalue(
    product: Callable[[Tensor], Tensor], start_D: Tensor, steps: int = LANCZOS_STEPS
) -> float:
    """Return an upper bound, usually close, of the least eigenvalue by ``steps`` of Lanczos."""
    basis = [start_D / start_D.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(min(steps, len(start_D))):
        moved = product(basis[-1])
        diagonal.append(float(basis[-1] @ moved))
        for _ in range(2):  # once leaves rounding behind
            for vector in basis:
                moved = moved - (vector @ moved) * vector
        norm = float(moved.norm())
        if step + 1 == min(steps, len(start_D)) or norm <= 1e-12 * max(map(abs, diagonal)):
            break
        beside.append(norm)
        basis.append(moved / norm)
    size = len(diagonal)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for k in range(size):
        matrix[k, k] = diagonal[k]
        if k + 1 < size:
            matrix[k, k + 1] = matrix[k + 1, k] = beside[k]
    return float(torch.linalg.eigvalsh(matrix)[0])
