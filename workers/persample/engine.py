"""Per-sample gradients of chosen rows of a batch, written into one (R, D) block.

Three strategies, chosen per parameter by ``probe``: ``rule`` (products of what hooks caught in the
training step itself), ``func`` (``vmap(grad)``) and ``vjp`` (one backward pass a row). Rows are
worked on in tiles of a fixed size, so that a row's bits do not depend on which other rows are asked
for: the number of shards then changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...storage.errors import RecipeError
from ..layout import Layout
from ..recipe import Batch, Recipe
from .capture import Call, Capture
from .reference import func, vjp

Strategy = Literal["rule", "func", "vjp"]

TILE = 16
"""Rows a product works on. Larger wastes padding when a shard has few rows a batch, smaller calls."""


class PerSampleGradients:
    """Computes g_i for the rows of a batch while (or right after) the batch's own step runs.

    Args:
        recipe: Gives the losses.
        model: The model being trained; hooks are put on it.
        layout: Where each parameter lies in the flat vector.
        strategies: One strategy per entry of the layout.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, layout: Layout, strategies: Sequence[Strategy]
    ) -> None:
        self.recipe, self.model, self.layout = recipe, model, layout
        self.strategies = tuple(strategies)
        self._parameters = layout.parameters(model)
        self.index = {id(p): i for i, p in enumerate(self._parameters)}
        self._by = {
            kind: [i for i, strategy in enumerate(self.strategies) if strategy == kind]
            for kind in ("rule", "func", "vjp")
        }
        names = [entry.name for entry in layout.entries]
        self.capture = Capture(model, {id(self._parameters[i]): names[i] for i in self._by["rule"]})

    def padded(self, positions: Tensor) -> Tensor:
        """Repeat the last position until the count is a multiple of ``TILE``."""
        missing = -len(positions) % TILE
        return torch.cat([positions, positions[-1:].expand(missing)]) if missing else positions

    def before_backward(self, block: Tensor, losses_B: Tensor, positions: Tensor) -> None:
        """Do what needs the graph: rows of the ``vjp`` parameters. Call before ``backward``."""
        chosen = self._by["vjp"]
        if not chosen:
            return
        self.capture.pause()
        views = self.layout.views(block)
        parameters = [self._parameters[i] for i in chosen]
        for block_positions, slots, taken in _blocks(positions, len(losses_B)):
            rows = vjp(losses_B, parameters, block_positions)
            for i, row in zip(chosen, rows, strict=True):
                views[i][slots] = row[taken]
        self.capture.resume()

    def after_backward(self, block: Tensor, batch: Batch, positions: Tensor, batch_size: int) -> None:
        """Write the rows of the ``rule`` and ``func`` parameters; weights must not have moved yet.

        Args:
            block: (R, D), R the padded number of positions; every column is written.
            batch: The batch the step ran on, on the model's device.
            positions: (R,) padded batch positions.
            batch_size: B, the real number of samples in the batch.

        Raises:
            RecipeError: A layer's tensors do not have the batch on their leading axis.
        """
        views = self.layout.views(block)
        written: set[int] = set()
        for call in self.capture.take():
            if call.d_B is not None:
                self.products(views, call, call.d_B, positions, batch_size, written)
        for i in self._by["rule"]:
            if i not in written:
                views[i].zero_()
        self._alone(views, batch, positions, batch_size)

    def products(
        self,
        views: Sequence[Tensor],
        call: Call,
        d_B: Tensor,
        positions: Tensor,
        batch_size: int,
        written: set[int],
    ) -> None:
        """Add one call's products to the views of the block; ``written`` collects the entries hit."""
        if call.x_B.shape[:1] != (batch_size,) or d_B.shape[:1] != (batch_size,):
            raise RecipeError(
                f"layer {call.name!r} got an input of shape {tuple(call.x_B.shape)} in a batch of "
                f"{batch_size}; its leading axis must be the batch in every step"
            )
        rule, prepare = self.capture.rules[call.module]
        x_B = call.x_B if prepare is None else prepare(call.module, call.x_B)
        owned = [
            (name, self.index[id(p)])
            for name, p in call.module.named_parameters(recurse=False)
            if self.index.get(id(p)) is not None and self.strategies[self.index[id(p)]] == "rule"
        ]
        for start in range(0, len(positions), TILE):
            tile = positions[start : start + TILE]
            x_R = x_B.index_select(0, tile)
            # The batch loss is a mean: times B gives the gradient of each sample's own loss.
            d_R = d_B.index_select(0, tile) * batch_size
            for name, i in owned:
                target = views[i][start : start + TILE]
                product = rule(call.module, name, x_R, d_R)
                if i in written:
                    target += product
                else:
                    target.copy_(product)
        written.update(i for _, i in owned)

    def _alone(self, views: Sequence[Tensor], batch: Batch, positions: Tensor, batch_size: int) -> None:
        chosen = self._by["func"]
        if not chosen:
            return
        names = [self.layout.entries[i].name for i in chosen]
        for block_positions, slots, taken in _blocks(positions, batch_size):
            rows = func(self.recipe, self.model, names, batch, block_positions)
            for i, row in zip(chosen, rows, strict=True):
                views[i][slots] = row[taken]

    def close(self) -> None:
        """Take the hooks off the model."""
        self.capture.close()


def _blocks(positions: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut the batch into fixed spans of ``TILE`` positions; yield those that hold a wanted one.

    What autograd does inside a span is not ours to align, so a span is always computed whole: its
    bits then depend on the batch alone.

    Yields:
        The span's positions, which rows of the block it fills, and its own rows that go there.
    """
    for start in range(0, batch_size, TILE):
        stop = min(start + TILE, batch_size)
        slots = torch.nonzero((positions >= start) & (positions < stop)).flatten()
        if len(slots):
            yield torch.arange(start, stop, device=positions.device), slots, positions[slots] - start
