"""The common form of a step for recursions of scalars; see ``coefficients``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .settings import Bool, Float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scalars:
    """Factors of ``m' = p m + k r``, ``w' = (1 - e) w - h (s m' + q r)``, ``r = g + L w``, each (U, L).

    Attributes:
        carry: p.
        gain: k.
        along: s.
        direct: q.
        rate: h.
        decay: L.
        shrink: e.
    """

    carry: Float
    gain: Float
    along: Float
    direct: Float
    rate: Float
    decay: Float
    shrink: Float

    def only(self, active: Bool) -> Scalars:
        """Return the form in which steps of lanes that are not active change nothing."""
        return Scalars(
            carry=np.where(active, self.carry, 1.0),
            **{
                name: np.where(active, getattr(self, name), 0.0)
                for name in ("gain", "along", "direct", "rate", "decay", "shrink")
            },
        )
