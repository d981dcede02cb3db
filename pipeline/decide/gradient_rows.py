"""Where the rows come from among which `outlier-gradient` looks for outliers: three sources with one face.

Letters: n judged samples, R rows worked on at a time, D numbers of a row, F features, C classes.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ...storage.errors import InputError
from ...storage.rows import RowStore
from ..reading.kept_rows import row_map_of
from .case import Case
from .passes import Outputs, Passes, aligned

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Single = npt.NDArray[np.float32]

BLOCK_BYTES = 64 << 20
"""Of rows read or made at a time, about."""

IN_MEMORY = 1 << 30
"""Bytes from which on the rows of a forest lie in a temporary file."""


class GradientRows(ABC):
    """n rows of D numbers, and what outliers among them are looked for by."""

    way: ClassVar[str]
    """How they were had, in words."""

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """D."""

    @abstractmethod
    def norms(self) -> tuple[Floats, Floats]:
        """Return sums of absolute values and roots of sums of squares, (n,) each."""

    @abstractmethod
    def matrix(self, seed: int, *, unit: bool) -> Single:
        """Return the rows, (n, width), projected where D is above ``MOST_DIMENSIONS``.

        Args:
            seed: Of the projection.
            unit: Whether rows are scaled to norm 1 first.
        """


class Streamed(GradientRows):
    """Rows that come in blocks and of which none is kept."""

    @property
    @abstractmethod
    def count(self) -> int:
        """n."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[int, npt.NDArray[np.floating]]]:
        """Yield (first row, block (R, D))."""

    def norms(self) -> tuple[Floats, Floats]:
        """See `GradientRows`."""
        absolute, length = np.empty(self.count), np.empty(self.count)
        for start, block in self.blocks():
            at, wide = slice(start, start + len(block)), block.astype(np.float64, copy=False)
            absolute[at], length[at] = np.abs(wide).sum(1), np.sqrt(np.square(wide).sum(1))
        return absolute, length

    def matrix(self, seed: int, *, unit: bool) -> Single:
        """See `GradientRows`."""
        from ...workers.training.own_gradients import Projection

        project = Projection(self.dimensions, self.count, seed)
        out = room(self.count, project.width)
        for start, block in self.blocks():
            if unit:
                block = block / _lengths(np.sqrt(np.square(block, dtype=np.float64).sum(1)))[:, None]
            out[start : start + len(block)] = project(block)
        return out


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LastLayer(Streamed):
    """Gradients by the last layer's weight, in closed form.

    With cross entropy of the outputs, p their softmax and y the label as a unit vector, the gradient is the outer
    product of p - y (C,) and the features h (F,): its norms are ``|p - y|_1 |h|_1 = 2 (1 - p_label) |h|_1`` and
    ``|p - y|_2 |h|_2``.

    Attributes:
        residual: p - y, (n, C).
        feature: h, (n, F).
    """

    residual: Floats
    feature: Floats

    way: ClassVar[str] = "closed form"

    @property
    def count(self) -> int:
        """n."""
        return len(self.residual)

    @property
    def dimensions(self) -> int:
        """F C."""
        return int(self.residual.shape[1] * self.feature.shape[1])

    def norms(self) -> tuple[Floats, Floats]:
        """See `GradientRows`; the outer products are not formed."""
        absolute = np.abs(self.residual).sum(1) * np.abs(self.feature).sum(1)
        return absolute, np.linalg.norm(self.residual, axis=1) * np.linalg.norm(self.feature, axis=1)

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[np.floating]]]:
        """See `Streamed`."""
        for start, stop in _spans(self.count, self.dimensions * 8):
            outer = self.residual[start:stop, :, None] * self.feature[start:stop, None, :]
            yield start, outer.reshape(stop - start, -1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hypergradients(Streamed):
    """Stored hypergradients, by some parameter tensors; no recipe is needed.

    Attributes:
        store: The rows, (n tracked, all parameters).
        rows: Which of them are judged, (n,).
        spans: (first column, columns) of each tensor.
    """

    store: RowStore
    rows: Integers
    spans: tuple[tuple[int, int], ...]

    way: ClassVar[str] = "hypergradients"

    @property
    def count(self) -> int:
        """n."""
        return len(self.rows)

    @property
    def dimensions(self) -> int:
        """D of the tensors."""
        return sum(size for _, size in self.spans)

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[np.floating]]]:
        """See `Streamed`; reads whole chunks, each once."""
        done, store = 0, self.store
        most = max(
            store.chunk_rows, BLOCK_BYTES // (8 * store.columns) // store.chunk_rows * store.chunk_rows
        )
        for start in range(0, store.rows, most):
            mine = self.rows[(self.rows >= start) & (self.rows < start + most)] - start
            if len(mine):
                read = store.read(start, min(store.rows, start + most))[mine]
                yield done, np.concatenate([read[:, a : a + size] for a, size in self.spans], axis=1)
                done += len(mine)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PerSample(GradientRows):
    """Gradients by some parameter tensors from a pass of per-sample gradients.

    Attributes:
        case: The case.
        tensors: Which tensors, by place.
        size: D of them.
    """

    case: Case
    tensors: tuple[int, ...]
    size: int

    way: ClassVar[str] = "per-sample gradients"

    @property
    def dimensions(self) -> int:
        """D of the tensors."""
        return self.size

    def norms(self) -> tuple[Floats, Floats]:
        """See `GradientRows`."""
        found, chosen = self.case.passes.norms(), list(self.tensors)
        at = aligned(self.case.tracked, found.train_index, self.case.run.uri)
        return found.absolute[at][:, chosen].sum(1), np.sqrt(found.square[at][:, chosen].sum(1))

    def matrix(self, seed: int, *, unit: bool) -> Single:
        """See `GradientRows`; a projection is linear, so rows may be scaled after it."""
        store, norm = self.case.passes.gradient_rows(self.tensors, seed)
        index = store.column("train_index").astype(np.int64)
        at = aligned(self.case.tracked, index, self.case.run.uri)
        out = room(len(at), store.columns)
        for start, stop in _spans(len(at), store.columns * 4):
            mine = at[start:stop]
            block = store.read(int(mine[0]), int(mine[-1]) + 1)[mine - mine[0]]
            out[start:stop] = block / _lengths(norm[mine])[:, None] if unit else block
        return out


