"""Per-sample gradients of chosen rows of a batch, handed over in blocks of a few rows.

Three strategies, chosen per parameter by ``probe``: ``rule`` (products of what hooks caught in the
training step itself), ``func`` (``vmap(grad)``) and ``vjp`` (one backward pass a row). Rows are
worked on in tiles of a fixed size, so that a row's bits do not depend on which other rows are asked
for: the number of shards then changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...storage.errors import RecipeError
from ..layout import Layout
from ..recipe import Batch, Recipe
from .capture import Call, Capture
from .reference import func, vjp

Strategy = Literal["outer", "rule", "func", "vjp"]
"""``outer``: a rule whose result is one outer product a row, so that it may be kept as factors."""

Sink = Callable[[int, Tensor], None]
"""Takes (first row, block): per-sample gradients of rows first, first + 1, … of those asked for."""

FactorSink = Callable[[int, Tensor, Tensor], None]
"""Takes (entry, d_R, x_R): the gradient of row r is the outer product of d_R[r] and x_R[r]."""

TILE = 16
"""Rows worked on at a time on a CPU: the block stays in cache. Larger also wastes padding."""

DEVICE_TILE = 64
"""The same on an accelerator, where every call costs a launch."""


class PerSampleGradients:
    """Computes g_i for the rows of a batch while (or right after) the batch's own step runs.

    Args:
        recipe: Gives the losses.
        model: The model being trained; hooks are put on it.
        layout: Where each parameter lies in the flat vector.
        strategies: One strategy per entry of the layout.
        factored: Entries (weights of Linear layers) handed over as factors instead of in the block.

    Attributes:
        columns: Per entry, its first column in the block; None for factored entries.
        width: Columns of the block, D when nothing is factored.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        layout: Layout,
        strategies: Sequence[Strategy],
        factored: frozenset[int] = frozenset(),
    ) -> None:
        self.recipe, self.model, self.layout = recipe, model, layout
        self.strategies = tuple(strategies)
        self._parameters = layout.parameters(model)
        self.index = {id(p): i for i, p in enumerate(self._parameters)}
        self._by = {
            kind: [i for i, strategy in enumerate(self.strategies) if strategy == kind]
            for kind in ("func", "vjp")
        }
        self._by["rule"] = [i for i, s in enumerate(self.strategies) if s in ("outer", "rule")]
        names = [entry.name for entry in layout.entries]
        like = self._parameters[0]
        self.tile = TILE if like.device.type == "cpu" else DEVICE_TILE
        self.factored = factored
        self.columns, self.width = _columns(layout, factored)
        self._block = torch.empty(self.tile, self.width, dtype=like.dtype, device=like.device)
        self.views = _views(self._block, layout, self.columns)
        self._ready: dict[int, Tensor] = {}
        self._dense = {i for i in self._by["rule"] if i not in factored}
        self.capture = Capture(model, {id(self._parameters[i]): names[i] for i in self._by["rule"]})

    def watch(self, positions: Tensor, sink: Sink, factors: FactorSink | None = None) -> Watch:
        """Return what a training step needs to hand the rows at ``positions`` (R,) to the sinks."""
        return Watch(engine=self, positions=positions, sink=sink, factors=factors)

    def before_backward(self, losses_B: Tensor, positions: Tensor) -> None:
        """Do what needs the graph: rows of the ``vjp`` parameters. Call before ``backward``."""
        self._ready = {}
        chosen = self._by["vjp"]
        if not chosen:
            return
        self.capture.pause()
        parameters = [self._parameters[i] for i in chosen]
        self._fill(chosen, positions, len(losses_B), lambda span: vjp(losses_B, parameters, span))
        self.capture.resume()

    def after_backward(
        self,
        batch: Batch,
        positions: Tensor,
        batch_size: int,
        sink: Sink,
        factors: FactorSink | None = None,
    ) -> None:
        """Hand over the rows, a tile at a time; weights must not have moved yet.

        Args:
            batch: The batch the step ran on, on the model's device.
            positions: (R,) batch positions of the rows.
            batch_size: B, the real number of samples in the batch.
            sink: Gets the first row's number and a (rows, width) block, only valid during the call.
            factors: Gets the factors of factored entries, for all rows at once.

        Raises:
            RecipeError: A layer's tensors do not have the batch on their leading axis.
        """
        chosen = self._by["func"]
        names = [self.layout.entries[i].name for i in chosen]
        self._fill(
            chosen, positions, batch_size, lambda span: func(self.recipe, self.model, names, batch, span)
        )
        calls = [call for call in self.capture.take() if call.d_B is not None]
        inputs = [self.prepared(call, batch_size) for call in calls]
        handed: set[int] = set()
        for call in calls:
            assert call.d_B is not None
            # The batch loss is a mean: times B gives the gradient of each sample's own loss.
            call.d_B = call.d_B * batch_size
            if self.factored and factors:
                self._hand_factors(call, positions, factors, handed)
        for start in range(0, len(positions), self.tile):
            rows = positions[start : start + self.tile]
            count = len(rows)
            if count < self.tile:
                rows = torch.cat([rows, rows[-1:].expand(self.tile - count)])
            written: set[int] = set()
            for call, x_B in zip(calls, inputs, strict=True):
                self.products(call, x_B, rows, written)
            for i in self._dense:
                if i not in written:
                    self.views[i].zero_()
            for i, values in self._ready.items():
                self.views[i][:count] = values[start : start + count]
            sink(start, self._block[:count])
        self._ready = {}

    def prepared(self, call: Call, batch_size: int) -> Tensor:
        """Return what a call's rule takes as input, for the whole batch, after checking shapes."""
        assert call.d_B is not None
        if call.x_B.shape[:1] != (batch_size,) or call.d_B.shape[:1] != (batch_size,):
            raise RecipeError(
                f"layer {call.name!r} got an input of shape {tuple(call.x_B.shape)} in a batch of "
                f"{batch_size}; its leading axis must be the batch in every step"
            )
        _rule, prepare = self.capture.rules[call.module]
        return call.x_B if prepare is None else prepare(call.module, call.x_B)

    def _hand_factors(self, call: Call, positions: Tensor, factors: FactorSink, handed: set[int]) -> None:
        for _name, parameter in call.module.named_parameters(recurse=False):
            i = self.index.get(id(parameter), -1)
            if i not in self.factored:
                continue
            assert call.d_B is not None
            if call.d_B.ndim != 2 or i in handed:
                raise RecipeError(
                    f"layer {call.name!r} saw one (batch, features) input a step when the run began, and now "
                    f"{'a second call' if i in handed else f'{call.d_B.ndim} axes'}; "
                    "let every step use it the same way"
                )
            handed.add(i)
            d_B, x_B = self.factors_of(call, i, call.d_B)
            factors(i, d_B.index_select(0, positions), x_B.index_select(0, positions))

    def factors_of(self, call: Call, entry: int, d_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors (B, O) and (B, I) of a factored entry for the whole batch."""
        return d_B, call.x_B

    def products(self, call: Call, x_B: Tensor, positions: Tensor, written: set[int]) -> None:
        """Write (or add to) one call's products in the tile; ``written`` collects the entries hit."""
        assert call.d_B is not None
        rule, _prepare = self.capture.rules[call.module]
        owned = [
            (name, self.index[id(parameter)])
            for name, parameter in call.module.named_parameters(recurse=False)
            if self.index.get(id(parameter)) in self._dense
        ]
        if not owned:
            return
        x_R = x_B.index_select(0, positions)
        d_R = call.d_B.index_select(0, positions)
        for name, i in owned:
            if i in written:  # a layer used twice, or a parameter two layers share
                again = torch.empty_like(self.views[i], memory_format=torch.contiguous_format)
                rule(call.module, name, x_R, d_R, again)
                self.views[i] += again
            else:
                rule(call.module, name, x_R, d_R, self.views[i])
                written.add(i)

    def _fill(
        self,
        chosen: Sequence[int],
        positions: Tensor,
        batch_size: int,
        compute: Callable[[Tensor], list[Tensor]],
    ) -> None:
        """Get rows of slow parameters, in fixed spans of the batch, for ``after_backward``.

        What autograd does inside a span is not ours to align, so a span that holds a wanted row is
        computed whole: its bits then depend on the batch alone.
        """
        if not chosen:
            return
        for i in chosen:
            shape = (len(positions), *self.layout.entries[i].shape)
            self._ready[i] = self._block.new_empty(shape)
        for start in range(0, batch_size, self.tile):
            stop = min(start + self.tile, batch_size)
            slots = torch.nonzero((positions >= start) & (positions < stop)).flatten()
            if not len(slots):
                continue
            found = compute(torch.arange(start, stop, device=positions.device))
            for i, values in zip(chosen, found, strict=True):
                self._ready[i][slots] = values[positions[slots] - start]

    def close(self) -> None:
        """Take the hooks off the model."""
        self.capture.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Whose gradients to take in a training step, and who gets them."""

    engine: PerSampleGradients
    positions: Tensor
    sink: Sink
    factors: FactorSink | None = None


def _columns(layout: Layout, factored: frozenset[int]) -> tuple[list[int | None], int]:
    columns: list[int | None] = []
    width = 0
    for i in range(len(layout.entries)):
        columns.append(None if i in factored else width)
        width += 0 if i in factored else layout.size(i)
    return columns, width


def _views(block: Tensor, layout: Layout, columns: Sequence[int | None]) -> list[Tensor]:
    """Split a block into (rows, *parameter shape) views; empty ones for factored entries."""
    return [
        block[:, :0]
        if start is None
        else block[:, start : start + layout.size(i)].view(-1, *layout.entries[i].shape)
        for i, start in enumerate(columns)
    ]
