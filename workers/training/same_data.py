"""Do the data of a recipe stay the same when its seed changes?

Trainings that are averaged over seeds must differ in initial weights, batch order, dropout and
augmentation alone. So the datasets are built with each seed, as training builds them, and compared
by digest: all labels, and of the samples all (a ``TensorDataset``) or `SAMPLES` spread evenly, each
fetched with the same generators, so that augmentation shows the same picture.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...storage.errors import RecipeError
from ..data.batch_types import leaves
from ..data.batches import fetch, holds_tensors
from ..data.cast import raw_bytes
from ..determinism import preserved_generators, seed_everything
from ..recipe import Recipe

SAMPLES = 512
"""Samples looked at in each dataset that is no ``TensorDataset``."""

_BLOCK = 64


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """Return a copy of the recipe with another seed."""
    other = copy.copy(recipe)
    other.seed = seed
    return other


def data_digests(recipe: Recipe) -> dict[str, str]:
    """Return digests of what the recipe trains and tests on, by what they are of."""
    found: dict[str, str] = {}
    with preserved_generators():
        for what, build in (
            ("training", recipe.train_dataset),
            ("test", recipe.test_dataset),
            ("validation", recipe.validation_dataset),
        ):
            seed_everything(recipe.seed)  # as training does: a recipe may draw its data from them
            dataset: Dataset[Any] | None = build()
            if dataset is None:
                continue
            labels = recipe.labels(dataset)
            if labels is not None:
                found[f"{what} labels"] = _sha(np.asarray(labels, dtype=np.int64).tobytes())
            found[f"{what} samples"] = _samples(recipe, dataset)
    return found


def check_same_data(recipe: Recipe, seed: int, expected: Mapping[str, str]) -> None:
    """Refuse a recipe whose data are others with ``seed``.

    Args:
        recipe: The recipe, with the seed that ``expected`` was made with.
        seed: The seed to try.
        expected: What `data_digests` gave.

    Raises:
        RecipeError: They are; says which, and what to do.
    """
    found = data_digests(with_seed(recipe, seed))
    for what in dict.fromkeys([*expected, *found]):
        if expected.get(what) != found.get(what):
            raise RecipeError(
                f"recipe {recipe.name!r}: the {what} with seed {seed} are not those with seed {recipe.seed}, and "
                "seeds can be averaged over the same data alone; draw data from a generator with a seed of its "
                "own (torch.Generator().manual_seed(0), or an option such as noise_seed), not from self.seed "
                "or torch's global one"
            )


def leaves_of(recipe: Recipe, dataset: Dataset[Any], most: int = SAMPLES) -> Iterator[tuple[str, Any]]:
    """Yield (kind, value) of what the samples hold: all of a ``TensorDataset``, else of ``most`` items.

    Values are tensors, numbers and text; what else there is (objects) has no bytes to compare. Moves the
    global generators.
    """
    count = len(dataset)  # type: ignore[arg-type]
    yield "", f"{count}".encode()
    if holds_tensors(dataset):
        yield from (("", tensor) for tensor in dataset.tensors)
        return
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
    for start in range(0, len(chosen), _BLOCK):
        seed_everything(start)
        for leaf in leaves(fetch(recipe, dataset, chosen[start : start + _BLOCK])):
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
                yield "array", torch.from_numpy(np.ascontiguousarray(leaf))
            elif isinstance(leaf, np.ndarray) and leaf.dtype.kind != "O":
                yield "array", leaf.tobytes()
            elif isinstance(leaf, (torch.Tensor, str, int, float, bytes)):
                yield "", leaf if isinstance(leaf, torch.Tensor) else repr(leaf).encode()


def _samples(recipe: Recipe, dataset: Dataset[Any]) -> str:
    digest = hashlib.sha256()
    for kind, leaf in leaves_of(recipe, dataset):
        if isinstance(leaf, bytes):
            digest.update(leaf)
            continue
        if kind != "array":
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        digest.update(raw_bytes(leaf))
    return digest.hexdigest()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
