"""Kronecker factors of the curvature: second moments of what each layer saw and of what came back to it.

Letters as in ``ekfac``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...storage.curvature import BlockBasis
from ..persample.capture import Call
from ..persample.engine import PerSampleGradients
from ..persample.rules import AppliedLinear, is_transposed_linear, unfolded
from .core import axes

POSITIONS = 64
"""Positions of a convolution's output that are looked at, at most."""


class Factors:
    """Sums x x^T and d d^T over what each layer saw, by its weight.

    Args:
        entries: Of the layout.
        engine: Whose layers are looked at.
        lanes: Of each entry.
    """

    def __init__(self, entries: Sequence[Any], engine: PerSampleGradients, lanes: Sequence[int]) -> None:
        self.entries, self.engine, self.lanes = entries, engine, lanes
        self.sums: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.layers: dict[int, tuple[int, ...]] = {}
        self.modules: list[tuple[nn.Module, tuple[int, ...]]] = []
        owners: dict[int, int] = {}
        whole = [module for module in engine.capture.rules if not _in_part(module, "weight")]
        self.in_part: set[int] = set()
        for module in whole:
            for name, parameter in module.named_parameters(recurse=False):
                i = engine.index.get(id(parameter), -1)
                owners[i] = owners.get(i, 0) + (2 if _in_part(module, name) else 1)
        for module in whole:
            weight = engine.index.get(id(getattr(module, "weight", None)), -1)
            if weight >= 0 and owners[weight] == 1 and _has_form(module):
                self.layers[id(module)] = self._with_bias(module, weight, owners)
                self.modules.append((module, self.layers[id(module)]))

    def _with_bias(self, module: nn.Module, weight: int, owners: dict[int, int]) -> tuple[int, ...]:
        """A bias joins its weight's block unless it is optimised otherwise, or would be a row of it."""
        if is_transposed_linear(module):
            return (weight,)
        bias = self.engine.index.get(id(getattr(module, "bias", None)), -1)
        if bias >= 0 and owners[bias] == 1 and self.lanes[bias] == self.lanes[weight]:
            return (weight, bias)
        return (weight,)

    def add(self, calls: Sequence[Call]) -> None:
        """Take the calls of a batch."""
        for call in calls:
            if _in_part(call.module, "weight") and call.d_B is not None:
                self.in_part.add(self.engine.index.get(id(call.module.weight), -1))
            layer = self.layers.get(id(call.module))
            if layer is None or call.d_B is None:
                continue
            x, d = _rows(call.module, call.x_B, call.d_B)
            if x is not None and len(layer) == 2:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            left, right = None if x is None else (x.T @ x).double(), (d.T @ d).double()
            if is_transposed_linear(call.module):
                left, right = right, left
            self._sum(layer[0], left, right)

    def take_scaled(self, root_D: Tensor, _start: int, block: Tensor) -> None:
        """Take rows that are still to be scaled."""
        self.add_scaled(block * root_D)

    def add_scaled(self, rows_RD: Tensor) -> None:
        """Take scaled gradients: sums of G^T G and G G^T in place of x x^T and d d^T."""
        for module, layer in self.modules:
            parts = []
            for i in layer:
                start = self.entries[i].start
                width = math.prod(self.entries[i].shape)
                parts.append(
                    rows_RD[:, start : start + width].reshape(
                        len(rows_RD), self.entries[layer[0]].shape[0], -1
                    )
                )
            matrix = torch.cat(parts, 2)
            across = matrix.reshape(-1, matrix.shape[2])
            right = (across.T @ across).double()
            if isinstance(module, nn.Embedding):
                self._sum(layer[0], None, right)
            else:
                along = matrix.transpose(0, 1).reshape(matrix.shape[1], -1)
                self._sum(layer[0], right, (along @ along.T).double())

    def _sum(self, weight: int, left: Tensor | None, right: Tensor) -> None:
        before = self.sums.get(weight)
        if before is not None:
            left = None if left is None or before[0] is None else left + before[0]
            right = right + before[1]
        self.sums[weight] = (left, right)

    def blocks(self) -> tuple[BlockBasis, ...]:
        """Return one block a layer with a Kronecker form, and one for every parameter left over."""
        joined = {
            layer[0]: layer
            for layer in self.layers.values()
            if layer[0] in self.sums and layer[0] not in self.in_part
        }
        taken = {i for layer in joined.values() for i in layer}
        out = []
        for i, entry in enumerate(self.entries):
            size = int(np.prod(entry.shape)) if entry.shape else 1
            if i in joined:
                x, d = self.sums[i]
                if x is None:  # an embedding's inputs are one-hot: its rows are their own axes
                    basis = BlockBasis(
                        entries=(i,),
                        rows=entry.shape[0],
                        columns=size // entry.shape[0],
                        left=None,
                        right=_axes(d),
                    )
                else:
                    basis = BlockBasis(
                        entries=joined[i], rows=len(d), columns=len(x), left=_axes(d), right=_axes(x)
                    )
                out.append(basis)
            elif i not in taken:
                out.append(BlockBasis(entries=(i,), rows=1, columns=size, left=None, right=None))
        return tuple(out)


def _has_form(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1
    return isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag)) or is_transposed_linear(module)


def _in_part(module: nn.Module, name: str) -> bool:
    """Whether a layer uses some rows of a parameter alone."""
    return isinstance(module, AppliedLinear) and module.rows.get(name) is not None


def _rows(module: nn.Module, x_B: Tensor, d_B: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return what a layer saw and got back as (rows, I) and (rows, O); no inputs for embeddings."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        steps = grid(d_B.shape[2:])
        d = d_B[(slice(None), slice(None), *(slice(None, None, step) for step in steps))]
        return (
            unfolded(module, x_B, d_B.shape[2:], steps),
            d.flatten(2).transpose(1, 2).reshape(-1, d.shape[1]),
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None, d_B.reshape(-1, d_B.shape[-1])
    return x_B.reshape(-1, x_B.shape[-1]), d_B.reshape(-1, d_B.shape[-1])


def grid(sizes: Sequence[int]) -> list[int]:
    """Return, by axis of a convolution's output, every how many positions are looked at: `POSITIONS` at most in all.

    Neighbours see nearly the same, so that a grid of them says of E[x x^T] nearly what all of them say.
    """
    steps = [1] * len(sizes)
    while math.prod(-(-size // step) for size, step in zip(sizes, steps, strict=True)) > POSITIONS:
        widest = max(range(len(sizes)), key=lambda k: -(-sizes[k] // steps[k]))
        steps[widest] += 1
    return steps


def _axes(matrix: Tensor) -> npt.NDArray[np.float64]:
    return axes(matrix.cpu().numpy())
