"""What a segment of the training adds to hypergradients, as few numbers as its sums are, and these added up.

A row of such sums is what the buffers of ``fast`` or ``ekfac`` hold of a sample when the segment ends: dense sums,
and for the weights of Linear layers the factors of its visits, not yet multiplied. So a segment writes O + I
numbers where its visit would fill O x I. Only samples that the segment visited have a row.

Segments are added up in their order, and what is multiplied is multiplied in tiles of one shape: the bits of
a row depend on the segments and on nothing else. Where rows are kept in part (see ``model.row_map``) that is done before a
segment ends, so that its sums are as short as the rows. Letters: n rows of a unit, R of a tile, V visits kept as factors
(one an epoch that the segment touches), E epochs, W numbers of a row of sums, D parameters, K numbers of a kept row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..model.layout import Layout
from ..model.row_map import Folds, RowMap
from .buffers import HypergradientBuffers
from .ekfac import EkfacRows, TurnedGradients
from .fast import FastRows

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.int64]

TILE = 64
"""Rows that are multiplied at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What the W numbers of a row of sums are.

    Attributes:
        dense: Entries that are summed up, each with its first of the W columns and their count.
        factors: Entries kept as V outer products: (entry, first column, V); left (V, O), then right (V, I).
        epoch: The epoch of the first of the V visits.
        width: W.
        mapped: Whether they are those of the row as it is kept: W = K, and neither entries nor factors are known of them.
    """

    dense: tuple[tuple[int, int, int], ...]
    factors: tuple[tuple[int, int, int], ...]
    epoch: int
    width: int
    mapped: bool = False

    def told(self) -> dict[str, Any]:
        """Return it, JSON-able, as the attributes of a store keep it."""
        return {
            "dense": [list(one) for one in self.dense],
            "factors": [list(one) for one in self.factors],
            "epoch": self.epoch,
            "width": self.width,
            "mapped": self.mapped,
        }

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Form:
        """Return what `told` wrote."""

        def triples(name: str) -> tuple[tuple[int, int, int], ...]:
            return tuple((int(a), int(b), int(c)) for a, b, c in told[name])

        return cls(
            dense=triples("dense"),
            factors=triples("factors"),
            epoch=int(told["epoch"]),
            width=int(told["width"]),
            mapped=bool(told.get("mapped", False)),
        )


class Sums:
    """The rows of sums of a sink at the end of its segment.

    Args:
        sink: What the segment was replayed into.
        epoch: The epoch that the segment begins in.
    """

    def __init__(self, sink: FastRows | EkfacRows, epoch: int) -> None:
        self._buffers: HypergradientBuffers | None = None
        if sink.mapped is not None:
            self._sums = sink.mapped.sums
            self.form = _form_of_one(self._sums.shape[1], epoch, mapped=True)
        elif isinstance(sink, FastRows):
            self._buffers = sink.buffers
            self.form = _form_of(sink.buffers, epoch)
        else:
            self._sums = sink.sums
            self.form = _form_of_one(sink.training.layout.dimension, epoch)

    def numpy(self, start: int, stop: int) -> Floats:
        """Return rows as a (stop - start, W) array on the host."""
        if self._buffers is None:
            array: Floats = self._sums[start:stop].cpu().numpy()
            return array
        buffers = self._buffers
        out = torch.empty(stop - start, self.form.width, dtype=buffers.dense.dtype)
        width = buffers.dense.shape[1]
        out[:, :width] = buffers.dense[start:stop].cpu()
        for entry, column, slots in self.form.factors:
            held = buffers.factors[entry]
            for part, size in zip((held.left, held.right), held.shape, strict=True):
                here = out[:, column : column + slots * size]
                here.copy_(part[start:stop, :, :size].reshape(stop - start, -1))
                column += slots * size
        for entry, column, size in self.form.dense:
            if entry not in buffers.factors:
                continue
            held, here = buffers.factors[entry], out[:, column : column + size]
            if held.folds:
                whole = out.new_empty(stop - start, *held.shape)
                held.form(start, stop, whole)
                here.copy_(whole.view(stop - start, -1))
            else:
                assert held.sum is not None
                here.copy_(held.sum[start:stop].reshape(stop - start, -1))
        found: Floats = out.numpy()
        return found


def _form_of_one(width: int, epoch: int, *, mapped: bool = False) -> Form:
    return Form(dense=((-1, 0, width),), factors=(), epoch=epoch, width=width, mapped=mapped)


def _form_of(buffers: HypergradientBuffers, epoch: int) -> Form:
    layout = buffers.layout
    dense = [(i, column, layout.size(i)) for i, column in enumerate(buffers.columns) if column is not None]
    factors, width = [], buffers.dense.shape[1]
    for entry, held in buffers.factors.items():
        if not held.folds:
            factors.append((entry, width, held.slots))
            width += held.slots * sum(held.shape)
        if held.sum is not None:  # folded, or of a layer that was called otherwise
            dense.append((entry, width, layout.size(entry)))
            width += layout.size(entry)
    return Form(dense=tuple(dense), factors=tuple(factors), epoch=epoch, width=width)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """What one segment adds to some rows.

    Attributes:
        rows: Which of the n, ascending; those that it visited.
        sums: (r, W).
        form: Of the sums.
    """

    rows: Integers
    sums: Floats
    form: Form

    def between(self, start: int, stop: int) -> Part:
        """Return what it adds to the rows ``start`` to ``stop``, counted from ``start``."""
        low, high = np.searchsorted(self.rows, (start, stop)).tolist()
        return Part(rows=self.rows[low:high] - start, sums=self.sums[low:high], form=self.form)


class Adder(Protocol):
    """Adds up what all segments of the training add to some rows."""

    def rows(self, count: int, parts: Sequence[Part]) -> Floats:
        """Return the hypergradients (count, K) of n = count rows; parts are in the order of the segments."""


class MappedAdder:
    """Of rows that segments wrote as they are kept; see ``Adder``.

    Args:
        columns: K.
        dtype: Of the hypergradients.
    """

    def __init__(self, columns: int, dtype: torch.dtype) -> None:
        self._columns, self._dtype = columns, dtype

    def rows(self, count: int, parts: Sequence[Part]) -> Floats:
        """See ``Adder``."""
        out = torch.zeros(count, self._columns, dtype=self._dtype)
        for part in parts:
            out.index_add_(0, torch.from_numpy(part.rows), torch.from_numpy(part.sums))
        found: Floats = out.numpy()
        return found


class FastAdder:
    """Of the form without the Hessian; see ``Adder``.

    Args:
        layout: Where each parameter lies.
        epochs: E.
        dtype: Of the hypergradients.
        row_map: What is kept of a row, which is not folded; None: all.
    """

    def __init__(
        self, layout: Layout, epochs: int, dtype: torch.dtype, row_map: RowMap | None = None
    ) -> None:
        self._layout, self._epochs, self._dtype = layout, epochs, dtype
        self._picks = None if row_map is None else Folds(row_map, dtype, torch.device("cpu"))

    def rows(self, count: int, parts: Sequence[Part]) -> Floats:
        """See ``Adder``."""
        if self._picks is None:
            found: Floats = self._whole(count, parts).numpy()
            return found
        tiles = []
        for start in range(0, count, TILE):  # no more than so many whole rows at a time
            stop = min(count, start + TILE)
            tiles.append(
                self._picks.apply_(self._whole(stop - start, [p.between(start, stop) for p in parts]))
            )
        picked: Floats = torch.cat(tiles).numpy()
        return picked

    def _whole(self, count: int, parts: Sequence[Part]) -> Tensor:
        """Return the rows in all parameters, (count, D)."""
        out = torch.zeros(count, self._layout.dimension, dtype=self._dtype)
        factored = sorted({entry for part in parts for entry, _, _ in part.form.factors})
        for entry in factored:
            self._multiply(entry, out, parts)
        for part in parts:
            where = torch.from_numpy(part.rows)
            sums = torch.from_numpy(part.sums)
            for start, column, size in _runs(part.form.dense, self._layout):
                out[:, start : start + size].index_add_(0, where, sums[:, column : column + size])
        return out

    def _multiply(self, entry: int, out: Tensor, parts: Sequence[Part]) -> None:
        """Write the products of all visits, (R, E, O) and (R, E, I), to the entry's columns."""
        shape = self._layout.entries[entry].shape
        begin, size = self._layout.entries[entry].start, self._layout.size(entry)
        sides = [torch.zeros(TILE, self._epochs, width, dtype=self._dtype) for width in shape]
        for start in range(0, len(out), TILE):
            stop = min(len(out), start + TILE)
            for side in sides:
                side.zero_()
            for part in parts:
                known = [(column, slots) for one, column, slots in part.form.factors if one == entry]
                low, high = np.searchsorted(part.rows, (start, stop)).tolist()
                if not known or low == high:
                    continue
                (column, slots), where = known[0], torch.from_numpy(part.rows[low:high] - start)
                when = slice(part.form.epoch, part.form.epoch + slots)
                for side, width in zip(sides, shape, strict=True):
                    values = torch.from_numpy(part.sums[low:high, column : column + slots * width])
                    # Two segments of one epoch visit other samples: what is there already is zero.
                    side[where, when] += values.reshape(-1, slots, width)
                    column += slots * width
            products = torch.bmm(sides[0].transpose(1, 2), sides[1]).view(TILE, size)
            out[start:stop, begin : begin + size] = products[: stop - start]


