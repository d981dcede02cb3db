"""Batches: in which order, fetched how. One item of the loader is one training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ...storage.errors import HydraError
from ..determinism import derived_seed, seed_everything
from .batch_types import know, leaves
from .cast import cast_tensor
from .of_recipe import Batch, DataRecipe, is_default
from .user_code import listed, user_code

Indices = npt.NDArray[np.int32]


def holds_tensors(dataset: Any) -> TypeGuard[TensorDataset]:
    """Whether the items are rows of a ``TensorDataset``'s tensors and nothing else."""
    return isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__


def is_plain(recipe: DataRecipe, dataset: Dataset[Any]) -> bool:
    """Whether a batch is, too."""
    return holds_tensors(dataset) and is_default(recipe, "collate")


def fetch(recipe: DataRecipe, dataset: Dataset[Any], indices: Sequence[int] | npt.NDArray[Any]) -> Batch:
    """Return the batch of the given samples, collated as the recipe wants it."""
    if is_plain(recipe, dataset) and holds_tensors(dataset):
        chosen = torch.as_tensor(np.asarray(indices), dtype=torch.int64)
        return [tensor.index_select(0, chosen) for tensor in dataset.tensors]
    many = getattr(dataset, "__getitems__", None)
    items = many([int(i) for i in indices]) if many else [dataset[int(i)] for i in indices]
    return recipe.collate(items)


class _Steps(Dataset[Any]):
    """Map-style dataset whose item t is the batch of step t, randomness keyed by (seed, t)."""

    def __init__(self, recipe: DataRecipe, dataset: Dataset[Any], batches: Indices, seed: int) -> None:
        self.recipe, self.dataset, self.batches, self.seed = recipe, dataset, batches, seed

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        return step_batch(self.recipe, self.dataset, self.batches, self.seed, step)


def step_batch(recipe: DataRecipe, dataset: Dataset[Any], batches: Indices, seed: int, step: int) -> Batch:
    """Return the batch of one step; moves the global generators."""
    seed_everything(derived_seed(seed, "data", step))
    row = batches[step]
    members = row[row >= 0]
    what = f"fetching the batch of step {step} (train_index {listed(members.tolist())}) raised"
    with user_code(what, always=True):
        return fetch(recipe, dataset, members)


class _Told(Dataset[Any]):
    """Batches in a process of their own: an error is handed over; raised there it became a traceback's text."""

    def __init__(self, source: _Steps) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, step: int) -> Batch | HydraError:
        try:
            return self.source[step]
        except HydraError as error:
            return error


def step_batches(
    recipe: DataRecipe,
    dataset: Dataset[Any],
    batches: Indices,
    seed: int,
    first: int = 0,
    stop: int | None = None,
) -> Iterator[Batch]:
    """Yield the batches of steps ``first`` to ``stop``; any number of workers gives the same."""
    steps = range(first, len(batches) if stop is None else stop)
    source = _Steps(recipe, dataset, batches, seed)
    if recipe.num_workers == 0:
        for step in steps:
            yield source[step]
        return
    loader: DataLoader[Any] = DataLoader(
        _Told(source),
        batch_size=None,
        sampler=steps,
        num_workers=recipe.num_workers,
        persistent_workers=False,
    )
    for batch in loader:
        if isinstance(batch, HydraError):
            raise batch
        yield batch


def to_device(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """Move all tensors of a batch to ``device``; floating ones become ``dtype``, complex ones its kind."""

    def move(leaf: Any) -> Any:
        return cast_tensor(leaf, device, dtype) if isinstance(leaf, torch.Tensor) else leaf

    know(batch)
    return tree_map(move, batch)


def batch_length(batch: Batch) -> int:
    """Return B: the leading axis of the first tensor in the batch, 0 when it holds no tensor."""
    tensors = (leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim)
    return next((tensor.shape[0] for tensor in tensors), 0)


def rows_of(batch: Batch, positions: torch.Tensor, size: int) -> Batch:
    """Return the samples at ``positions`` of a batch of ``size``: tensors with that leading axis are cut."""

    def cut(leaf: object) -> object:
        if isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (size,):
            return leaf.index_select(0, positions)
        return leaf

    return tree_map(cut, batch)
