"""``torch.optim.SGD`` with learning rate h, momentum p, weight decay L:

    r_t = g_{t-1} + L w_{t-1}
    m_t = r_t at the first step with momentum (unless training began with a buffer), else p m_{t-1} + (1 - dampening) r_t
    w_t = w_{t-1} - h m_t            (Nesterov: - h (r_t + p m_t); p = 0: - h r_t, m untouched)

that is ``m' = p m + k r``, ``w' = w - h (s m' + q r)``: linear, so its derivative is itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...storage.errors import RecipeError
from .clipping import Clip
from .columns import Columns
from .family import Family, LinearStep, Moment
from .scalars import Scalars
from .settings import Settings

_KEYS = {
    "learning_rate": "lr",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "dampening": "dampening",
    "nesterov": "nesterov",
}
"""Trajectory array -> key of ``param_groups``."""


class SGD(Family):
    """See the module."""

    name = "sgd"
    kinds = (torch.optim.SGD,)
    settings = tuple(_KEYS)
    vectors = ("momentum_buffer",)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse ``maximize`` and a learning rate that is a tensor."""
        for group in optimizer.param_groups:
            if group.get("maximize"):
                raise RecipeError("SGD(maximize=True) is not supported; negate the losses instead")
            plain_rate(group)

    def read(self, group: Mapping[str, Any]) -> dict[str, float]:
        """See ``Family``."""
        return {name: float(group[key]) for name, key in _KEYS.items()}

    def apply(self, group: dict[str, Any], values: Mapping[str, float]) -> None:
        """See ``Family``."""
        for name, key in _KEYS.items():
            group[key] = bool(values[name]) if name == "nesterov" else float(values[name])

    def moved(
        self, group: Mapping[str, Any], weight: Tensor, gradient: Tensor, state: Mapping[str, Any]
    ) -> Tensor:
        """See ``Family``."""
        decay, momentum = float(group["weight_decay"]), float(group["momentum"])
        move = gradient + decay * weight
        if momentum:
            buffer = state.get("momentum_buffer")
            carried = move if buffer is None else momentum * buffer + (1 - group["dampening"]) * move
            move = move + momentum * carried if group["nesterov"] else carried
        return -float(group["lr"]) * move

    def scalars(self, settings: Settings) -> Scalars:
        """Return the form; steps without momentum leave m as it is: p = 1, k = 0, s = 0, q = 1."""
        momentum = settings.momentum
        uses = momentum != 0
        stepped = uses if settings.active is None else uses & settings.active
        first = stepped & (np.cumsum(stepped, axis=0) == 1)
        if settings.begun is not None:
            first &= ~settings.begun
        return Scalars(
            carry=np.where(uses, np.where(first, 0.0, momentum), 1.0),
            gain=np.where(uses, np.where(first, 1.0, 1.0 - settings.dampening), 0.0),
            along=np.where(uses, np.where(settings.nesterov, momentum, 1.0), 0.0),
            direct=np.where(uses, np.where(settings.nesterov, 1.0, 0.0), 1.0),
            rate=settings.learning_rate,
            decay=settings.weight_decay,
            shrink=np.zeros_like(settings.learning_rate),
        )

    def linear(
        self, settings: Settings, form: Scalars, columns: Columns, update: int, moment: Moment | None
    ) -> LinearStep:
        """See ``Family``."""
        return _Step(form, columns, update, None if moment is None else moment.clip)


class _Step(LinearStep):
    def __init__(self, form: Scalars, columns: Columns, update: int, clip: Clip | None) -> None:
        spread, rate = columns.spread, form.rate[update]
        self.carry, self.gain = spread(form.carry[update]), spread(form.gain[update])
        self.along, self.direct = spread(rate * form.along[update]), spread(rate * form.direct[update])
        self.decay = spread(form.decay[update])
        self.clip = clip if clip is not None and clip.active else None

    def push(self, du: Tensor, state: Sequence[Tensor], source: Tensor) -> None:
        (dm,) = state
        if self.clip is not None:
            self.clip.map_(source)
        source.add_(self.decay * du)
        dm.mul_(self.carry).add_(self.gain * source)
        du.sub_(self.along * dm + self.direct * source)

    def kick(self, source: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.clip is not None:
            source = self.clip.map_(source.clone())
        return -(self.along * self.gain + self.direct) * source, [self.gain * source]

    def pull(self, a_u: Tensor, state: Sequence[Tensor]) -> Tensor:
        (a_m,) = state
        a_m.sub_(self.along * a_u)
        v = self.gain * a_m - self.direct * a_u
        self._unclipped = v
        return v if self.clip is None else self.clip.map_(v.clone())

    def pulled(self, a_u: Tensor, state: Sequence[Tensor], product: Tensor) -> None:
        a_u.add_(product).add_(self.decay * self._unclipped)
        state[0].mul_(self.carry)


def plain_rate(group: Mapping[str, Any]) -> None:
    """Raise RecipeError where the learning rate is a tensor."""
    if isinstance(group.get("lr"), Tensor):
        raise RecipeError("the learning rate is a tensor, which is not followed; give the optimizer a float")
