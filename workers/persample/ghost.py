"""Inner products of per-sample gradients with targets, straight from what the layers saw: no row of D numbers.

A Linear layer that saw x and got d back has the gradient d x^T, and <d x^T, G> = d . G x for the part G of a target
("ghost" products). A table's gradient is a few rows, so a few rows of the targets are looked up. Convolutions and
layers called on sequences have their gradients formed, a layer and some samples at a time, where that takes fewer
multiplications; so has whatever has no rule. What is in memory is independent of D times the samples.

Everything is chosen from shapes and the number of targets. All rows of a batch are taken together: who computes a
tile of targets follows the same samples, so that bits do not depend on the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.layout import Layout
from ..recipe import Recipe
from .capture import Call
from .channels import channel_rows, is_channel_norm
from .engine import PerSampleGradients, TakeFactors, TakeRows
from .rules import AppliedLinear, is_transposed_linear
from .targets import TargetTile, split
from .ways import Ways

ROW_BYTES = 64 << 20
"""Gradients of one layer that are formed at a time."""

WINDOW_BYTES = 2 << 20
"""What a convolution's kernel positions saw, formed at a time on a CPU: it stays in cache."""

MOVED = 8
"""Multiplications in a matrix product that take the time of moving one number to memory and back."""


class GhostProducts(PerSampleGradients):
    """Hands over products (R, Q) with targets, scaled by parameter, instead of rows; see ``PerSampleGradients``.

    Args:
        targets_QD: Gradients of the targets.
        tile: Targets multiplied at a time.
        weighed: Whether each step has a weight for each coordinate; see ``weigh``.

    Attributes:
        scales: What the products of each entry are multiplied with; 0: left out.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        layout: Layout,
        ways: Ways,
        *,
        targets_QD: Tensor,
        tile: int,
        weighed: bool = False,
    ) -> None:
        super().__init__(recipe, model, layout, ways)
        outer = {} if weighed else {i: bias for i, bias in self._pairs() if ways.strategies[i] == "outer"}
        self.tiles = [TargetTile(part, layout, outer) for part in targets_QD.split(tile)]
        self.count = len(targets_QD)
        self.scales: Sequence[float] = [1.0] * len(layout.entries)
        self._weights: list[Tensor] | None = None
        self._folded: list[TargetTile] = []
        self._fresh = False
        self._pull: tuple[TargetTile, list[Tensor], float, float] | None = None

    def _pairs(self) -> Iterator[tuple[int, int | None]]:
        """Yield each layer's weight, and the bias that is its own."""
        for owned in self._entries.values():
            by_name = dict(owned)
            if "weight" in by_name:
                yield by_name["weight"], by_name.get("bias")

    def weigh(self, weights_D: Tensor | None) -> None:
        """Note D_t: products are then <D_t g, target>."""
        self._weights = None if weights_D is None else split(weights_D, self.layout)
        self._fresh = False

    def clips(self, gradient_D: Tensor | None, share: float = 0.0, factor: float = 1.0) -> None:
        """Note a step's clipping: g becomes ``factor * (g - share * G <G, g>)``; None: nothing clips."""
        self._pull = None
        if gradient_D is not None:
            one = TargetTile(gradient_D.unsqueeze(0), self.layout)
            self._pull = one, split(gradient_D, self.layout), share, factor

    def hand_over(
        self, positions: Tensor, size: int, sink: TakeRows, factors: TakeFactors | None = None
    ) -> None:
        """Hand over the products of all rows at once; see ``PerSampleGradients.hand_over``."""
        batch = _Batch(self, positions, size)
        for call in self.capture.take():
            if call.d_B is not None and (owned := self.owned(call)):
                batch.add_call(call, owned, self.prepared(call, size))
        for i, rows in self._ready.items():
            batch.add_rows(i, rows)
        self._ready = {}
        sink(0, batch.products())

    @property
    def divisor(self) -> float:
        """What the losses of the batch were divided by before they went back."""
        return self._divisor

    def folds(self, rows: int) -> bool:
        """Whether weights are multiplied into the targets, where these are fewer than the rows."""
        return self._weights is not None and self.count <= rows

    def targets(self, rows: int) -> list[TargetTile]:
        """Return the targets for a batch, weighed where they are to be."""
        if not self.folds(rows):
            return self.tiles
        if not self._fresh:
            assert self._weights is not None
            olds: list[TargetTile | None] = [*self._folded] or [None] * len(self.tiles)
            self._folded = [t.weighed(self._weights, old) for t, old in zip(self.tiles, olds, strict=True)]
            self._fresh = True
        return self._folded

    def weights_of(self, entry: int, rows: int) -> Tensor | None:
        """Return what gradients of an entry are multiplied with themselves."""
        return None if self._weights is None or self.folds(rows) else self._weights[entry]

    @property
    def pull(self) -> tuple[TargetTile, list[Tensor], float, float] | None:
        """The step's gradient as a target, its parts, share and factor, see ``clips``; None: no clipping."""
        return self._pull


