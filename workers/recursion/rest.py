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

from collections.abc import Sequence

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


def _largest(values: Tensor) -> Tensor:
    return values.abs().max().double() if values.numel() else values.new_zeros((), dtype=torch.float64)
