"""What a model returns: tensors, alone or in tuples, lists, dicts, dataclasses and mappings, at any depth."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of what a model returned with a function of each tensor in its place."""

    def leaf(held: Any) -> Any:
        if isinstance(held, Tensor):
            return function(held)
        if dataclasses.is_dataclass(held) and not isinstance(held, type):
            changed = copy.copy(held)
            for entry in dataclasses.fields(held):
                object.__setattr__(changed, entry.name, mapped(getattr(held, entry.name), function))
            return changed
        if isinstance(held, MutableMapping):
            items = copy.copy(held)
            for key in held:
                items[key] = mapped(held[key], function)
            return items
        return held

    return tree_map(leaf, value)