class _Batch:
    """The products of one batch.

    Args:
        engine: Whose.
        positions: (R,) of the rows in the batch, ascending.
        size: B.
    """

    def __init__(self, engine: GhostProducts, positions: Tensor, size: int) -> None:
        self.engine, self.positions, self.count = engine, positions, len(positions)
        self.all = self.count == size
        like = engine._block
        self.tiles = engine.targets(self.count)
        self.sums = [like.new_zeros(self.count, tile.count) for tile in self.tiles]
        self.on_gradient = None if engine.pull is None else like.new_zeros(self.count, 1)

    def add_call(self, call: Call, owned: Sequence[tuple[str, int]], x_B: Tensor) -> None:
        """Add what one call of a layer gives."""
        clipped = self.on_gradient is not None
        wanted = {name: i for name, i in owned if self.engine.scales[i] or clipped}
        if not wanted:
            return
        assert call.d_B is not None
        x_R, d_R = (t if self.all else t.index_select(0, self.positions) for t in (x_B, call.d_B))
        module, scale = call.module, self.engine.divisor
        # Where weights of coordinates are on the rows, these are formed.
        if "weight" in wanted and self.engine.weights_of(wanted["weight"], self.count) is None:
            for name in self._without_rows(module, wanted, x_R, d_R, scale):
                del wanted[name]
        if is_channel_norm(module):
            assert call.moments is not None
            moments = [part.repeat(self.count) for part in call.moments]
            both = dict(
                zip(("weight", "bias"), channel_rows(x_R, d_R, (moments[0], moments[1])), strict=True)
            )
            for name, i in wanted.items():
                self._products(i, 0, both[name], scale, None)
            return
        rows = module.rows if isinstance(module, AppliedLinear) else {}
        for name, i in wanted.items():
            for start, formed in self._formed(call, name, i, x_R, d_R):
                self._products(i, start, formed, scale, rows.get(name))

    def add_rows(self, entry: int, rows_R: Tensor) -> None:
        """Add rows (R, *shape) that were had otherwise."""
        if rows_R.numel():
            self._products(entry, 0, rows_R, 1.0, None)

    def products(self) -> Tensor:
        """Return the sums, clipped where the step was, (R, Q)."""
        out = self.sums[0] if len(self.sums) == 1 else torch.cat(self.sums, 1)
        if self.on_gradient is None:
            return out
        assert self.engine.pull is not None
        _tile, parts, share, factor = self.engine.pull
        weights = [self.engine.weights_of(i, self.count) for i in range(len(parts))]
        parts = [p if w is None else p * w for p, w in zip(parts, weights, strict=True)]
        along = torch.cat([tile.along(parts, self.engine.scales) for tile in self.tiles])
        return out.addmm_(self.on_gradient, along.unsqueeze(0), alpha=-share).mul_(factor)

    def _each(self, entry: int, scale: float) -> Iterator[tuple[TargetTile, Tensor, float]]:
        """Yield the tiles, their sums, and what products of an entry are multiplied with."""
        if self.on_gradient is not None:
            assert self.engine.pull is not None
            yield self.engine.pull[0], self.on_gradient, scale
        if own := self.engine.scales[entry]:
            for tile, sums in zip(self.tiles, self.sums, strict=True):
                yield tile, sums, scale * own

    def _products(self, entry: int, start: int, rows_R: Tensor, scale: float, span: slice | None) -> None:
        weights = self.engine.weights_of(entry, self.count)
        for tile, sums, factor in self._each(entry, scale):
            if weights is not None and sums is not self.on_gradient:
                rows_R = rows_R * (weights if span is None else weights[span])
                weights = None
            tile.add_rows(sums[start : start + len(rows_R)], entry, rows_R, factor, span)

    def _without_rows(
        self, module: nn.Module, wanted: Mapping[str, int], x_R: Tensor, d_R: Tensor, scale: float
    ) -> Sequence[str]:
        """Add products without forming gradients, where that is cheaper; return what was added, by name."""
        entry = wanted["weight"]
        if isinstance(module, nn.Embedding):
            return ["weight"] if self._looked_up(module, entry, x_R, d_R, scale) else []
        if not (isinstance(module, nn.Linear) or is_transposed_linear(module)):
            return []
        left, right = (d_R, x_R) if isinstance(module, nn.Linear) else (x_R, d_R)
        spans = module.rows if isinstance(module, AppliedLinear) else {}
        span = spans.get("weight")
        bias = self._bias_of(module, wanted, d_R)
        for tile, sums, factor in self._each(entry, scale):
            apart = bias
            if left.ndim == 2 and entry in tile.factors:
                d, x = tile.factors[entry]
                along = torch.mm(right, x)
                if bias is not None and entry in tile.ratios:
                    along += tile.ratios[entry]
                    apart = None
                sums.addcmul_(torch.mm(left, d), along, value=factor)
            elif self._forms(tile, left, right):
                size = max(1, ROW_BYTES // (left.shape[-1] * right.shape[-1] * left.element_size()))
                for start in range(0, self.count, size):
                    part = slice(start, start + size)
                    tile.add_rows(sums[part], entry, _outer(left[part], right[part]), factor, span)
            else:
                self._through(tile, sums, entry, span, left, right, factor)
            if apart is not None:
                tile.add_rows(sums, apart, left, factor, spans.get("bias"))
        return ["weight"] if bias is None else ["weight", "bias"]

    def _bias_of(self, module: nn.Module, wanted: Mapping[str, int], d_R: Tensor) -> int | None:
        """Return the bias of a layer whose products come with those of the weight, where tiles have its ratio.

        Tiles are asked one by one: the bits of a tile must not depend on what others there are.
        """
        if "bias" not in wanted or self.on_gradient is not None or not isinstance(module, nn.Linear):
            return None
        weight, bias = wanted["weight"], wanted["bias"]
        same = self.engine.scales[weight] == self.engine.scales[bias] and d_R.ndim == 2
        return bias if same and any(weight in tile.ratios for tile in self.tiles) else None

    @staticmethod
    def _forms(tile: TargetTile, left: Tensor, right: Tensor) -> bool:
        """Whether gradients are to be formed: by multiplications, and numbers that go to memory and back."""
        rows, columns, positions = left.shape[-1], right.shape[-1], math.prod(left.shape[1:-1])
        formed = rows * columns * (positions + MOVED + tile.count)
        return formed < positions * tile.count * (rows * columns + MOVED * min(rows, columns))

    def _through(
        self,
        tile: TargetTile,
        sums: Tensor,
        entry: int,
        span: slice | None,
        left: Tensor,
        right: Tensor,
        scale: float,
    ) -> None:
        """Add left . G right, summed over positions; the wider side meets the targets first."""
        flipped = left.shape[-1] > right.shape[-1]
        wide, narrow = (left, right) if flipped else (right, left)
        wide, narrow = (t.flatten(1, -2) if t.ndim > 2 else t.unsqueeze(1) for t in (wide, narrow))
        matrix = tile.matrix(entry, span, flipped=flipped).flatten(0, 1)
        each = wide.shape[1] * len(matrix) * wide.element_size()
        size = max(1, ROW_BYTES // max(1, each))
        for start in range(0, self.count, size):
            w, n = wide[start : start + size], narrow[start : start + size]
            met = torch.mm(w.flatten(0, 1), matrix.T).view(*w.shape[:2], tile.count, -1)
            if met.shape[1] == 1:
                found = torch.bmm(met[:, 0], n.transpose(1, 2)).squeeze(2)
            else:
                found = torch.einsum("rlqo,rlo->rq", met, n)
            sums[start : start + size].add_(found, alpha=scale)

    def _looked_up(self, module: nn.Embedding, entry: int, x_R: Tensor, d_R: Tensor, scale: float) -> bool:
        """Add products with the rows of the targets' tables that were used."""
        words, width = module.weight.shape
        index = x_R.reshape(self.count, -1)
        length = index.shape[1]
        if length * self.engine.count * MOVED > words * (self.engine.count + MOVED):
            return False
        d = d_R.reshape(self.count, length, width)
        if module.padding_idx is not None:
            d = d * (index != module.padding_idx).unsqueeze(2)
        for tile, sums, factor in self._each(entry, scale):
            table = tile.matrix(entry).transpose(0, 1)
            size = max(1, ROW_BYTES // max(1, length * width * tile.count * d.element_size()))
            for start in range(0, self.count, size):
                used = table[index[start : start + size].flatten()]  # (R * L, Q, E)
                found = torch.bmm(used, d[start : start + size].reshape(-1, width, 1))
                sums[start : start + size].add_(found.view(-1, length, tile.count).sum(1), alpha=factor)
        return True

    def _formed(
        self, call: Call, name: str, entry: int, x_R: Tensor, d_R: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, gradients (R, *shape)) of a parameter, some rows at a time."""
        module = call.module
        if name == "bias" and isinstance(module, nn.Linear):
            yield 0, d_R if d_R.ndim == 2 else d_R.flatten(1, -2).sum(1)
            return
        shape = self.engine.layout.entries[entry].shape
        size = max(1, ROW_BYTES // max(1, math.prod(shape) * d_R.element_size()))
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            x, d = x_R[part], d_R[part]
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                yield start, convolved(module, x, d) if name == "weight" else d.flatten(2).sum(2)
            elif name == "weight" and isinstance(module, nn.Linear):
                yield start, _outer(d, x)
            else:
                rule, _prepare = self.engine.capture.rules[module]
                out = d.new_empty(len(d), *shape)
                found = rule(module, name, x, d, out)
                yield start, out if found is None else found


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return the outer products of rows, summed over the axes between rows and features, (R, O, I)."""
    if left.ndim == 2:
        return left.unsqueeze(2) * right.unsqueeze(1)
    return torch.bmm(left.flatten(1, -2).transpose(1, 2), right.flatten(1, -2))


def convolved(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x_R: Tensor, d_R: Tensor) -> Tensor:
    """Return the gradients (R, *weight shape) of a convolution: output gradients times what the kernel saw."""
    groups, kernel = module.groups, module.kernel_size
    pads = module._reversed_padding_repeated_twice  # also holds what padding="same" came to
    if any(pads):
        x_R = F.pad(x_R, pads, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    inputs, outputs = module.in_channels // groups, module.out_channels // groups
    positions = math.prod(d_R.shape[2:])
    d = d_R.reshape(len(d_R), groups, outputs, positions)
    out = d.new_empty(len(d), groups, outputs, inputs * math.prod(kernel))
    # Numbers that lie side by side are copied together: those of a line of outputs, or of a line of the kernel.
    last = inputs * kernel[-1] > d_R.shape[-1]
    x = x_R.reshape(len(x_R), groups, inputs, *x_R.shape[2:])
    x = x.movedim(2, -1).contiguous() if last else x.contiguous()
    size = len(x)
    if x.device.type == "cpu":
        each = positions * out[0, :, 0].numel() * x.element_size()
        size = math.ceil(size / math.ceil(size * each / WINDOW_BYTES)) if size * each else 1
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        seen = _seen(module, x[part], d_R.shape[2:], last)
        left, into = d[part].flatten(0, 1), out[part].flatten(0, 1)
        torch.bmm(left, seen if last else seen.transpose(1, 2), out=into)
    if last:
        out = out.unflatten(3, (*kernel, inputs)).movedim(-1, 3)
    return out.reshape(len(out), *module.weight.shape)


def _seen(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, out_size: torch.Size, last: bool) -> Tensor:
    """Return what each kernel position saw of padded inputs.

    Args:
        module: The convolution, R * groups the length of what is returned.
        x: (R, groups, C, *space), or with ``last`` (R, groups, *space, C); contiguous.
        out_size: Of the output.
        last: Whether to return (R * groups, X, kernel * C) in the place of (R * groups, C * kernel, X).
    """
    space, strides = len(out_size), x.stride()
    along = strides[2 : 2 + space] if last else strides[3:]
    channel, channels = (strides[-1], x.shape[-1]) if last else (strides[2], x.shape[2])
    steps = [along[k] * module.stride[k] for k in range(space)]
    within = [along[k] * module.dilation[k] for k in range(space)]
    kernel = module.kernel_size
    if last:
        shape, stride = (*out_size, *kernel, channels), (*steps, *within, channel)
        length = math.prod(out_size)
    else:
        shape, stride = (channels, *kernel, *out_size), (channel, *within, *steps)
        length = channels * math.prod(kernel)
    windows = x.as_strided((*x.shape[:2], *shape), (*strides[:2], *stride), x.storage_offset())
    return windows.reshape(x.shape[0] * x.shape[1], length, -1)
