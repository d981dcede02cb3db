"""One coefficient an eigendirection: the closed form with the Hessian in EKFAC form.

In the eigenbasis the recursion is diagonal, so the scalars of ``coefficients`` become vectors over
the D directions, with ``a_u += (eigenvalue + L) c_t``. T x D numbers are not held where they are many: the two
scalars are kept at segment borders, and a segment's coefficients are made again when it is replayed.

A step whose gradient was clipped by k_t multiplies the curvature with k_t too; that clipping also takes away
what lies along the gradient is left to the rows. With a metric (Adam) the rate is h_t rho_t.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.curvature import Curvature
from .coefficients import Settings, scalars
from .columns import Columns
from .scalars import Scalars
from .settings import Float

TABLE_BYTES = 32 << 20
"""Coefficients of all steps are kept where they take no more than this: nothing is then made twice."""

STABLE_SHARE = 0.999
"""Eigenvalues are kept below this share of what would make the linearised step grow without end."""


class BentSteps:
    """The steps of a record with curvature that is diagonal.

    Args:
        settings: What the optimiser used, (U, L).
        lanes: (D,) lane of each direction, -1: not optimised.
        curvature: Eigenvalues, and the metric they belong to.
        device: Where they are used.

    Attributes:
        form: The steps as scalars.
        eigenvalues: (K, D) float64 as they are used, before clipping of gradients.
        nearest: (U,) the checkpoint whose eigenvalues a step uses.
    """

    def __init__(self, settings: Settings, lanes: Tensor, curvature: Curvature, device: torch.device) -> None:
        self.columns = Columns(lanes, torch.float64, device)
        self.form = scaled_scalars(settings, curvature)
        self.nearest = nearest_checkpoints(settings, curvature)
        self._clips, self._limit, self._decay = settings.clip_factor, None, None
        values = torch.from_numpy(curvature.eigenvalues).to(device).clamp_min(0)
        metric = curvature.metric
        if metric is None:
            limit = self.columns.whole(np.maximum(0.0, stability_limit(settings)))
            self.eigenvalues = torch.minimum(values, limit)
            return
        # The rate moves with the preconditioner, and the first steps are larger: each has its own limit.
        self.eigenvalues, self._limit = values, step_limits(self.form)
        if metric.decay is not None:
            self._decay = torch.from_numpy(metric.decay).to(device)
            self._pull = coupled_decay(settings)

    def curvature(self, update: int) -> Tensor:
        """Return what a step of the optimiser multiplies tangents with in the Hessian's place, (D,) float64."""
        found = self.eigenvalues[self.nearest[update]]
        if self._clips is not None and self._clips[update] < 1:
            found = found * float(self._clips[update])
        if self._decay is not None:
            found = found + self.columns.spread(self._pull[update]) * self._decay
        if self._limit is not None:
            found = torch.minimum(found, self.columns.spread(self._limit[update]))
        return found


