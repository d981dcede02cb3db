"""Gradients of a few targets, by parameter, in the forms that products with per-sample gradients take them.

The gradient of a test sample by a Linear weight is an outer product d x^T like that of a training sample, and the
inner product of two of those is (d . d')(x . x'): O + I multiplications instead of O x I. So targets whose weights are
outer products to rounding are kept as factors.

Letters: Q targets of a tile, R rows, O and I outputs and inputs of a layer, P parameter tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..model.layout import Layout

ROUNDING = 8
"""Factors are believed where their product is the gradient within so many units of rounding, number by number: forming
it rounds once, taking it apart three times, forming it again once."""


def outer_factors(matrix_QOI: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return factors (O, Q) and (I, Q) of matrices that are outer products to rounding; None: one is none."""
    count, _rows, columns = matrix_QOI.shape
    pivot = matrix_QOI.flatten(1).abs().argmax(1)
    each = torch.arange(count, device=pivot.device)
    left = matrix_QOI[each, :, pivot % columns]
    right = matrix_QOI[each, pivot // columns]
    largest = matrix_QOI.flatten(1).gather(1, pivot.unsqueeze(1))
    right = torch.where(largest == 0, 0, right / largest)
    kind = torch.finfo(matrix_QOI.dtype)
    for matrix, d, x in zip(
        matrix_QOI, left, right, strict=True
    ):  # one at a time: no second stack of matrices
        off = torch.outer(d, x).sub_(matrix).abs_()
        if not bool((off <= ROUNDING * kind.eps * matrix.abs() + ROUNDING * kind.tiny).all()):
            return None
    return left.T.contiguous(), right.T.contiguous()


def multiples(vector_QO: Tensor, left_OQ: Tensor) -> Tensor | None:
    """Return what the columns of ``left`` are multiplied with to give the vectors, to rounding, (Q,); None: nothing."""
    at = left_OQ.abs().argmax(0, keepdim=True)
    pivot = left_OQ.gather(0, at)
    ratio = torch.where(pivot == 0, 0, vector_QO.T.gather(0, at) / pivot)
    kind = torch.finfo(left_OQ.dtype)
    off = (left_OQ * ratio - vector_QO.T).abs()
    good = bool((off <= ROUNDING * kind.eps * vector_QO.T.abs() + ROUNDING * kind.tiny).all())
    return ratio[0].contiguous() if good else None


class TargetTile:
    """Targets that are multiplied together.

    Args:
        targets_QD: Their gradients; cut up, not kept.
        layout: The parameters.
        outer: Entries that are kept as factors where they can be, each with the bias beside it, or None.

    Attributes:
        count: Q.
        factors: By entry, (O, Q) and (I, Q).
        ratios: By entry with factors, what its bias is of the first factor, (Q,).
    """

    def __init__(
        self, targets_QD: Tensor, layout: Layout, outer: Mapping[int, int | None] | None = None
    ) -> None:
        self.count = len(targets_QD)
        self.parts: list[Tensor | None] = []
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}
        self.ratios: dict[int, Tensor] = {}
        self._turned: dict[tuple[int, tuple[int, int] | None, bool], Tensor] = {}
        for i, entry in enumerate(layout.entries):
            part = targets_QD[:, entry.start : entry.start + layout.size(i)].view(-1, *entry.shape)
            found = outer_factors(part) if outer and i in outer and part.numel() else None
            if found is None:
                self.parts.append(part.contiguous())
            else:
                self.factors[i] = found
                self.parts.append(None)
        for i, bias in (outer or {}).items():
            beside = None if bias is None else self.parts[bias]
            if beside is not None and i in self.factors:
                ratio = multiples(beside, self.factors[i][0])
                if ratio is not None:
                    self.ratios[i] = ratio

    def matrix(self, entry: int, rows: slice | None = None, *, flipped: bool = False) -> Tensor:
        """Return the part of an entry (Q, *shape), contiguous; of some rows; ``flipped``: its last two axes swapped."""
        whole = self.parts[entry]
        if whole is None:
            d, x = self.factors[entry]
            return torch.einsum("oq,iq->qoi", d, x)
        if rows is None and not flipped:
            return whole
        key = entry, rows and (rows.start, rows.stop), flipped
        if key not in self._turned:
            part = whole if rows is None else whole[:, rows]
            self._turned[key] = (part.transpose(1, 2) if flipped else part).contiguous()
        return self._turned[key]

    def add_rows(
        self, sums_RQ: Tensor, entry: int, rows_R: Tensor, scale: float, span: slice | None = None
    ) -> None:
        """Add the products with rows (R, *shape) of an entry, or of a span of its first axis."""
        if self.parts[entry] is None:
            d, x = self.factors[entry]
            along = torch.matmul(rows_R, x)
            sums_RQ.add_((along * d).sum(1), alpha=scale)
            return
        right = self.matrix(entry, span).flatten(1)
        sums_RQ.addmm_(rows_R.flatten(1), right.T, alpha=scale)

    def along(self, parts_P: Sequence[Tensor], scales_P: Sequence[float]) -> Tensor:
        """Return the sums over entries of a scale times the product with one vector, (Q,)."""
        like = parts_P[0]
        total = like.new_zeros(1, self.count)
        for i, (part, scale) in enumerate(zip(parts_P, scales_P, strict=True)):
            if scale and part.numel():
                self.add_rows(total, i, part.unsqueeze(0), scale)
        return total[0]

    def weighed(self, weights_P: Sequence[Tensor], into: TargetTile | None) -> TargetTile:
        """Return the targets times a weight for each coordinate; ``into``: a tile from here to be written over."""
        if into is None:
            into = object.__new__(TargetTile)
            into.count, into.factors, into.ratios = self.count, {}, {}
            into.parts = [torch.empty_like(self.matrix(i)) for i in range(len(self.parts))]
        into._turned = {}
        for i, (part, weight) in enumerate(zip(into.parts, weights_P, strict=True)):
            torch.mul(self.matrix(i), weight, out=part)
        return into


def split(vector_D: Tensor, layout: Layout) -> list[Tensor]:
    """Return the parts of a flat vector, each of its parameter's shape."""
    return [
        vector_D[entry.start : entry.start + layout.size(i)].view(entry.shape)
        for i, entry in enumerate(layout.entries)
    ]
