"""``torch.optim.Adam`` and ``AdamW``: g the clipped gradient, t the steps taken with the parameter,

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = (1 - h L) w - h mhat / (sqrt(vhat) + e),   mhat = m / (1 - b1^t),  vhat = v / (1 - b2^t)

(decoupled decay; with coupled decay ``g + L w`` stands for g and nothing shrinks). With

    D = 1 / (sqrt(vhat) + e),   S = mhat / (2 sqrt(vhat) (sqrt(vhat) + e)^2),  0 where v = 0

the derivative of a step is, forwards,

    dm = b1 dm + (1 - b1) s;  dv = b2 dv + 2 (1 - b2) g s
    du = (1 - h L) du - h (D dm / (1 - b1^t) - S dv / (1 - b2^t)),   s = clip(H du) [+ L du]

and backwards

    a_m -= h D a_u / (1 - b1^t);  a_v += h S a_u / (1 - b2^t);  q = (1 - b1) a_m + 2 (1 - b2) g a_v
    a_u = (1 - h L) a_u + H clip(q) [+ L q];  a_m *= b1;  a_v *= b2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...storage.errors import RecipeError
from .columns import Columns
from .family import Family, LinearStep, Moment
from .scalars import Scalars
from .settings import Float, Integers, Settings
from .sgd import plain_rate

_REFUSED = {
    "amsgrad": "its running maximum has no rule; leave it out",
    "maximize": "negate the losses instead",
    "capturable": "its steps are counted on the device; leave it out",
    "differentiable": "hypergradients are had without it; leave it out",
}


class Adam(Family):
    """See the module."""

    name = "adam"
    kinds = (torch.optim.Adam, torch.optim.AdamW)
    settings = ("learning_rate", "weight_decay", "beta1", "beta2", "eps")
    vectors = ("exp_avg", "exp_avg_sq")
    counts = True
    scaled = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse options that change the step or where it is counted."""
        for group in optimizer.param_groups:
            for option, remedy in _REFUSED.items():
                if group.get(option):
                    raise RecipeError(f"{type(optimizer).__name__}({option}=True) is not supported: {remedy}")
            plain_rate(group)
            if any(isinstance(beta, Tensor) for beta in group["betas"]):
                raise RecipeError("betas are tensors, which are not followed; give the optimizer floats")

    def read(self, group: Mapping[str, Any]) -> dict[str, float]:
        """See ``Family``."""
        beta1, beta2 = group["betas"]
        return {
            "learning_rate": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": float(group["eps"]),
        }

    def apply(self, group: dict[str, Any], values: Mapping[str, float]) -> None:
        """See ``Family``."""
        group["lr"], group["weight_decay"] = float(values["learning_rate"]), float(values["weight_decay"])
        group["betas"], group["eps"] = (float(values["beta1"]), float(values["beta2"])), float(values["eps"])

    def moved(
        self, group: Mapping[str, Any], weight: Tensor, gradient: Tensor, state: Mapping[str, Any]
    ) -> Tensor:
        """See ``Family``."""
        beta1, beta2 = group["betas"]
        rate, decay, decoupled = float(group["lr"]), float(group["weight_decay"]), is_decoupled(group)
        count = int(state.get("step", 0)) + 1
        first = state.get("exp_avg", torch.zeros_like(weight))
        second = state.get("exp_avg_sq", torch.zeros_like(weight))
        g = gradient if decoupled else gradient + decay * weight
        first, second = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g * g
        scale = (second / (1 - beta2**count)).sqrt() + group["eps"]
        shrunk = rate * decay * weight if decoupled else torch.zeros_like(weight)
        move: Tensor = -shrunk - rate * (first / (1 - beta1**count)) / scale
        return move

    def scalars(self, settings: Settings) -> Scalars:
        """Return the look-ahead with the preconditioner frozen and left to the caller.

        Coupled decay is left out: it is multiplied with the preconditioner, and so no matter of scalars.
        """
        assert settings.beta1 is not None
        assert settings.count is not None
        assert settings.decoupled is not None
        rate, none = settings.learning_rate, np.zeros_like(settings.learning_rate)
        return Scalars(
            carry=settings.beta1,
            gain=1.0 - settings.beta1,
            along=_inverse(settings.beta1, settings.count),
            direct=none,
            rate=rate,
            decay=none,
            shrink=np.where(settings.decoupled, rate * settings.weight_decay, 0.0),
        )

    def linear(
        self, settings: Settings, form: Scalars, columns: Columns, update: int, moment: Moment | None
    ) -> LinearStep:
        """See ``Family``."""
        assert moment is not None
        return _Step(settings, columns, update, moment)

    def preconditioner(
        self, settings: Settings, columns: Columns, update: int, moment: Moment
    ) -> Tensor | None:
        """Return D of the step, 0 where the parameter is not stepped, (D,)."""
        return _Step(settings, columns, update, moment).preconditioner

    def coupled_pull(
        self, settings: Settings, columns: Columns, update: int, moment: Moment
    ) -> Tensor | None:
        """Return L w of groups whose decay is coupled."""
        assert settings.decoupled is not None
        decay = np.where(settings.decoupled, 0.0, settings.weight_decay[update])
        return columns.spread(decay) * moment.weights if decay.any() else None


