"""The scalar recursion between two moments of training, for both tangents of a sample.

The closed form's coefficients (see ``coefficients``) depend on where training ends. To know the
state (du, dm) at several moments the steps are cut into segments: from border a to border b the
recursion is linear in what was there at a and in the gradients met on the way,

    du_b = Phi_uu du_a + Phi_um dm_a + sum over the steps t of the segment of  c_u,t (N / B_t) g_{t-1,i}
    dm_b = Phi_mu du_a + Phi_mm dm_a + sum ...                                 c_m,t (N / B_t) g_{t-1,i}

and one backward pass over the segment, started once from du and once from dm, gives c_u,t, c_m,t and the
2 x 2 map. W is what the scalars are held for: G parameter groups, or D eigendirections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .coefficients import Settings, scalars
from .scalars import Scalars

Spread = Callable[[npt.NDArray[np.float64]], Tensor]
"""Turns one value per parameter group, (G,), into (W,) float64."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """Batches ``first`` to ``stop``, S of them.

    Attributes:
        first: First batch.
        stop: One past the last.
        on: (2, S, W): what a gradient met at each batch adds to du and to dm at the end.
        carried: (2, 2, W): what du and dm of the beginning add to du (row 0) and dm (row 1).
    """

    first: int
    stop: int
    on: Tensor
    carried: Tensor


class Segments:
    """Makes segments of one set of recorded settings.

    Args:
        settings: What the optimiser used at every step of the whole training, (T, G).
        spread: From groups to what the scalars are held for.
        curvature: Gives the Hessian's eigenvalues at a step of the optimiser, (W,); None drops the Hessian.
        dtype: Of the coefficients that are kept, one a step.
        form: The steps as scalars; None: those of the settings.
    """

    def __init__(
        self,
        settings: Settings,
        spread: Spread,
        curvature: Callable[[int], Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        form: Scalars | None = None,
    ) -> None:
        self.settings, self.spread, self.curvature, self.dtype = settings, spread, curvature, dtype
        # Of the whole training: PyTorch's first step with momentum is another one.
        self._form = form or scalars(settings)

    def between(self, first: int, stop: int) -> Segment:
        """Return the segment of batches ``first`` to ``stop``, both borders between two steps."""
        form, spread, settings = self._form, self.spread, self.settings
        carry, gain, along, direct, rate, decay = (
            form.carry,
            form.gain,
            form.along,
            form.direct,
            form.rate,
            form.decay,
        )
        begin, end = settings.update(first), settings.update(stop - 1) + 1
        like = spread(rate[begin])
        one, none = torch.ones_like(like), torch.zeros_like(like)
        on_weight, on_momentum = torch.stack([one, none]), torch.stack([none, one])
        kept = torch.empty(2, end - begin, len(like), dtype=self.dtype, device=like.device)
        for t in range(end - 1, begin - 1, -1):
            on_momentum = on_momentum - spread(rate[t] * along[t]) * on_weight
            before = on_weight
            c = spread(gain[t]) * on_momentum - spread(rate[t] * direct[t]) * on_weight
            kept[:, t - begin] = c
            pull = spread(decay[t])
            if self.curvature is not None:
                pull = pull + self.curvature(t)
            on_weight = on_weight + pull * c
            if form.shrink[t].any():
                on_weight = on_weight - spread(form.shrink[t]) * before
            on_momentum = spread(carry[t]) * on_momentum
        carried = torch.stack([on_weight, on_momentum], 1)
        if settings.update_of is not None:
            kept = kept[:, torch.from_numpy(settings.update_of[first:stop] - begin)]
        return Segment(first=first, stop=stop, on=kept, carried=carried)