def rows_of(case: Case) -> GradientRows:
    """Return the rows that the options of a case speak of.

    Raises:
        InputError: There is no such layer, or the model has no last one.
        IncompleteStage: There are no hypergradients.
    """
    asked = case.options
    if asked.rows == "hypergradients":
        return _hypergradients(case, asked.layer)
    if asked.layer != "last":
        return _per_sample(case, asked.layer)
    found = case.passes.outputs()
    residual = cross_entropy_residual(found) if found.layer.plain else None
    if residual is None:  # the loss is another, or the layer is used twice: autograd knows
        return _per_sample(case, found.layer.weight)
    at = aligned(case.tracked, found.train_index, case.run.uri)
    return LastLayer(residual=residual[at], feature=found.feature[at].astype(np.float64))


def cross_entropy_residual(found: Outputs) -> Floats | None:
    """Return softmax(output) - y, (n, C), where the losses are the cross entropy of the outputs; else None.

    A stored loss may be off by the rounding of the run's dtype alone.
    """
    n, classes = found.output.shape
    if classes < 2 or (found.label < 0).any() or (found.label >= classes).any():
        return None
    wide = found.output.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    log_total = np.log(np.exp(wide).sum(1))
    rows = np.arange(n)
    expected = log_total - wide[rows, found.label]
    size = 1 + np.abs(found.loss) + np.abs(found.output).max(1)
    if (np.abs(expected - found.loss) > 64 * np.finfo(found.output.dtype).eps * size).any():
        return None
    residual: Floats = np.exp(wide - log_total[:, None])
    # Not p - 1, which loses the digits of a sure sample's 1 - p.
    residual[rows, found.label] = 0.0
    residual[rows, found.label] = -residual.sum(1)
    return residual


def _per_sample(case: Case, layer: str) -> PerSample:
    tensors, spans = _tensors(case.passes, layer)
    return PerSample(case=case, tensors=tensors, size=sum(size for _, size in spans))


def _hypergradients(case: Case, layer: str) -> Hypergradients:
    method = case.passes.with_hypergradients(case.method)
    if layer == "last":
        shapes = [(entry.name, entry.shape) for entry in case.run.trajectory().parameters]
        weights = [name for name, shape in shapes if len(shape) == 2]
        if not weights:
            raise InputError(
                "layer 'last': no parameter of the model is a matrix; name a layer, or use layer=all"
            )
        layer = weights[-1]
    tensors, spans = _tensors(case.passes, layer)
    store, kept = case.run.hypergradient_store(method), row_map_of(case.run)
    if kept is not None:
        by_entry = {part.entry: part for part in kept.parts}
        parts = [by_entry.get(k) for k in tensors]
        if any(part is None or part.folded for part in parts):
            raise InputError(
                f"layer {layer!r}: {case.run.uri} keeps a part of its gradients, or a projection of it; use rows=gradients, or a run "
                "without --layers and --project"
            )
        spans = tuple((part.start, part.kept) for part in parts if part is not None)
    index = store.column("train_index").astype(np.int64)
    return Hypergradients(store=store, rows=aligned(case.tracked, index, case.run.uri), spans=spans)


def _tensors(passes: Passes, layer: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Return the tensors of a layer, by place, and (first column, columns) of each."""
    from ...workers.training.own_gradients import chosen_tensors

    entries = passes.run.trajectory().parameters
    chosen = chosen_tensors([entry.name for entry in entries], layer)
    sizes = [int(np.prod(entry.shape)) for entry in entries]
    return tuple(chosen), tuple((entries[k].start, sizes[k]) for k in chosen)


def _spans(count: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, count, step):
        yield start, min(count, start + step)


def _lengths(norm: Floats) -> Floats:
    """Return what rows are divided by; a row of zeros stays one."""
    return np.where(norm > 0, norm, 1.0)


def room(rows: int, columns: int) -> Single:
    """Return an array for rows: in memory, or above `IN_MEMORY` in a temporary file without a name."""
    if rows * columns * 4 <= IN_MEMORY:
        return np.empty((rows, columns), dtype=np.float32)
    return np.memmap(tempfile.TemporaryFile(), dtype=np.float32, mode="w+", shape=(rows, columns))
