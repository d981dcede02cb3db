"""Casting: what becomes another dtype keeps its kind, real or complex.

``Module.to(dtype)`` makes a complex buffer (the ``freqs_cis`` of rotary embeddings) real and says so
in a warning only; here complex64 becomes complex128 beside float64 and the other way round. Integers
and booleans stay as they are.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def cast_dtype(source: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Return what ``source`` becomes where real numbers become ``dtype``."""
    if source.is_complex:
        return dtype.to_complex()
    return dtype if source.is_floating_point else source


def cast_tensor(tensor: Tensor, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """Return the tensor on ``device`` (None: where it is), real as ``dtype``, complex as its complex form."""
    return tensor.to(device=device, dtype=cast_dtype(tensor.dtype, dtype))


def cast_model(model: M, device: torch.device | None, dtype: torch.dtype) -> M:
    """Move parameters and buffers in place, each keeping its kind; return the model.

    Buffers that share memory with themselves (``expand``) become dense: they could not be written to.
    """

    def move(tensor: Tensor) -> Tensor:
        moved = cast_tensor(tensor, device, dtype)
        return moved.contiguous() if _overlaps(moved) else moved

    model._apply(move)  # type: ignore[no-untyped-call]
    return model


def raw_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's numbers as bytes, row-major, whatever its kind, device or lazy conjugation."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def _overlaps(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
