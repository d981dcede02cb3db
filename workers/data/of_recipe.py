"""What this sub-room asks of a recipe: how items become a batch, and what their classes are.

``Recipe`` stands above: it may use what is here, and nothing here knows it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch.utils.data import Dataset

Batch = Any
"""What ``collate`` returns: usually a tuple ``(inputs, targets)`` of tensors with leading axis B."""

_DEFAULT = "_hydra_default"

Method = TypeVar("Method", bound=Callable[..., Any])


class DataRecipe(Protocol):
    """The part of a recipe that makes batches; see ``Recipe``."""

    num_workers: int

    def collate(self, items: Sequence[Any]) -> Batch:
        """Join dataset items to a batch."""
        ...

    def labels(self, dataset: Dataset[Any]) -> Sequence[int] | None:
        """Return the class of every sample."""
        ...


def default_method(method: Method) -> Method:
    """Mark a method of the base class, for `is_default`."""
    setattr(method, _DEFAULT, True)
    return method


def is_default(recipe: DataRecipe, name: str) -> bool:
    """Whether a recipe has neither overridden nor replaced a method."""
    return getattr(getattr(getattr(recipe, name), "__func__", None), _DEFAULT, False)
