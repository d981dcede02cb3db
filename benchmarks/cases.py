"""The work that benchmarks do: a recipe of the right size, its batches in memory, and its record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.storage.trajectory import Trajectory, open_trajectory
from hydra_pipe.workers.recipe import Batch, Recipe
from hydra_pipe.workers.recipes.cifar10 import Cifar10
from hydra_pipe.workers.recipes.data_images import LabelledImages
from hydra_pipe.workers.recipes.image import Part
from hydra_pipe.workers.recipes.mnist import FashionMnist
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

MADE_UP = 20_000
"""Samples of the stand-in for the data, where the data are not there."""


class Clothes(FashionMnist):
    """Fashion-MNIST on LeNet-5 with a constant learning rate; random images where the files are missing.

    Neither the values of the pixels nor the schedule change what a step costs; an epoch's evaluation
    on 10,000 validation samples would only make the record slower.
    """

    NAME = "clothes"

    def _part(self, part: Part) -> LabelledImages:
        try:
            return super()._part(part)
        except RecipeError:
            return made_up((1, 28, 28), self.CLASSES, MADE_UP)

    def scheduler(self, optimizer: Any) -> None:
        """Return no schedule."""

    def validation_dataset(self) -> None:
        """Return no validation samples."""


class Photographs(Cifar10):
    """CIFAR-10 on DenseNet-40, likewise with a constant learning rate and random images in their place."""

    NAME = "photographs"

    def _part(self, part: Part) -> LabelledImages:
        try:
            return super()._part(part)
        except RecipeError:
            return made_up((3, 32, 32), self.CLASSES, MADE_UP // 10)

    def scheduler(self, optimizer: Any) -> None:
        """Return no schedule."""

    def validation_dataset(self) -> None:
        """Return no validation samples."""


def made_up(shape: tuple[int, int, int], classes: int, count: int) -> LabelledImages:
    """Return images of random pixels and labels."""
    draw = np.random.default_rng(0)
    return LabelledImages(
        images=draw.integers(0, 255, (count, *shape), dtype=np.uint8),
        labels=draw.integers(0, classes, count),
        source_index=np.arange(count),
    )


class Prefetched(Training):
    """A training whose batches were fetched before, so that loading data costs nobody anything.

    Args:
        recipe: The recipe.
        compute: How to compute.
        batches: Every step's batch, from another ``Prefetched`` of the same recipe; None: fetch them.
    """

    def __init__(self, recipe: Recipe, compute: Compute, batches: Sequence[Batch] | None = None) -> None:
        super().__init__(recipe, compute)
        self.fetched = list(super().loader()) if batches is None else batches

    def loader(self, first: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches of steps ``first`` to ``stop``."""
        yield from self.fetched[first:stop]


def record(
    recipe: Recipe, compute: Compute, folder: Path, every: int | None = None
) -> tuple[Sequence[Batch], Trajectory]:
    """Record the recipe's training below ``folder``; return its batches and its trajectory.

    Args:
        recipe: The recipe.
        compute: How to compute.
        folder: Where.
        every: Steps between checkpoints; None: there are the first and the last alone.
    """
    training = Prefetched(recipe, compute)
    uri = str(folder / "trajectory.zarr")
    Recorder(training, uri, every=every or training.steps).run()
    return training.fetched, open_trajectory(uri)
