"""Linear maps inside layers that are no Linear: attention's projections, the gates of recurrent nets.

A stand-in of class ``nn.Linear`` holds the parameters (or some rows of them), so that all that is known of Linear
layers holds here: the rule of per-sample gradients, the Kronecker form of the curvature. It is never called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .rules import AppliedLinear

Noted = Callable[[AppliedLinear, Tensor, Tensor, Callable[[Tensor], Tensor]], None]
"""Takes (stand-in, input batch-first, output as it is, what brings such a tensor into (B, L, O))."""


class Projections:
    """The linear maps of one ``nn.MultiheadAttention``, which it applies by ``F.linear``.

    Attributes:
        parts: Stand-ins: of the whole of each weight, and of the rows that queries, keys and values use.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module
        self.parts: dict[tuple[int, int, int], AppliedLinear] = {}
        width, own = module.embed_dim, module._parameters
        bias, whole, out = own.get("in_proj_bias"), own.get("in_proj_weight"), module.out_proj._parameters
        thirds = [own.get(name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        if whole is not None:
            for start, stop in ((0, 3), (0, 1), (1, 2), (2, 3), (1, 3)):
                rows = None if stop - start == 3 else slice(start * width, stop * width)
                self._add(whole, bias, rows, rows)
        for k, weight in enumerate(thirds):
            if weight is not None:
                self._add(weight, bias, None, slice(k * width, (k + 1) * width))
        if out.get("weight") is not None:
            self._add(out["weight"], out.get("bias"), None, None)

    def _add(
        self, weight: Any, bias: nn.Parameter | None, rows: slice | None, bias_rows: slice | None
    ) -> None:
        start, stop = (rows.start, rows.stop) if rows else (0, len(weight))
        part = AppliedLinear(weight, bias, {"weight": rows, "bias": bias_rows})
        self.parts[(id(weight), start, stop)] = part

    def part_of(self, weight: Tensor) -> AppliedLinear | None:
        """Return the stand-in of a weight or of a view of some of its rows."""
        whole = weight if weight._base is None else weight._base
        start = 0
        if weight is not whole:
            if weight.ndim != 2 or weight.stride() != whole.stride():
                return None
            start = (weight.storage_offset() - whole.storage_offset()) // max(1, weight.stride(0))
        return self.parts.get((id(whole), start, start + len(weight)))

    def batch_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """Return B of a call, or None where it has no batch."""
        query = args[0] if args else kwargs.get("query")
        if not isinstance(query, Tensor) or query.ndim != 3:
            return None
        return query.shape[0 if self.module.batch_first else 1]


@contextlib.contextmanager
def linear_noted(projections: Projections, batch: int, note: Noted) -> Iterator[None]:
    """Note what one attention layer hands to ``F.linear`` while it runs, always as (L, B, .) or (L * B, .)."""
    plain = F.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = plain(input, weight, bias)
        part = projections.part_of(weight)
        if part is not None and out.requires_grad:

            def batch_first(value: Tensor) -> Tensor:
                if value.ndim == 2:
                    value = value.view(-1, batch, value.shape[1])
                return value.transpose(0, 1)

            note(part, batch_first(input.detach()), out, batch_first)
        return out

    F.linear = linear
    try:
        yield
    finally:
        F.linear = plain
