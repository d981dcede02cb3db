"""What the hypergradients of all samples leave out of what training did to the weights.

With the Hessian dropped, ``sum_i hypergradient_i / N`` is the sum over the steps of c_t times the gradient
G_t of the step's loss: what the gradients did to the weights, for SGD to the last digit. Rows leave out

- where a step was clipped, what the length lost: rows go through the derivative of clipping, which takes
  l = k G <G, G> / (n (n + 1e-6)) from k G;
- of Adam, that a gradient met at step s acts on the weights with the preconditioner D of every later step,
  and in its row with D_s; and coupled decay.

Followed step by step beside the training, q being the momentum of the mean row,

    SGD:   rest += c_t l
    Adam:  q = b1 q + (1 - b1) D (k G - l);   rest = (1 - h L) rest - h (D m - q) / (1 - b1^t)

with D and m of training itself, makes the law whole again (see ``conservation``):

    sum_i hypergradient_i / N = w_T - phi_T w_0 - psi_T m_0 - rest

D parameters, P parameter tensors, Q targets, L lanes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .family import Moment
from .settings import Settings
from .steps import Steps

UNIT = {"float32": 2.0**-20, "float64": 2.0**-49}
"""Eight units in the last place."""

NOISE = 1e-4
"""Share of the largest gradient below which a parameter's own scale is not used."""

Float = npt.NDArray[np.float64]


class Rest:
    """Follows a training.

    Args:
        steps: Its derivatives.
        coefficients: c_t, (U, L).
        spans: Where each parameter lies.
        lanes: Its lane, -1: not optimised.
    """

    def __init__(
        self, steps: Steps, coefficients: Float, spans: Sequence[slice], lanes: Sequence[int]
    ) -> None:
        self._steps, self._coefficients = steps, coefficients
        self._spans, self._lanes = tuple(spans), tuple(lanes)
        self._rest: Tensor | None = None
        self._momentum: Tensor | None = None
        self._slack: Tensor | None = None

    def add(self, step: int, now: Moment, preconditioner: Tensor | None) -> None:
        """Take the step that the batch ``step`` ends, before it is taken."""
        update, spread = self._steps.settings.update(step), self._steps.columns.spread
        lost = now.clip.lost()
        if preconditioner is None:
            if lost is not None:
                part = lost * spread(self._coefficients[update])
                self._rest = part if self._rest is None else self._rest + part
            return
        form, clipped = self._steps.form, now.clip.clipped()
        carry, gain = spread(form.carry[update]), spread(form.gain[update])
        seen = clipped if lost is None else clipped - lost
        pull = self._steps.family.coupled_pull(self._steps.settings, self._steps.columns, update, now)
        true = carry * now.state[0] + gain * (clipped if pull is None else clipped + pull)
        if self._rest is None or self._momentum is None:
            self._rest, self._momentum = torch.zeros_like(clipped), torch.zeros_like(clipped)
        self._momentum.mul_(carry).add_(gain * preconditioner * seen)
        self._rest.mul_(1.0 - spread(form.shrink[update]))
        self._rest.sub_(
            spread(form.rate[update] * form.along[update]) * (preconditioner * true - self._momentum)
        )
        self._allow(self._coefficients[update], now, clipped, preconditioner)

    def _allow(self, coefficients: Float, now: Moment, clipped: Tensor, preconditioner: Tensor) -> None:
        """Note what rounding of gradients may come to: D makes as much of them where they are nothing else.

        Coordinates that no gradient ever reached have the largest D, and exact zeros in every row.
        """
        reached = (preconditioner * ((now.state[1] > 0) | (clipped != 0))).double()
        scales = torch.stack([reached[span].norm() for span in self._spans])
        own = torch.stack([_largest(clipped[span]) for span in self._spans])
        most, unit = own.max(), UNIT[str(clipped.dtype).removeprefix("torch.")]
        # A gradient as small as this may be what rounding of others leaves of zero, such as that of a shift
        # before a softmax.
        error = unit * own + torch.where(own < NOISE * most, torch.minimum(own, unit * most), 0.0)
        lanes = torch.from_numpy(np.append(coefficients, 0.0)[list(self._lanes)]).to(scales)
        part = (scales * error * lanes) ** 2
        self._slack = part if self._slack is None else self._slack + part

    def of_segment(self, first: int, stop: int) -> Float:
        """Return what rest and momentum of the beginning become until the end of a segment, (P, 3).

        rest <- rest + (column 0) rest' + (column 1) q';  q <- q + (column 2) q',  with ' of the beginning.

        Args:
            first: First batch of the segment that was followed.
            stop: One past the last.
        """
        form, settings = self._steps.form, self._steps.settings
        kept, pushed, left = (np.full(form.rate.shape[1], one) for one in (1.0, 0.0, 1.0))
        for t in range(settings.update(first), settings.update(stop - 1) + 1):
            left = form.carry[t] * left
            kept = (1.0 - form.shrink[t]) * kept
            pushed = (1.0 - form.shrink[t]) * pushed + form.rate[t] * form.along[t] * left
        if self._momentum is None:  # without a preconditioner nothing is left out but what clipping takes
            kept, pushed, left = (np.full_like(kept, one) for one in (1.0, 0.0, 0.0))
        return np.stack([np.append(kept, 1.0), np.append(pushed, 0.0), np.append(left, 0.0)], 1)[
            list(self._lanes)
        ]

    @property
    def momentum(self) -> Float | None:
        """The momentum of the mean row, (D,); None: rows have none."""
        return None if self._momentum is None else self._momentum.double().cpu().numpy()

    @property
    def vector(self) -> Float | None:
        """The rest, (D,); None: nothing was left out."""
        return None if self._rest is None else self._rest.double().cpu().numpy()

    @property
    def slack(self) -> Float:
        """What rounding of the gradients may come to in each parameter, (P,)."""
        if self._slack is None:
            return np.zeros(len(self._spans))
        found: Float = self._slack.sqrt().cpu().numpy()
        return found


