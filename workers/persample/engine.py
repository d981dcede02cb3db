"""Per-sample gradients of chosen rows of a batch, handed over in blocks of a few rows.

Three strategies, chosen per parameter by ``trials``: ``rule`` (products of what hooks caught in the
training step itself), ``func`` (``vmap(grad)``) and ``vjp`` (one backward pass a row). A row's bits do
not depend on which other rows are asked for, so that the number of shards changes nothing: on a CPU rows
are worked on in multiples of ``TILE``, among which kernels give each the same bits; on an accelerator,
whose libraries choose kernels by size, all rows of a batch are computed, or tiles of one fixed size.

A strategy that a trial found right may still not fit a later step, and what is cheap to see is looked
at in every one: a layer that gets something else than the batch, samples whose loss alone is not
their loss in the batch, random numbers. There the step's rows go by ``vjp``, which is always right. And a
step whose graph has another form than those that were tried is tried itself, before its rows are believed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...storage.errors import RecipeError
from ..determinism import generator_states
from ..model.layout import Layout
from ..model.state import buffers_from, kept_buffers, own_parameters
from ..recipe import Batch, Recipe
from .capture import Call, Capture
from .channels import Spread, channel_rows, is_channel_norm, moments_of
from .reference import func, same_losses, vjp
from .rules import begins_a_line
from .ways import RULED, Before, Strategy, Ways, form_of

logger = logging.getLogger(__name__)

TakeRows = Callable[[int, Tensor], None]
"""Takes (first row, block): per-sample gradients of rows first, first + 1, … of those asked for."""

TakeFactors = Callable[[int, Tensor, Tensor | None], None]
"""Takes (entry, d_R, x_R): the gradient of row r is the outer product of d_R[r] and x_R[r]; where x_R is
None, d_R holds the gradients themselves, (R, *parameter shape)."""

TILE = 16
"""Rows worked on at a time on a CPU, or a multiple of it: the block stays in cache. Larger also wastes padding."""

DEVICE_TILE = 64
"""The same on an accelerator, where every call costs a launch."""

MOST_BYTES = {"cpu": 64 << 20}
"""A block of all rows of a batch takes no more by type of device, else ``MOST_ELSEWHERE``."""

MOST_ELSEWHERE = 1 << 30

AT_ONCE = 4 << 20
"""Bytes of products that wait for each other, to be written by one call."""


class PerSampleGradients:
    """Computes g_i for the rows of a batch while (or right after) the batch's own step runs.

    Args:
        recipe: Gives the losses.
        model: The model being trained; hooks are put on it.
        layout: Where each parameter lies in the flat vector.
        ways: One strategy per entry of the layout.
        factored: Entries (weights of Linear layers) handed over as factors instead of in the block.
        largest: Samples of the largest batch, where its rows may come in one block; 0: they come a tile at a time.

    Attributes:
        tile: Rows handed over at a time, at most.
        columns: Per entry, its first column in the block; None for factored entries, and those not asked for.
        width: Columns of the block, D when nothing is factored.
        notice: Told the form of every step's graph.
        repaired: Names of parameters that had to go by ``vjp`` in a step where their strategy did not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        layout: Layout,
        ways: Ways,
        factored: frozenset[int] = frozenset(),
        largest: int = 0,
    ) -> None:
        self.recipe, self.model, self.layout, self.ways = recipe, model, layout, ways
        self._parameters = layout.parameters(model)
        self.index = {id(p): i for i, p in enumerate(self._parameters)}
        self.strategies = _with_lenders(ways.strategies, model, self.index)
        self._by = {
            kind: [i for i, strategy in enumerate(self.strategies) if strategy == kind]
            for kind in ("func", "vjp")
        }
        self._by["rule"] = [i for i, s in enumerate(self.strategies) if s in RULED]
        like = self._parameters[0]
        self._accelerated = like.device.type != "cpu"
        self.factored = factored
        self._unasked = frozenset(i for i, way in enumerate(self.strategies) if way == "none")
        self.columns, self.width = _columns(layout, factored | self._unasked)
        self.span = self.tile = self.tile_for(like)
        # Whoever looks at the tile itself, and not at the block alone, wants the rows of the tile to be those asked for.
        self._at_once = self._accelerated and largest > 0
        if largest:
            most = MOST_BYTES.get(like.device.type, MOST_ELSEWHERE) // max(1, self.width * like.itemsize)
            self.tile = max(self.tile, min(_up(largest), most // TILE * TILE))
        self._block = torch.empty(self.tile, self.width, dtype=like.dtype, device=like.device)
        self.views = views_of(self._block, layout, self.columns)
        self._ready: dict[int, Tensor] = {}
        self._divisor: float = 1
        self._dense = {i for i in self._by["rule"] if i not in factored}
        self.capture = Capture(
            model, {id(self._parameters[i]): RULED[self.strategies[i]] for i in self._by["rule"]}
        )
        ruled = set(self._by["rule"])
        self._entries = {
            module: [
                (name, i)
                for name, parameter in module.named_parameters(recurse=False)
                if (i := self.index.get(id(parameter), -1)) in ruled
            ]
            for module in self.capture.rules
        }
        self.repaired: set[str] = set()
        self._forms: dict[int, frozenset[int]] = dict.fromkeys(ways.graphs, frozenset())
        self.notice: Callable[[int], None] | None = None
        self._places: dict[tuple[int, ...], Tensor] = {}

    @property
    def ruled(self) -> bool:
        """Whether all rows come from rules, unless a step is found to be another than those tried."""
        return not (self._by["func"] or self._by["vjp"])

    def tile_for(self, like: Tensor) -> int:
        """Return how many rows are worked on at a time."""
        return TILE if like.device.type == "cpu" else DEVICE_TILE

    @property
    def alone(self) -> bool:
        """Whether some gradients come from passes of single samples, given the batch (``func``)."""
        return bool(self._by["func"])

    def watch(self, positions: Tensor, sink: TakeRows, factors: TakeFactors | None = None) -> Watch:
        """Return what a training step needs to hand the rows at ``positions`` (R,) to the sinks."""
        return Watch(engine=self, positions=positions, sink=sink, factors=factors)

    def before(self) -> Before | None:
        """Note what a step begins with; to be called once its generators are seeded.

        Returns:
            None where no pass of its own can follow: all goes by ``vjp``.
        """
        if not self._by["func"] and not self._by["rule"]:
            return None
        return Before(
            generators=generator_states() if self._by["func"] else None,
            random=torch.get_rng_state(),
            buffers=kept_buffers(self.model, statistics=False),
        )

    def trace(
        self,
        batch: Batch,
        positions: Tensor,
        size: int,
        compute: Callable[[], Tensor],
        back: Callable[[Tensor], object],
        before: Before | None = None,
        divisor: float | None = None,
    ) -> Tensor:
        """Run a batch forward and backward and note what its rows are made of; see ``hand_over``.

        Args:
            batch: The batch, on the model's device.
            positions: (R,) batch positions of the rows wanted.
            size: B, the real number of samples in the batch.
            compute: Returns the losses, (B,).
            back: Runs the backward pass of their mean, or sum over ``divisor``, from the losses.
            before: What the step began with, where the pass repeats a step; None: as it is now.
            divisor: What the sum of the losses is divided by; None: B.

        Returns:
            The losses, (B,).
        """
        before = before or self.before()
        with self.capture.listen():
            losses_B = compute()
            self.capture.pause()
            self._slow_rows(batch, losses_B, positions, size, before)
            self.capture.resume()
            back(losses_B)
        self._divisor = size if divisor is None else divisor
        return losses_B

    def _slow_rows(
        self, batch: Batch, losses_B: Tensor, positions: Tensor, size: int, before: Before | None
    ) -> None:
        """Get the rows that need the graph of the batch, or passes of their own."""
        self._ready = {}
        chosen = [i for i in self._by["vjp"] if i not in self.ways.untried]
        unfit = {*self._misfits(size), *self._unproven(batch, losses_B, before)}
        chosen += sorted(unfit)
        if self.ways.untried:
            chosen += self.moving(sorted(self.ways.untried), losses_B)
        alone = [i for i in self._by["func"] if i not in unfit]
        if alone and before is not None and before.generators != generator_states():
            self._repair(alone, "random numbers are drawn")
            chosen, alone = chosen + alone, []
        for span, slots in self._spans(sorted(chosen + alone), positions, size):
            if chosen:
                self._put(chosen, slots, self._by_vjp(losses_B, chosen, span), positions, span)
            if alone:
                assert before is not None
                rows = self._by_func(batch, losses_B, alone, span, before)
                self._put(alone, slots, rows, positions, span)

    def _by_vjp(self, losses_B: Tensor, chosen: Sequence[int], span: Tensor) -> list[Tensor]:
        return vjp(losses_B, [self._parameters[i] for i in chosen], span)

    def _by_func(
        self, batch: Batch, losses_B: Tensor, chosen: Sequence[int], span: Tensor, before: Before
    ) -> list[Tensor]:
        """Return rows of samples taken alone, if they lose alone what they lose in the batch."""
        names = [self.layout.entries[i].name for i in chosen]
        together = losses_B.detach()
        try:
            with buffers_from(before.buffers), own_parameters(self.model):
                rows, losses = func(self.recipe, self.model, names, batch, span)
            if same_losses(losses, together[span], float(together.abs().max())):
                return rows
            why = "a sample's loss alone is not its loss in the batch"
        except Exception as error:  # noqa: BLE001 - whatever torch.func cannot do is what vjp is for
            why = f"torch.func fails: {type(error).__name__}"
        self._repair(chosen, why)
        return self._by_vjp(losses_B, chosen, span)

    def _repair(self, entries: Sequence[int], why: str) -> None:
        names = {self.layout.entries[i].name for i in entries}
        if not names <= self.repaired:
            logger.info("gradients inside the batch for %s: %s", ", ".join(sorted(names)), why)
        self.repaired |= names

    def _misfits(self, size: int) -> list[int]:
        """Return entries whose layers got something in this step that their rules do not know."""
        found: set[int] = set()
        seen: set[int] = set()
        for call in self.capture.calls:
            whole = call.covers(size)
            for _name, i in self._entries[call.module]:
                if not whole or (i in self.factored and (len(call.shape) != 2 or i in seen)):
                    found.add(i)
                seen.add(i)
        if found:
            self._repair(sorted(found), "their layer does not see the batch on the same axis in every step")
        return sorted(found)

    def _unproven(self, batch: Batch, losses_B: Tensor, before: Before | None) -> frozenset[int]:
        """Return entries whose way is not right for a graph of this form, which is tried where it is new."""
        if before is None or self.ways.judge is None:
            return frozenset()
        form = form_of(losses_B, self.index)
        if self.notice is not None:
            self.notice(form)
        if form not in self._forms:
            self._forms[form] = bad = self.ways.judge(self.model, batch, before) - self._unasked
            if bad:
                self._repair(sorted(bad), "a step with another graph than those tried before disagrees")
        return self._forms[form]

    def moving(self, entries: Sequence[int], losses_B: Tensor) -> list[int]:
        """Return those of the entries that any sample of the batch has a gradient for.

        One backward pass with random weights: what cancels in the mean does not cancel here.
        """
        generator = torch.Generator().manual_seed(len(losses_B))
        weights = torch.rand(len(losses_B), generator=generator, dtype=torch.float64) + 0.5
        found = torch.autograd.grad(
            losses_B,
            [self._parameters[i] for i in entries],
            weights.to(losses_B),
            retain_graph=True,
            allow_unused=True,
        )
        return [i for i, g in zip(entries, found, strict=True) if g is not None and bool(g.any())]

    def _spans(self, chosen: Sequence[int], positions: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (positions of a span of the batch, which rows lie in it) for fixed spans.

        What autograd does inside a span is not ours to align, so a span that holds a wanted row is
        computed whole: its bits then depend on the batch alone.
        """
        if not chosen:
            return
        for i in chosen:
            shape = (len(positions), *self.layout.entries[i].shape)
            self._ready[i] = self._block.new_zeros(shape)
        for start in range(0, size, self.span):
            stop = min(start + self.span, size)
            slots = torch.nonzero((positions >= start) & (positions < stop)).flatten()
            if len(slots):
                yield torch.arange(start, stop, device=positions.device), slots

    def _put(
        self, chosen: Sequence[int], slots: Tensor, rows: Sequence[Tensor], positions: Tensor, span: Tensor
    ) -> None:
        for i, values in zip(chosen, rows, strict=True):
            self._ready[i][slots] = values[positions[slots] - span[0]].to(self._block.dtype)

    def hand_over(
        self, positions: Tensor, size: int, sink: TakeRows, factors: TakeFactors | None = None
    ) -> None:
        """Hand over the rows of the batch that was traced last, a tile at a time.

        Args:
            positions: (R,) batch positions of the rows, ascending, as they were given to ``trace``.
            size: B, the real number of samples in the batch.
            sink: Gets the first row's number and a (rows, width) block, only valid during the call.
            factors: Gets the factors of factored entries, for all rows at once.
        """
        calls = [call for call in self.capture.take() if call.d_B is not None and self.owned(call)]
        inputs = [self.prepared(call, size) for call in calls]
        # The batch loss is a sum over B: times B gives the gradient of each sample's own loss.
        self._scale(calls)
        if factors:
            for call in calls:
                self._hand_factors(call, positions, size, factors)
            for i in self.factored & self._ready.keys():
                factors(i, self._ready[i], None)
        if self._at_once and size <= self.tile:
            block = self._every_row(calls, inputs, positions, size)
            sink(0, block if len(positions) == size else block.index_select(0, positions))
        else:
            for start in range(0, len(positions), self.tile):
                rows = positions[start : start + self.tile]
                self.fill(calls, inputs, self._padded(rows, size), size)
                for i, values in self._ready.items():
                    if i not in self.factored:
                        self.views[i][: len(rows)] = values[start : start + len(rows)]
                sink(start, self._block[: len(rows)])
        self._ready = {}

    def _scale(self, calls: Sequence[Call]) -> None:
        gradients = [call.d_B for call in calls if call.d_B is not None]
        if not gradients:
            return
        for call, scaled in zip(calls, torch._foreach_mul(gradients, self._divisor), strict=True):
            call.d_B = scaled

    def _padded(self, rows: Tensor, size: int) -> Tensor | None:
        """Return rows of a tile, the last one repeated up to a multiple; None: all of the batch as they lie."""
        missing = -len(rows) % TILE if not self._accelerated else self.tile - len(rows)
        if not missing and len(rows) == size:
            return None
        return torch.cat([rows, rows[-1:].expand(missing)]) if missing else rows

    def _every_row(
        self, calls: Sequence[Call], inputs: Sequence[Tensor], positions: Tensor, size: int
    ) -> Tensor:
        """Return the block of all samples of a batch."""
        self.fill(calls, inputs, None, size)
        for i, values in self._ready.items():
            if i not in self.factored:
                self.views[i][:size].index_copy_(0, positions, values)
        return self._block[:size]

    def fill(self, calls: Sequence[Call], inputs: Sequence[Tensor], rows: Tensor | None, size: int) -> None:
        """Write the products of calls for some rows into the tile; what no call gives is zero there.

        Args:
            calls: Of layers, their gradients those of the samples' own losses.
            inputs: What ``prepared`` gave for them.
            rows: (R,) batch positions; None: all.
            size: B.
        """
        tile = _Tile(self.views, size if rows is None else len(rows))
        norms = []
        for call, x_B in zip(calls, inputs, strict=True):
            owned = [(name, i) for name, i in self.owned(call) if i in self._dense]
            if not owned:
                continue
            assert call.d_B is not None
            x_R, d_R = (_chosen(values, rows) for values in (x_B, call.d_B))
            if is_channel_norm(call.module):
                norms.append((call, dict(owned), x_R, d_R))
                continue
            rule, _prepare = self.capture.rules[call.module]
            for name, i in owned:
                tile.take(i, partial(rule, call.module, name, x_R, d_R))
        if norms:
            moments = [call.moments for call, *_ in norms if call.moments is not None]
            spread = Spread(moments).over(tile.rows, self._places)
            for (_call, owned_by, x_R, d_R), own in zip(norms, spread, strict=True):
                found = dict(zip(("weight", "bias"), channel_rows(x_R, d_R, own), strict=True))
                for name, i in owned_by.items():
                    tile.take(i, partial(_made, found[name]))
        tile.finish(self._dense | (self.ways.untried - self._ready.keys()))

    def owned(self, call: Call) -> list[tuple[str, int]]:
        """Return (name in the layer, entry) of what a call's rule gives in this step."""
        owned = self._entries[call.module]
        return [(name, i) for name, i in owned if i not in self._ready] if self._ready else owned

    def owners(self) -> Iterator[set[int]]:
        """Yield the entries of each layer that has a rule."""
        for owned in self._entries.values():
            yield {i for _name, i in owned}

    def prepared(self, call: Call, batch_size: int) -> Tensor:
        """Return what a call's rule takes as input, for the whole batch, after checking shapes."""
        assert call.d_B is not None
        if call.x_B.shape[:1] != (batch_size,) or call.d_B.shape[:1] != (batch_size,):
            raise RecipeError(
                f"layer {call.name!r} got an input of shape {tuple(call.x_B.shape)} in a batch of "
                f"{batch_size}; its leading axis must be the batch in every step"
            )
        if is_channel_norm(call.module) and call.moments is None:
            call.moments = moments_of(call.module, call.x_B)
        _rule, prepare = self.capture.rules[call.module]
        return call.x_B if prepare is None else prepare(call.module, call.x_B)

    def _hand_factors(self, call: Call, positions: Tensor, size: int, factors: TakeFactors) -> None:
        for _name, i in self.owned(call):
            if i not in self.factored:
                continue
            assert call.d_B is not None
            both = self.factors_of(call, i, call.d_B)
            if len(positions) < size:
                both = (both[0].index_select(0, positions), both[1].index_select(0, positions))
            factors(i, *both)

    def factors_of(self, call: Call, entry: int, d_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors (B, O) and (B, I) of a factored entry for the whole batch."""
        return d_B, call.x_B

    def told(self) -> dict[str, Any]:
        """Return how the rows were had, JSON-able: counts of what is fast, names of what is not."""
        ways, names = self.ways, [entry.name for entry in self.layout.entries]
        named = {
            kind: [names[i] for i in self._by[kind] if i not in ways.untried] for kind in ("func", "vjp")
        }
        return {
            "rule": len(self._by["rule"]),
            **named,
            "untried": [names[i] for i in sorted(ways.untried)],
            "repaired": sorted(self.repaired),
            "random": ways.random,
            "coupled": ways.coupled,
            "noise": ways.noise,
            "trials": ways.trials,
            "rows": ways.rows,
        }

    def close(self) -> None:
        """Take the hooks off the model."""
        self.capture.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Whose gradients to take in a training step, and who gets them."""

    engine: PerSampleGradients
    positions: Tensor
    sink: TakeRows
    factors: TakeFactors | None = None


class _Tile:
    """What is written of a tile so far.

    Args:
        views: Of the block, (rows, *parameter shape) each.
        rows: R.
    """

    def __init__(self, views: Sequence[Tensor], rows: int) -> None:
        self._views, self.rows = views, rows
        self._written: set[int] = set()
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._bytes = 0

    def take(self, entry: int, give: Callable[[Tensor], Tensor | None]) -> None:
        """Write what ``give`` writes or returns; a second time (a layer used twice, a shared parameter) it is added."""
        view = self._views[entry][: self.rows]
        if entry in self._written:
            self._flush()
            again = torch.empty_like(view, memory_format=torch.contiguous_format)
            found = give(again)
            view += again if found is None else found
            return
        self._written.add(entry)
        found = give(view)
        if found is not None:
            self._waiting.append((view, found))
            self._bytes += found.nbytes
            if self._bytes > AT_ONCE:
                self._flush()

    def finish(self, entries: AbstractSet[int]) -> None:
        """Write what waits, and zero where nothing came."""
        self._flush()
        for i in sorted(entries - self._written):
            self._views[i][: self.rows].zero_()

    def _flush(self) -> None:
        if self._waiting:
            views, found = zip(*self._waiting, strict=True)
            torch._foreach_copy_(list(views), list(found))
        self._waiting, self._bytes = [], 0


def _chosen(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return rows of a batch, contiguous and beginning a line, whichever they are."""
    if rows is not None:
        return values.index_select(0, rows)
    return values if begins_a_line(values) else values.clone(memory_format=torch.contiguous_format)


def _made(values: Tensor, _out: Tensor) -> Tensor:
    return values


def _up(count: int) -> int:
    return -(-count // TILE) * TILE


def _with_lenders(
    strategies: Sequence[Strategy], model: nn.Module, index: dict[int, int]
) -> tuple[Strategy, ...]:
    """Return the strategies; tables that borrow another's gradients go by ``vjp`` where no other is caught."""
    tables = {index.get(id(m.weight), -1) for m in model.modules() if isinstance(m, nn.Embedding)} - {-1}
    if any(strategies[i] in RULED and strategies[i] != "lent" for i in tables):
        return tuple(strategies)
    return tuple("vjp" if strategy == "lent" else strategy for strategy in strategies)


def _columns(layout: Layout, factored: frozenset[int]) -> tuple[list[int | None], int]:
    columns: list[int | None] = []
    width = 0
    for i in range(len(layout.entries)):
        columns.append(None if i in factored else width)
        width += 0 if i in factored else layout.size(i)
    return columns, width


def views_of(block: Tensor, layout: Layout, columns: Sequence[int | None]) -> list[Tensor]:
    """Split a block into (rows, *parameter shape) views; empty ones for factored entries."""
    return [
        block[:, :0]
        if start is None
        else block[:, start : start + layout.size(i)].view(-1, *layout.entries[i].shape)
        for i, start in enumerate(columns)
    ]