class _Step(LinearStep):
    def __init__(self, settings: Settings, columns: Columns, update: int, moment: Moment) -> None:
        assert settings.beta1 is not None
        assert settings.beta2 is not None
        assert settings.eps is not None
        assert settings.count is not None
        assert settings.decoupled is not None
        count = settings.count[update]
        active = np.ones(settings.beta1.shape[1], dtype=bool)
        if settings.active is not None:
            active = settings.active[update]
        spread = columns.spread
        beta1, beta2 = (np.where(active, b[update], 1.0) for b in (settings.beta1, settings.beta2))
        rate = np.where(active, settings.learning_rate[update], 0.0)
        decay, decoupled = settings.weight_decay[update], settings.decoupled
        unbias1 = np.where(active, _inverse(settings.beta1[update], count), 1.0)
        unbias2 = np.where(active, _inverse(settings.beta2[update], count), 1.0)
        self.clip = moment.clip
        self.keep1, self.keep2 = spread(beta1), spread(beta2)
        self.take1 = spread(1.0 - beta1)
        self.shrink = spread(np.where(decoupled, rate * decay, 0.0))
        coupled = np.where(active & ~decoupled, decay, 0.0)
        self.coupled = spread(coupled) if coupled.any() else None
        gradient = moment.clip.clipped()
        if self.coupled is not None:
            gradient = gradient + self.coupled * moment.weights
        first, second = moment.state
        first = self.keep1 * first + self.take1 * gradient
        second = self.keep2 * second + spread(1.0 - beta2) * gradient * gradient
        root = (second * spread(unbias2)).sqrt()
        scale = root + spread(settings.eps[update])
        # Coordinates of no group have neither a root nor an eps.
        inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
        mean = first * spread(unbias1)
        sloped = root > 0
        slope = torch.where(
            sloped, mean * inverse * inverse / (2 * torch.where(sloped, root, 1.0)), torch.zeros_like(root)
        )
        self.preconditioner = inverse * spread(active.astype(np.float64))
        self.on_first = spread(rate * unbias1) * inverse
        self.on_second = spread(rate * unbias2) * slope
        self.take2 = 2.0 * spread(1.0 - beta2) * gradient

    def push(self, du: Tensor, state: Sequence[Tensor], source: Tensor) -> None:
        dm, dv = state
        self.clip.map_(source)
        if self.coupled is not None:
            source.add_(self.coupled * du)
        dm.mul_(self.keep1).add_(self.take1 * source)
        dv.mul_(self.keep2).add_(self.take2 * source)
        du.mul_(1.0 - self.shrink).sub_(self.on_first * dm - self.on_second * dv)

    def kick(self, source: Tensor) -> tuple[Tensor, list[Tensor]]:
        source = self.clip.map_(source.clone())
        dm, dv = self.take1 * source, self.take2 * source
        return self.on_second * dv - self.on_first * dm, [dm, dv]

    def pull(self, a_u: Tensor, state: Sequence[Tensor]) -> Tensor:
        a_m, a_v = state
        a_m.sub_(self.on_first * a_u)
        a_v.add_(self.on_second * a_u)
        self._unclipped = self.take1 * a_m + self.take2 * a_v
        return self.clip.map_(self._unclipped.clone())

    def pulled(self, a_u: Tensor, state: Sequence[Tensor], product: Tensor) -> None:
        a_m, a_v = state
        a_u.mul_(1.0 - self.shrink).add_(product)
        if self.coupled is not None:
            a_u.add_(self.coupled * self._unclipped)
        a_m.mul_(self.keep1)
        a_v.mul_(self.keep2)


def is_decoupled(group: Mapping[str, Any]) -> bool:
    """Whether the decay of a parameter group leaves the gradient alone."""
    return bool(group.get("decoupled_weight_decay", False))


def _inverse(beta: Float, count: Integers) -> Float:
    """Return 1 / (1 - beta^t); 1 where no step was taken yet."""
    bias = 1.0 - beta ** count.astype(np.float64)
    return np.where(bias > 0, 1.0 / np.where(bias > 0, bias, 1.0), 1.0)