def leaves_a_rest(settings: Settings) -> bool:
    """Whether the law needs it for a record."""
    clip = settings.clip_factor
    return settings.family != "sgd" or (clip is not None and bool((clip < 1).any()))


def joined_rests(segments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``rest``, ``rest_size`` and ``slack`` of a training from those of its segments, in their order.

    The recursion is linear in what a segment begins with, and each began with nothing. Sizes are bounds.

    Args:
        segments: What ``RowSums.values`` returned of each, with what ``of_segment`` says as ``carried``.
    """
    if not any("rest" in one for one in segments):
        return {}
    count = len(segments[0]["carried"])
    rest, momentum = np.zeros((count, 1)), np.zeros((count, 1))
    size, pushed, slack = np.zeros(count), np.zeros(count), np.zeros(count)
    for one in segments:
        kept, push, left = np.asarray(one["carried"], dtype=np.float64).T

        def of(name: str, like: Float, found: Mapping[str, Any] = one) -> Float:
            values = found.get(name)
            return np.zeros_like(like) if values is None else np.asarray(values, dtype=np.float64)

        rest = kept[:, None] * rest + push[:, None] * momentum
        rest = rest + of("rest", rest)
        size = np.abs(kept) * size + np.abs(push) * pushed
        size = size + of("rest_size", size)
        momentum = left[:, None] * momentum
        momentum = momentum + of("momentum", momentum)
        pushed = np.abs(left) * pushed
        pushed = pushed + of("momentum_size", pushed)
        slack = np.hypot(slack, of("slack", size))
    return {"rest": rest.tolist(), "rest_size": size.tolist(), "slack": slack.tolist()}


def _largest(values: Tensor) -> Tensor:
    return values.abs().max().double() if values.numel() else values.new_zeros((), dtype=torch.float64)
