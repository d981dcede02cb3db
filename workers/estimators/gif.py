"""Generalised influence (Lyu et al. 2024): only chosen parameters may move.

Leaving i out asks for a move d with A d = (1/N) g_i, A = H + L + damping. When only the parameters S
may move, moving them also changes the gradient on the others, which an influence function of S alone
overlooks. The generalised form takes the move whose gradient change fits best on ALL parameters,
the least-squares solution with the pseudo-inverse of the columns of S:

    d_S = (1/N) (A_:S)^+ g_i        C(i, j) = (1/N) <g_j[S], (A_:S)^+ g_i> = (1/N) <g_i, A_:S x_j>,
                                    (A_S: A_:S) x_j = g_j[S]

The right-hand form solves once a test sample, by conjugate gradients on the normal equations (two
Hessian products an iteration). With S = all it is ``influence_cg``.

The abstract has the parameters selected by outputs or gradients of the examined data, and finds 5% of
them enough. Ours: S follows from the test sample, as its largest gradient entries (``gradient``), or
is the last layer (``last-layer``); and the solver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .base import Estimator, Found, Ground, Report, Targets, number, one_of, whole
from .fixed import FixedWeights
from .hessian import LossHessian
from .solvers import conjugate_gradients


@dataclass(frozen=True, kw_only=True)
class GeneralizedInfluence(Estimator):
    """Influence through chosen parameters, the gradient change on the others made least.

    Attributes:
        select: ``gradient``: per test sample, the entries where its gradient is largest;
            ``last-layer``: the parameters of the last module that has any.
        fraction: With ``gradient``: the share of the optimised parameters that may move.
        damping: Added to the diagonal of H.
        tolerance: Relative residual of the normal equations at which a solve stops.
        max_iterations: Iterations after which it stops anyway; that is warned of and recorded.
    """

    NAME = "gif"
    VECTORS = 7

    select: Literal["gradient", "last-layer"] = "gradient"
    fraction: float = 0.05
    damping: float = 0.01
    tolerance: float = 1e-4
    max_iterations: int = 100

    def __post_init__(self) -> None:
        one_of("select", self.select, "gradient", "last-layer")
        number("fraction", self.fraction, open_least=True, most=1.0)
        number("damping", self.damping)
        number("tolerance", self.tolerance, open_least=True, most=1.0)
        whole("max_iterations", self.max_iterations)

    def contributions(self, ground: Ground, targets: Targets, report: Report) -> Found:
        """Choose, solve and multiply; see ``Estimator``."""
        fixed = FixedWeights(ground.training, ground.trajectory)
        hessian = LossHessian(fixed, self.damping)
        gradient = torch.from_numpy(targets.gradient).to(ground.training.device).double() * fixed.optimised
        chosen = torch.stack([self.chosen(fixed, row) for row in gradient])
        active = _Masked(hessian, chosen)
        solution = conjugate_gradients(
            active,
            gradient * chosen,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            report=lambda: report(min(hessian.calls // 2, self.max_iterations), self.max_iterations + 1),
        )
        products = fixed.products(ground.tracked, hessian(solution.x))
        fixed.close()
        notes = solution.notes(self.NAME, targets.index.tolist())
        notes["parameters"] = [int(count) for count in chosen.sum(1).tolist()]
        return Found(values=(products / ground.training.n_train).cpu().numpy(), notes=notes)

    def chosen(self, fixed: FixedWeights, gradient_D: Tensor) -> Tensor:
        """Return S as a mask over the optimised parameters, (D,) float64."""
        out = torch.zeros_like(gradient_D)
        if self.select == "last-layer":
            entries = [entry for entry in fixed.training.layout.entries if entry.group >= 0]
            owner = entries[-1].name.rpartition(".")[0]
            for entry in entries:
                if entry.name.rpartition(".")[0] == owner:
                    out[entry.start : entry.start + math.prod(entry.shape)] = 1
            return out
        possible = torch.nonzero(fixed.optimised).flatten()
        count = max(1, math.ceil(self.fraction * len(possible)))
        # A stable order: entries of the same size are taken from the front.
        order = torch.argsort(gradient_D[possible].abs(), descending=True, stable=True)
        out[possible[order[:count]]] = 1
        return out


class _Masked:
    """Products with A_S: A_:S, S being each right-hand side's own."""

    def __init__(self, hessian: LossHessian, chosen_QD: Tensor) -> None:
        self.hessian, self.chosen = hessian, chosen_QD

    def __call__(self, rows: list[int], vectors: Tensor) -> Tensor:
        mask = self.chosen[rows]
        return self.hessian(self.hessian(vectors * mask)) * mask
