"""The scalar recursion behind the Hessian-free hypergradient (Algorithm 1 of the HyDRA paper).

A step that is linear in the gradient makes the tangent of sample i, without the Hessian, a sum of its own
gradients with scalar weights:

    hypergradient_i = sum over the steps t whose batch holds i of  c_t (N / B_t) g_{t-1,i}

One backward pass of two scalars a lane (see ``settings``) over the recorded optimiser settings gives every
``c_t``. ``phi`` is the forward companion: what the recursion makes of w_0. The families bring their
steps into one form, r the gradient plus coupled decay:

    m' = p m + k r,   w' = (1 - e) w - h (s m' + q r),   r = g + L w

U steps of the optimiser, L lanes, T batches, G groups.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from ...storage.trajectory import Trajectory
from .families import family_named
from .scalars import Scalars
from .settings import Float, Recorded, Settings, recorded_settings

__all__ = ["Settings", "coefficients", "phi", "psi", "recorded_settings", "scalars", "stored_coefficients"]


def scalars(settings: Settings) -> Scalars:
    """Return the steps in the common form; lanes that were not stepped keep what they have."""
    found = family_named(settings.family).scalars(settings)
    return found if settings.active is None else found.only(settings.active)


def coefficients(settings: Settings) -> Float:
    """Return c, shape (U, L): d w_T / d (gradient used at a step), per lane.

    Adam's is the look-ahead alone: its step also multiplies with the preconditioner 1 / (sqrt(vhat) + eps).
    """
    form = scalars(settings)
    rate = form.rate
    steps, lanes = rate.shape
    result = np.zeros((steps, lanes))
    on_weight, on_momentum = np.ones(lanes), np.zeros(lanes)
    for t in range(steps - 1, -1, -1):
        on_new_momentum = on_momentum - rate[t] * form.along[t] * on_weight
        c = form.gain[t] * on_new_momentum - rate[t] * form.direct[t] * on_weight
        result[t] = c
        on_weight = (1 - form.shrink[t]) * on_weight + form.decay[t] * c
        on_momentum = form.carry[t] * on_new_momentum
    return result


def stored_coefficients(trajectory: Trajectory | Recorded) -> Float:
    """Return c as a record keeps it, (T, G): of parameters that were stepped each time, from the first on."""
    uncounted = {
        name: value for name, value in trajectory.optimizer.items() if name not in ("count", "begun")
    }
    kept = {one.name: getattr(trajectory, one.name) for one in fields(Recorded)}
    settings = recorded_settings(Recorded(**kept | {"active": None, "optimizer": uncounted}))
    began = {
        entry.group
        for entry, there in zip(trajectory.parameters, trajectory.optimizer.get("begun", ()), strict=False)
        if there
    }
    if began:  # of a group in which only some had momentum, those are meant
        settings = replace(settings, begun=np.isin(np.arange(settings.learning_rate.shape[1]), list(began)))
    found = coefficients(settings)
    return found if settings.update_of is None else found[settings.update_of]


def phi(settings: Settings) -> Float:
    """Return phi_T, shape (L,): the weight that w_0 keeps in w_T (1 when weight decay is 0).

    With every sample tracked, ``sum_i hypergradient_i / N = w_T - phi_T w_0 - psi_T m_0`` per lane.
    """
    return _kept(settings, 1.0, 0.0)


def psi(settings: Settings) -> Float:
    """Return psi_T, shape (L,): what w_T holds of m_0, the momentum that SGD began with; 0 where it had none.

    Without weight decay and with settings that stay, ``-h (p + p^2 + … + p^T)``.
    """
    if settings.begun is None:
        return np.zeros(settings.learning_rate.shape[1])
    return np.where(settings.begun, _kept(settings, 0.0, 1.0), 0.0)


def _kept(settings: Settings, weight_0: float, momentum_0: float) -> Float:
    """Return what the recursion without gradients makes of a weight and a momentum, (L,)."""
    form = scalars(settings)
    rate = form.rate
    weight, momentum = np.full(rate.shape[1], weight_0), np.full(rate.shape[1], momentum_0)
    for t in range(rate.shape[0]):
        gradient = form.decay[t] * weight
        momentum = form.carry[t] * momentum + form.gain[t] * gradient
        weight = (1 - form.shrink[t]) * weight - rate[t] * (
            form.along[t] * momentum + form.direct[t] * gradient
        )
    return weight
