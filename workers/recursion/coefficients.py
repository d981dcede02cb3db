"""The scalar recursion behind the Hessian-free hypergradient (Algorithm 1 of the HyDRA paper).

SGD's update is linear in the gradient, so without the Hessian the tangent of sample i is a sum of
its own gradients with scalar weights:

    hypergradient_i = sum over the steps t whose batch holds i of  c_t (N / B_t) g_{t-1,i}

One backward pass of two scalars a parameter group over the recorded optimiser settings gives every
``c_t`` (T steps, G groups). ``phi`` is the forward companion: what the recursion makes of w_0.

The step of ``torch.optim.SGD`` with learning rate h, momentum p, weight decay L:

    r_t = g_{t-1} + L w_{t-1}
    m_t = r_t at the first step with momentum (unless training began with a buffer), else p m_{t-1} + (1 - dampening) r_t
    w_t = w_{t-1} - h m_t            (Nesterov: - h (r_t + p m_t); p = 0: - h r_t, m untouched)

that is ``m' = p m + k r``, ``w' = w - h (s m' + q r)``; see `linear_form`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ...storage.trajectory import Trajectory

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the optimiser used at every step: arrays of shape (T, G).

    ``begun``, (G,): whether a group's parameters had momentum buffers before the first step; None: no group's.
    """

    learning_rate: Float
    momentum: Float
    weight_decay: Float
    dampening: Float
    nesterov: Bool
    begun: Bool | None = None


def recorded_settings(trajectory: Trajectory) -> Settings:
    """Return the optimiser settings of a record."""
    return Settings(**{entry.name: getattr(trajectory, entry.name) for entry in fields(Settings)})


def linear_form(settings: Settings) -> tuple[Float, Float, Float, Float]:
    """Return (p, k, s, q), each (T, G): m' = p m + k r and w' = w - h (s m' + q r).

    Steps without momentum leave m as it is: p = 1, k = 0, s = 0, q = 1.
    """
    momentum = settings.momentum
    uses = momentum != 0
    first = uses & (np.cumsum(uses, axis=0) == 1)
    if settings.begun is not None:
        first &= ~settings.begun
    carry = np.where(uses, np.where(first, 0.0, momentum), 1.0)
    gain = np.where(uses, np.where(first, 1.0, 1.0 - settings.dampening), 0.0)
    along = np.where(uses, np.where(settings.nesterov, momentum, 1.0), 0.0)
    direct = np.where(uses, np.where(settings.nesterov, 1.0, 0.0), 1.0)
    return carry, gain, along, direct


def coefficients(settings: Settings) -> Float:
    """Return c, shape (T, G): d w_T / d (gradient used at step t), per parameter group."""
    carry, gain, along, direct = linear_form(settings)
    rate, decay = settings.learning_rate, settings.weight_decay
    steps, groups = rate.shape
    result = np.zeros((steps, groups))
    on_weight, on_momentum = np.ones(groups), np.zeros(groups)
    for t in range(steps - 1, -1, -1):
        on_new_momentum = on_momentum - rate[t] * along[t] * on_weight
        c = gain[t] * on_new_momentum - rate[t] * direct[t] * on_weight
        result[t] = c
        on_weight = on_weight + decay[t] * c
        on_momentum = carry[t] * on_new_momentum
    return result


def phi(settings: Settings) -> Float:
    """Return phi_T, shape (G,): the weight that w_0 keeps in w_T (1 when weight decay is 0).

    With every sample tracked, ``sum_i hypergradient_i / N = w_T - phi_T w_0 - psi_T m_0`` per group.
    """
    return _kept(settings, 1.0, 0.0)


def psi(settings: Settings) -> Float:
    """Return psi_T, shape (G,): what w_T holds of m_0, the momentum that training began with.

    Without weight decay and with settings that stay, ``-h (p + p^2 + … + p^T)``; 0 where no group began with any.
    """
    if settings.begun is None:
        return np.zeros(settings.learning_rate.shape[1])
    return np.where(settings.begun, _kept(settings, 0.0, 1.0), 0.0)


def _kept(settings: Settings, weight_0: float, momentum_0: float) -> Float:
    """Return what the recursion without gradients makes of a weight and a momentum, (G,)."""
    carry, gain, along, direct = linear_form(settings)
    rate, decay = settings.learning_rate, settings.weight_decay
    weight, momentum = np.full(rate.shape[1], weight_0), np.full(rate.shape[1], momentum_0)
    for t in range(rate.shape[0]):
        gradient = decay[t] * weight
        momentum = carry[t] * momentum + gain[t] * gradient
        weight = weight - rate[t] * (along[t] * momentum + direct[t] * gradient)
    return weight
