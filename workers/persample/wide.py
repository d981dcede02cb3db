"""Trials in float64 of models that compute some of it in a lower precision: there, nothing does.

``x.float()``, ``softmax(..., dtype=torch.float32)`` and their like (norms and rotary embeddings of language models,
losses) round a trial in float64 to seven digits, and what is right can no longer be told from what is nearly
right. Rounding has no part in a derivative: a rule or a product that is right without it is right with it.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..recipe import Batch, Recipe

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class _Wide(TorchFunctionMode):
    """Casts to lower precisions become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _CASTS:
            return Tensor.double(args[0])
        if func in (Tensor.to, Tensor.type_as) and any(
            isinstance(a, Tensor) and a.dtype in _LOW for a in args[1:]
        ):
            return args[0].double()
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in _LOW else a for a in args)
        if kwargs.get("dtype") in _LOW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


_MARK = "_hydra_wide"


def widened(recipe: Recipe) -> Recipe:
    """Return a recipe that differs from the given one in that its losses are computed in float64 throughout."""
    other, plain = copy.copy(recipe), recipe.losses

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        with _Wide():
            return plain(model, batch)

    vars(other).update({"losses": losses, _MARK: True})
    return other


def mode_of(recipe: Recipe) -> AbstractContextManager[object]:
    """Return what layers are called under outside of the losses, where they are computed as these are."""
    return _Wide() if vars(recipe).get(_MARK) else nullcontext()
