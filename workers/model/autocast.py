"""``torch.autocast`` inside a recipe's losses: noticed, and left out where derivatives are taken twice.

Training and its per-sample gradients run as the recipe says. A derivative of gradients that were rounded to
bfloat16 is mostly rounding, so second derivatives are those of the same losses in the run's own precision: the
function that autocast approximates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...storage.errors import RecipeError


@contextmanager
def _entering(change: Callable[[Any], None]) -> Iterator[None]:
    enter: Callable[[Any], Any] = torch.autocast.__enter__

    def entered(self: Any) -> Any:
        change(self)
        return enter(self)

    torch.autocast.__enter__ = entered  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def full_precision() -> Iterator[None]:
    """Let ``torch.autocast`` do nothing."""

    def off(context: Any) -> None:
        context._enabled = False

    with _entering(off):
        yield


@contextmanager
def noticed() -> Iterator[set[str]]:
    """Give the names of the types that autocast computes in, as they are entered."""
    found: set[str] = set()

    def note(context: Any) -> None:
        if context._enabled:
            found.add(str(context.fast_dtype).removeprefix("torch."))

    with _entering(note):
        yield found


def refuse_low_precision(model: nn.Module) -> None:
    """Raise RecipeError where weights are kept in 16 bits or fewer: training would be another in the run's type."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise RecipeError(
                f"parameter {name!r} is {kind}, and training here keeps weights in float32 or float64; leave the model in "
                f"float32 and compute in {kind} under torch.autocast inside losses()"
            )
