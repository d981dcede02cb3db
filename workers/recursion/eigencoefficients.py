"""One coefficient an eigendirection: the closed form with the Hessian in EKFAC form.

In the eigenbasis the recursion is diagonal, so the scalars of ``coefficients`` become vectors over
the D directions, with ``a_u += (eigenvalue + L) c_t``. T x D numbers are never held: the two scalars
are kept at segment borders, and a segment's coefficients are made again when it is replayed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .coefficients import Settings, scalars
from .columns import Columns

STABLE_SHARE = 0.999
"""Eigenvalues are kept below this share of what would make the linearised step grow without end."""


class EigenCoefficients:
    """Gives c_t, shape (D,), for t = 0, 1, … in any order inside a segment.

    Args:
        settings: What the optimiser used, (T, G).
        groups: (D,) group of each direction, -1: not optimised.
        eigenvalues: (K, D) float64 at K checkpoints.
        steps: (K,) the steps they belong to; each step uses the nearest.
        device: Where the coefficients are used.
        dtype: Of the coefficients handed out.
    """

    def __init__(
        self,
        settings: Settings,
        groups: Tensor,
        eigenvalues: npt.NDArray[np.float64],
        steps: npt.NDArray[np.int64],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.settings, self.count = settings, len(groups)
        columns = Columns(groups, torch.float64, device)
        self._spans = list(columns.spans())
        self._form = scalars(settings)
        limit = columns.whole(np.maximum(0.0, stability_limit(settings)))
        values = torch.from_numpy(eigenvalues).to(device).clamp_min(0)
        self.clipped = int((values > limit).any(0).sum())  # the driver says so, see pipeline.drive.preflight
        self.eigenvalues = torch.minimum(values, limit)
        count = settings.learning_rate.shape[0]
        made = settings.updates_before(steps)
        self._nearest = np.abs(np.arange(count)[:, None] - made[None, :]).argmin(1)
        self.length = max(1, math.isqrt(count))
        self._borders = self._run_back(0, count, *self._end(), keep=None)
        self._segment: tuple[int, Tensor] | None = None

    def at(self, step: int) -> Tensor:
        """Return c_t of the step that a batch belongs to, (D,)."""
        step = self.settings.update(step)
        first = step - step % self.length
        if self._segment is None or self._segment[0] != first:
            stop = min(first + self.length, self.settings.learning_rate.shape[0])
            kept = torch.zeros(stop - first, self.count, dtype=self.dtype, device=self.device)
            self._run_back(first, stop, *self._borders[stop], keep=kept)
            self._segment = (first, kept)
        return self._segment[1][step - first]

    def eigenvalues_at(self, update: int) -> Tensor:
        """Return the eigenvalues that a step of the optimiser uses, (D,) float64."""
        return self.eigenvalues[self._nearest[update]]

    def _end(self) -> tuple[Tensor, Tensor]:
        ones = torch.ones(self.count, dtype=torch.float64, device=self.device)
        return ones, torch.zeros_like(ones)

    def _run_back(
        self, first: int, stop: int, on_weight: Tensor, on_momentum: Tensor, keep: Tensor | None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        form = self._form
        carry, gain, along, direct = (f.tolist() for f in (form.carry, form.gain, form.along, form.direct))
        rate, decay = form.rate.tolist(), form.decay.tolist()
        on_weight, on_momentum = on_weight.clone(), on_momentum.clone()
        borders = {stop: (on_weight.clone(), on_momentum.clone())}
        scratch = torch.empty_like(on_weight)
        for t in range(stop - 1, first - 1, -1):
            curvature = self.eigenvalues[self._nearest[t]]
            for span, g in self._spans:  # a span shares its settings: every factor is one number
                u, m, c = on_weight[span], on_momentum[span], scratch[span]
                m.sub_(u, alpha=rate[t][g] * along[t][g])
                torch.mul(m, gain[t][g], out=c)
                if direct[t][g]:
                    c.sub_(u, alpha=rate[t][g] * direct[t][g])
                if keep is not None:
                    keep[t - first, span] = c
                u.addcmul_(curvature[span], c)
                if decay[t][g]:
                    u.add_(c, alpha=decay[t][g])
                m.mul_(carry[t][g])
            if t % self.length == 0:
                borders[t] = (on_weight.clone(), on_momentum.clone())
        return borders


def stability_limit(settings: Settings) -> npt.NDArray[np.float64]:
    """Return, per group, the largest curvature whose linearised recursion does not grow, (G,).

    For heavy-ball momentum p and learning rate h that is ``2 (1 + p) / h``, for Nesterov's
    ``2 (1 + p) / (h (1 + 2 p))``; dampening scales the gradient by ``1 - d``. Weight decay counts
    towards it.
    """
    p = settings.momentum
    gain = np.where(p != 0, 1.0 - settings.dampening, 1.0)
    rate = np.maximum(settings.learning_rate * np.maximum(gain, 1e-12), 1e-300)
    limit = 2 * (1 + p) / rate
    limit = np.where(settings.nesterov, limit / (1 + 2 * p), limit)
    result: npt.NDArray[np.float64] = (STABLE_SHARE * limit - settings.weight_decay).min(0)
    return result
