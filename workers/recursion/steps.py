"""The recorded steps of a training, ready to be differentiated one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .coefficients import scalars
from .columns import Columns
from .families import family_named
from .family import LinearStep, Moment
from .settings import Settings

if TYPE_CHECKING:
    from ..model.layout import Layout


class Steps:
    """Gives the derivative of each step of the optimiser.

    Args:
        settings: Of the record.
        layout: Where each parameter lies.
        dtype: Of the factors.
        device: Where they are used.

    Attributes:
        needs_moment: Whether a derivative depends on where training is, so that the step must be shown.
        vectors: Vectors of the optimiser beside the weights: as many tangents a sample beside du.
    """

    def __init__(self, settings: Settings, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.settings = settings
        self.family = family_named(settings.family)
        self.form = scalars(settings)
        self.columns = Columns(layout.column_groups(lanes_of(settings, layout)), dtype, device)
        self.needs_moment = self.family.moments(settings)
        self.vectors = len(self.family.vectors)

    def linear(self, step: int, moment: Moment | None = None) -> LinearStep:
        """Return the derivative of the step that the batch ``step`` belongs to."""
        return self.family.linear(self.settings, self.form, self.columns, self.settings.update(step), moment)

    def preconditioner(self, step: int, moment: Moment) -> Tensor | None:
        """Return what the step multiplies each coordinate with, (D,); None: nothing."""
        return self.family.preconditioner(self.settings, self.columns, self.settings.update(step), moment)


def lanes_of(settings: Settings, layout: Layout) -> Sequence[int]:
    """Return the lane of each parameter, -1: not optimised, (P,)."""
    if settings.lane_of is None:
        return [entry.group for entry in layout.entries]
    return [int(lane) for lane in settings.lane_of]