class EigenCoefficients:
    """Gives c_t, shape (D,), for t = 0, 1, … in any order inside a segment.

    Args:
        settings: What the optimiser used, (U, L).
        lanes: (D,) lane of each direction, -1: not optimised.
        curvature: Eigenvalues, and the metric they belong to.
        device: Where the coefficients are used.
        dtype: Of the coefficients handed out.
        first: First batch that is asked for; what comes before is not computed.
    """

    def __init__(
        self,
        settings: Settings,
        lanes: Tensor,
        curvature: Curvature,
        device: torch.device,
        dtype: torch.dtype,
        first: int = 0,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.settings, self.count = settings, len(lanes)
        self.bent = BentSteps(settings, lanes, curvature, device)
        self._spans = list(self.bent.columns.spans())
        count = settings.learning_rate.shape[0]
        self.length = max(1, math.isqrt(count))
        self._segment: tuple[int, Tensor] | None = None
        if 0 < count * self.count * dtype.itemsize <= TABLE_BYTES:
            self.length = count
            self._segment = (0, torch.zeros(count, self.count, dtype=dtype, device=device))
        kept = None if self._segment is None else self._segment[1]
        begin = 0 if not first or kept is not None else settings.update(first)
        begin -= begin % self.length  # the same numbers whatever is first: segments of the table stay
        self._borders = self._run_back(begin, count, *self._end(), keep=kept)

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

    def _end(self) -> tuple[Tensor, Tensor]:
        ones = torch.ones(self.count, dtype=torch.float64, device=self.device)
        return ones, torch.zeros_like(ones)

    def _run_back(
        self, first: int, stop: int, on_weight: Tensor, on_momentum: Tensor, keep: Tensor | None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        form = self.bent.form
        carry, gain, along, direct = (f.tolist() for f in (form.carry, form.gain, form.along, form.direct))
        rate, decay, shrink = form.rate.tolist(), form.decay.tolist(), form.shrink.tolist()
        on_weight, on_momentum = on_weight.clone(), on_momentum.clone()
        borders = {stop: (on_weight.clone(), on_momentum.clone())}
        scratch = torch.empty_like(on_weight)
        for t in range(stop - 1, first - 1, -1):
            curvature = self.bent.curvature(t)
            for span, g in self._spans:  # a span shares its settings: every factor is one number
                u, m, c = on_weight[span], on_momentum[span], scratch[span]
                m.sub_(u, alpha=rate[t][g] * along[t][g])
                torch.mul(m, gain[t][g], out=c)
                if direct[t][g]:
                    c.sub_(u, alpha=rate[t][g] * direct[t][g])
                if keep is not None:
                    keep[t - first, span] = c
                if shrink[t][g]:
                    u.mul_(1.0 - shrink[t][g])
                u.addcmul_(curvature[span], c)
                if decay[t][g]:
                    u.add_(c, alpha=decay[t][g])
                m.mul_(carry[t][g])
            if t % self.length == 0:
                borders[t] = (on_weight.clone(), on_momentum.clone())
        return borders


def scaled_scalars(settings: Settings, curvature: Curvature) -> Scalars:
    """Return the steps as scalars, in the metric of the curvature where it has one."""
    form = scalars(settings)
    return form if curvature.metric is None else replace(form, rate=form.rate * curvature.metric.rate)


def nearest_checkpoints(settings: Settings, curvature: Curvature) -> npt.NDArray[np.intp]:
    """Return which of the curvature's checkpoints is nearest to each step of the optimiser, (U,)."""
    made = settings.updates_before(curvature.steps)
    count = settings.learning_rate.shape[0]
    found: npt.NDArray[np.intp] = np.abs(np.arange(count)[:, None] - made[None, :]).argmin(1)
    return found


def flat_directions(
    settings: Settings, lanes_D: npt.NDArray[np.int64], curvature: Curvature, share: float
) -> npt.NDArray[np.bool_]:
    """Return which directions have so little curvature that no coefficient changes by more than a share, (D,).

    Curvature makes ``exp(-sum of h_t curvature_t)`` of a coefficient, h_t being what a step moves in the long run.
    """
    form = scaled_scalars(settings, curvature)
    moved = form.rate * (form.along * form.gain / np.maximum(1.0 - form.carry, 1e-3) + form.direct)
    nearest = nearest_checkpoints(settings, curvature)
    total = np.zeros(curvature.eigenvalues.shape[1])
    for k, values in enumerate(curvature.eigenvalues):
        per_lane = np.append(moved[nearest == k].sum(0), 0.0)
        total += per_lane[lanes_D] * np.maximum(values, 0.0)
    result: npt.NDArray[np.bool_] = total < share
    return result


def coupled_decay(settings: Settings) -> Float:
    """Return the weight decay that Adam's preconditioner multiplies like the gradient, (U, L)."""
    assert settings.decoupled is not None
    decay = np.where(settings.decoupled, 0.0, settings.weight_decay)
    return decay if settings.active is None else np.where(settings.active, decay, 0.0)


def stability_limit(settings: Settings) -> Float:
    """Return, per lane, the largest curvature whose linearised recursion does not grow with SGD, (L,).

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


def step_limits(form: Scalars) -> Float:
    """Return the same at each step of Adam's form, (U, L): ``(1 + p) (2 - e) / (h s k)``.

    From ``z^2 - z (1 - e - h s k curvature + p) + p (1 - e)``, which must not have a zero below -1.
    """
    push = np.maximum(form.rate * form.along * form.gain, 1e-300)
    found: Float = STABLE_SHARE * (1 + form.carry) * (2 - form.shrink) / push
    return found


def cut_directions(settings: Settings, lanes_D: npt.NDArray[np.int64], curvature: Curvature) -> int:
    """Return how many eigendirections have an eigenvalue beyond what some step that uses it bears."""
    if curvature.metric is None:
        limits = np.append(stability_limit(settings), 0.0)
        limit_KD = np.maximum(limits[lanes_D], 0.0)[None]
    else:
        clips = np.ones(len(settings.learning_rate)) if settings.clip_factor is None else settings.clip_factor
        limits_UL = step_limits(scaled_scalars(settings, curvature)) / clips[:, None]
        nearest = nearest_checkpoints(settings, curvature)
        least = [limits_UL[nearest == k].min(0, initial=np.inf) for k in range(len(curvature.eigenvalues))]
        limit_KD = np.stack([np.append(row, np.inf)[lanes_D] for row in least])
    return int((curvature.eigenvalues > limit_KD).any(0).sum())
