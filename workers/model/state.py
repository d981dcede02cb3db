"""A model's buffers (running statistics, power iterations, centres) around passes that are not the step.

Only the training step may move them: every other pass of the model works on copies, of what they were
before the step where it repeats the step's forward pass, and the model gets its own back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...storage.errors import RecipeError
from ..data.cast import raw_bytes

Kept: TypeAlias = list[tuple[nn.Module, str, Tensor]]
"""(module, name, copy of its buffer)."""


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether this BatchNorm layer couples the samples of a batch right now."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


def kept_buffers(model: nn.Module, *, statistics: bool = True) -> Kept:
    """Return copies of all buffers; a buffer that several modules hold is copied once.

    Args:
        model: The model.
        statistics: Whether those of BatchNorm layers are wanted, which stay as they are where the layer
            normalises with constant statistics.
    """
    copies: dict[int, Tensor] = {}
    return [
        (module, name, copies.setdefault(id(buffer), buffer.detach().clone()))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and (statistics or not uses_batch_statistics(module))
    ]


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises:
        RecipeError: It cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RecipeError(
            f"the model cannot be copied ({type(error).__name__}: {error}); "
            "tensors kept on modules must be leaves or buffers"
        ) from error


def same_buffer(buffer: Tensor | None, kept: Tensor) -> bool:
    """Whether a buffer still has the values of its copy; NaN counts as itself."""
    if buffer is None or buffer.shape != kept.shape:
        return False
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(torch.isclose(buffer, kept, rtol=0.0, atol=0.0, equal_nan=True).all())
    return torch.equal(buffer, kept)


@contextmanager
def buffers_from(kept: Kept) -> Iterator[None]:
    """Let the modules work on copies of ``kept`` and put their own buffers back.

    Copies are swapped in, not written back: a graph that saw a buffer must find it as it was.
    """
    own = [(module, name, module._buffers[name]) for module, name, _copy in kept]
    copies: dict[int, Tensor] = {}
    try:
        for module, name, buffer in kept:
            module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        yield
    finally:
        for module, name, buffer_or_none in own:
            module._buffers[name] = buffer_or_none


@contextmanager
def own_parameters(model: nn.Module) -> Iterator[None]:
    """Give every module its own parameters back after ``torch.func.functional_call``.

    That leaves the tensors it was given in a module that lies under two names of the model (torch 2.13).
    """
    own = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        yield
    finally:
        for module, parameters in own:
            for name, parameter in parameters.items():
                if module._parameters.get(name) is not parameter:
                    module._parameters[name] = parameter


def put_back(kept: Kept) -> None:
    """Give the modules copies of ``kept`` for good."""
    copies: dict[int, Tensor] = {}
    for module, name, buffer in kept:
        module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers, and put its own back."""
    with buffers_from(kept_buffers(model)):
        yield


def pack_buffers(model: nn.Module) -> bytes:
    """Return the bytes of all model buffers (BatchNorm statistics and the like), in order."""
    return b"".join(raw_bytes(buffer) for buffer in model.buffers())


@torch.no_grad()
def load_buffers(model: nn.Module, packed: bytes) -> None:
    """Inverse of ``pack_buffers``."""
    start = 0
    for buffer in model.buffers():
        stop = start + buffer.numel() * buffer.element_size()
        if stop > start:
            flat = torch.frombuffer(bytearray(packed[start:stop]), dtype=buffer.dtype)
            buffer.copy_(flat.view(buffer.shape))
        start = stop
