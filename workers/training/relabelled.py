"""A recipe that trains on other labels: its own training set, in which some items have another label.

Labels are replaced in the items, so whatever a recipe makes of them it makes of the new ones. Known are a pair
``(input, label)``, longer tuples whose second part is the label, mappings with ``labels``, ``label``, ``targets`` or
``target``, and the second tensor of a ``TensorDataset``. The label in an item must be the one that is replaced: a
recipe that makes its classes of something else is refused, not half changed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ...storage.errors import RecipeError
from ..data.batches import holds_tensors
from ..data.labels import KEYS
from ..determinism import preserved_generators, seed_everything
from ..recipe import Recipe

Integers = npt.NDArray[np.int64]

LOOKED_AT = 16
"""Items whose label is compared with the given one before anything is trained."""


class Relabelled(Dataset[Any]):
    """A map-style dataset in which some items have another label.

    Args:
        source: The dataset.
        labels: New label by position.
    """

    def __init__(self, source: Dataset[Any], labels: Mapping[int, int]) -> None:
        self.source, self.labels = source, labels

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self._changed(int(index), self.source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the items at ``indices``, had as the source gives them."""
        many = getattr(self.source, "__getitems__", None)
        items = many(indices) if many else [self.source[int(i)] for i in indices]
        return [self._changed(int(i), item) for i, item in zip(indices, items, strict=True)]

    def _changed(self, index: int, item: Any) -> Any:
        return with_label(item, self.labels[index]) if index in self.labels else item


def label_in(item: Any) -> Any:
    """Return the label that `with_label` would replace, None where there is none."""
    if isinstance(item, Mapping):
        return next((item[key] for key in KEYS if _is_label(item.get(key))), None)
    if isinstance(item, (tuple, list)) and len(item) > 1 and _is_label(item[1]):
        return item[1]
    return None


def with_label(item: Any, label: int) -> Any:
    """Return an item like ``item`` with another label, of the old one's type."""
    old = label_in(item)
    assert old is not None, "check_replaceable looked at the first items"
    new = torch.full_like(old, label) if isinstance(old, Tensor) else type(old)(label)
    if isinstance(item, Mapping):
        key = next(key for key in KEYS if _is_label(item.get(key)))
        changed: Any = copy.copy(item)
        changed[key] = new
        return changed
    parts = [item[0], new, *item[2:]]
    if hasattr(item, "_fields"):  # a named tuple
        return type(item)(*parts)
    return type(item)(parts)


def _is_label(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.ndim == 0 and not part.is_floating_point() and not part.is_complex()
    return isinstance(part, (int, np.integer)) and not isinstance(part, bool)


def relabelled(recipe: Recipe, index: Integers, label: Integers) -> Recipe:
    """Return a recipe like ``recipe`` whose training samples ``index`` have the labels ``label``, (k,) both."""
    other, whole = copy.copy(recipe), recipe.train_dataset

    def dataset() -> Dataset[Any]:
        source = whole()
        if holds_tensors(source):
            tensors = list(source.tensors)
            tensors[1] = tensors[1].clone()
            tensors[1][torch.from_numpy(index)] = torch.from_numpy(label).to(tensors[1].dtype)
            return TensorDataset(*tensors)
        return Relabelled(source, dict(zip(index.tolist(), label.tolist(), strict=True)))

    other.train_dataset = dataset  # type: ignore[method-assign]
    return other


def check_replaceable(recipe: Recipe, index: Integers, given_N: Integers) -> None:
    """Raise where labels of the training set cannot be replaced in its items.

    Args:
        recipe: The recipe.
        index: Train indices whose labels are to be replaced, (k,).
        given_N: The label of every sample as the run knows it, (N,).

    Raises:
        RecipeError: An item holds no single integer label, or another one than the run's.
    """
    with preserved_generators():
        seed_everything(recipe.seed)
        dataset = recipe.train_dataset()
        if isinstance(dataset, TensorDataset) and (len(dataset.tensors) < 2 or dataset.tensors[1].ndim != 1):
            raise _refused(recipe, "its TensorDataset has no second tensor of one label a sample")
        for i in index[:LOOKED_AT].tolist():
            label = label_in(dataset[i])
            if label is None:
                raise _refused(recipe, f"the item of train_index {i} is {_described(dataset[i])}")
            if int(label) != int(given_N[i]):
                raise _refused(
                    recipe,
                    f"the item of train_index {i} holds {int(label)} and its class is {int(given_N[i])}",
                )


def _refused(recipe: Recipe, why: str) -> RecipeError:
    return RecipeError(
        f"labels of recipe {recipe.name!r} cannot be replaced: {why}; items must be (input, label) or mappings with "
        f"{', '.join(KEYS)}, the label one integer; or train on the written relabel.csv yourself"
    )


def _described(item: Any) -> str:
    if isinstance(item, Mapping):
        return f"a mapping with {', '.join(map(str, item))}"
    if isinstance(item, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in item)})"
    return f"a {type(item).__name__}"
