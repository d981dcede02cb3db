"""Random numbers of a model, drawn in the run's dtype while everything else is computed in another.

The bits of a draw depend on its dtype, so that a model with noise of its own (``randn_like``, dropout
on some devices) would be another one in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Operation = Callable[..., Any]


class SameNoise(TorchDispatchMode):
    """While this is entered, operations that draw do so in ``drawn`` and give ``computed``."""

    def __init__(self, drawn: torch.dtype, computed: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn, self.computed = drawn, computed

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or self.drawn == self.computed:
            return func(*args, **given)
        narrow = self._cast(self.computed, self.drawn)
        found = func(*tree_map(narrow, tuple(args)), **tree_map(narrow, given))
        if func is torch.ops.aten.native_dropout.default:  # only its mask is drawn
            x, share, kept = args[0], args[1], found[1]
            return x * kept / (1 - share) if share < 1 else x * 0, kept
        if func._schema.is_mutable:
            return args[0].copy_(found)
        return tree_map(self._cast(self.drawn, self.computed), found)

    @staticmethod
    def _cast(source: torch.dtype, target: torch.dtype) -> Operation:
        into = {source: target, source.to_complex(): target.to_complex()}

        def cast(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.to(into[leaf.dtype]) if leaf.dtype in into else leaf
            return into.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

        return cast