class EkfacAdder:
    """With EKFAC curvature: sums are in the eigenbasis and turned back once; see ``Adder``.

    Args:
        turned: What turns rows back.
        dtype: Of the hypergradients.
        device: Where they are turned.
    """

    def __init__(self, turned: TurnedGradients, dtype: torch.dtype, device: torch.device) -> None:
        self._turned, self._dtype, self._device = turned, dtype, device

    def rows(self, count: int, parts: Sequence[Part]) -> Floats:
        """See ``Adder``."""
        tile, width = self._turned.basis.tile, self._turned.basis.layout.dimension
        padded = -(-count // tile) * tile
        total = torch.zeros(padded, width, dtype=self._dtype, device=self._device)
        for part in parts:
            where = torch.from_numpy(part.rows).to(self._device)
            total.index_add_(0, where, torch.from_numpy(part.sums).to(self._device))
        pieces = [self._turned.to_parameters(total[start : start + tile]) for start in range(0, padded, tile)]
        found: Floats = torch.cat(pieces)[:count].cpu().numpy()
        return found


def _runs(dense: Sequence[tuple[int, int, int]], layout: Layout) -> list[tuple[int, int, int]]:
    """Return (first parameter, first column, count) of entries, those that follow each other in both joined."""
    found: list[tuple[int, int, int]] = []
    for entry, column, size in dense:
        start = layout.entries[entry].start
        if found and sum(found[-1][::2]) == start and found[-1][1] + found[-1][2] == column:
            found[-1] = (*found[-1][:2], found[-1][2] + size)
        else:
            found.append((start, column, size))
    return found


class Streamed:
    """Reads the rows of a store of sums in order, each chunk once.

    Args:
        index: The rows' places among all tracked ones, ascending.
        read: Gives rows ``start`` to ``stop`` of the store.
        chunk_rows: Rows that a chunk of it holds.
        form: Of the sums.

    Attributes:
        form: Of the sums.
    """

    def __init__(
        self, index: Integers, read: Callable[[int, int], Floats], chunk_rows: int, form: Form
    ) -> None:
        self._index, self._read, self._chunk, self.form = index, read, chunk_rows, form
        self._held, self._first = read(0, 0), 0

    def take(self, start: int, stop: int) -> Part:
        """Return what it adds to the tracked rows ``start`` to ``stop``, which follow those that were taken before."""
        low, high = np.searchsorted(self._index, (start, stop)).tolist()
        end = self._first + len(self._held)
        if high > end or low < self._first:
            kept = self._held[low - self._first :] if self._first <= low < end else self._held[:0]
            begin = max(low, end) if len(kept) else low
            last = min(len(self._index), -(-high // self._chunk) * self._chunk)
            fresh = self._read(begin, last)
            self._held = np.concatenate([kept, fresh]) if len(kept) else fresh
            self._first = low
        place = slice(low - self._first, high - self._first)
        return Part(rows=self._index[low:high] - start, sums=self._held[place], form=self.form)
