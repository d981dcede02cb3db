"""Where each trainable parameter lies in the flat vector of D numbers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...storage.errors import RecipeError
from ...storage.trajectory import ParameterEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The parameters that require gradients, in ``named_parameters()`` order, each row-major.

    Attributes:
        entries: Name, shape, optimiser group (-1: not optimised) and offset of each parameter.
        dimension: D, the sum of their sizes.
    """

    entries: tuple[ParameterEntry, ...]
    dimension: int

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Mapping[str, object]] = ()) -> Layout:
        """Read the layout off a model and the optimiser's ``param_groups``.

        Raises:
            RecipeError: No parameter requires gradients, or none of those is optimised.
        """
        group_of = {id(p): g for g, group in enumerate(groups) for p in group["params"]}  # type: ignore[attr-defined]
        entries, start = [], 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                group = group_of.get(id(parameter), -1)
                shape = tuple(parameter.shape)
                entries.append(ParameterEntry(name=name, shape=shape, group=group, start=start))
                start += parameter.numel()
        if not entries:
            raise RecipeError("the model has 0 parameters that require gradients; unfreeze at least one")
        if groups and all(entry.group < 0 for entry in entries):
            raise RecipeError(
                "the optimizer holds 0 of the model's trainable parameters; "
                "build it from the model passed to optimizer(model)"
            )
        return cls(entries=tuple(entries), dimension=start)

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the model's parameters in layout order."""
        by_name = dict(model.named_parameters())
        return [by_name[entry.name] for entry in self.entries]

    def size(self, index: int) -> int:
        """Return how many numbers parameter ``index`` has."""
        stop = self.entries[index + 1].start if index + 1 < len(self.entries) else self.dimension
        return stop - self.entries[index].start

    def column_groups(self, values: Sequence[int] | None = None) -> Tensor:
        """Return the optimiser group of every flat coordinate, or its parameter's of ``values``; (D,), int64."""
        out = torch.empty(self.dimension, dtype=torch.int64)
        for i, entry in enumerate(self.entries):
            out[entry.start : entry.start + self.size(i)] = entry.group if values is None else values[i]
        return out


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one flat vector of shape (D,), detached."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def load_flat(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    """Copy a flat vector of shape (D,) into the parameters."""
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.copy_(vector[start:stop].view_as(parameter))
        start = stop


def checksum(tensors: Sequence[Tensor]) -> int:
    """Return the crc32 of the tensors' bytes, in order; a device is waited for once."""
    value = 0
    if tensors and tensors[0].device.type != "cpu" and len({(t.device, t.dtype) for t in tensors}) == 1:
        tensors = [flatten(tensors)]
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        value = zlib.crc32(array.data if array.ndim else array.tobytes(), value)
    return value
