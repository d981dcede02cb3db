"""The derivative of the update itself, where it is not the gradient of anything.

A step moves the weights by a field u(w), the gradient that ``backward`` gives. With ``detach``,
``.data`` or ``no_grad`` inside the losses (focal weights, target branches, straight-through rounding)
the field is no gradient: its derivative J = du/dw is not symmetric, and what is constant for the
gradient is not constant for J. Automatic differentiation stops at a ``detach`` in every order. Here it
stops for the inner derivative and passes for the outer one:

- ``forward_through()``: under it, ``jvp`` over ``vjp`` gives J v.
- ``backward_through()``: under it, ``backward`` over a recorded ``backward`` gives J^T a. The recorded
  one must run outside of ``outer_derivative()``, the second inside.

Operations without gradient run with one, each result stopped, so that ``no_grad`` passes too. What a
custom ``autograd.Function`` hides stays hidden: differences of the field judge every way (``hessian.differences``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_STOPS = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)  # type: ignore[attr-defined]
_MODE = torch._C._set_grad_enabled


class _PassesTangents(torch.autograd.Function):
    """The identity for forward mode, a constant for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.zeros_like(gradients[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        return tangents[0].clone()


class _PassesSecond(torch.autograd.Function):
    """A constant for the inner backward pass, the identity for the outer one."""

    outer = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] if _PassesSecond.outer else torch.zeros_like(gradients[0])


class _Through(TorchFunctionMode):
    def __init__(self, stop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._stop = stop

    def _stopped(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return self._stop(value)
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _STOPS:
            return self._stopped(args[0])
        if func is not _MODE and not torch.is_grad_enabled():
            with torch.enable_grad():
                return tree_map(self._stopped, func(*args, **kwargs))
        return func(*args, **kwargs)


@contextmanager
def forward_through() -> Iterator[None]:
    """Let what is detached be constant for ``vjp`` and not for ``jvp``."""
    with _Through(_PassesTangents.apply):
        yield


@contextmanager
def backward_through() -> Iterator[None]:
    """Let what is detached be constant for the first ``backward`` and not for the second."""
    with _Through(_PassesSecond.apply):
        yield


@contextmanager
def stopped() -> Iterator[None]:
    """Let what is detached be constant for ``jvp`` too; by itself that passes through ``no_grad``."""
    with _Through(torch.Tensor.detach):
        yield


@contextmanager
def seen_through() -> Iterator[None]:
    """Let nothing stop a gradient: that of a loss whose value, and not whose update, is asked for."""
    with _Through(lambda x: x):
        yield


@contextmanager
def outer_derivative() -> Iterator[None]:
    """Mark the second ``backward``."""
    _PassesSecond.outer = True
    try:
        yield
    finally:
        _PassesSecond.outer = False
