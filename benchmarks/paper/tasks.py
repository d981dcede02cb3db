"""The trainings of the papers, and training again on fewer samples.

Letters: N training samples, M test samples.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.recipes.cifar10 import Cifar10
from hydra_pipe.workers.recipes.data_images import LabelledImages, first
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.recipes.image import ImageRecipe, Part
from hydra_pipe.workers.recipes.mnist import FashionMnist, Mnist
from hydra_pipe.workers.training.retrain import retrain_subset, sample_losses
from hydra_pipe.workers.training.training import Compute, Training

from hydra_pipe import Run

Integers = npt.NDArray[np.int64]

CLOTHES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Boot"),
)
PHOTOGRAPHS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class OfThePaper(ImageRecipe):
    """What the papers' recipes have in common, put before a built-in one.

    Files are read once a process; validation samples are in the paper's proportion to the training samples.
    """

    def _part(self, part: Part) -> LabelledImages:
        return _cached(type(self), part, self.data_dir)

    def validation_dataset(self) -> Any:
        """Return the validation samples: as many for each training sample as in the paper."""
        part, whole = self._part("validation"), len(self._part("train"))
        count = max(1, len(part) * (self.train_size or whole) // whole)
        return self._dataset(first(part, count, "validation size"), training=False)


class PaperClothes(OfThePaper, FashionMnist):
    """Fashion-MNIST on LeNet-5."""


class OnValidation(PaperClothes):
    """Fashion-MNIST, in which contributions are those to validation samples."""

    def test_dataset(self) -> Any:
        """Return the first ``test_size`` validation samples."""
        part = first(self._part("validation"), self.test_size, "test_size")
        return self._dataset(part, training=False)


class PaperMnist(OfThePaper, Mnist):
    """MNIST on LeNet-5."""


class PaperPhotographs(OfThePaper, Cifar10):
    """CIFAR-10 on DenseNet-40."""


KINDS: dict[str, type[OfThePaper]] = {
    "fashion-mnist": PaperClothes,
    "mnist": PaperMnist,
    "cifar10": PaperPhotographs,
}
NOISE = "symmetric"
"""Wrong labels as in the code of the HyDRA paper: int(share x class size) a class get one of the others at random."""
NAMES = {"fashion-mnist": CLOTHES, "cifar10": PHOTOGRAPHS}
"""Names of the classes, where they are no digits."""


@cache
def _cached(kind: type[OfThePaper], part: Part, data_dir: str | None) -> LabelledImages:
    """Return a part of a data set as its own recipe reads it, read once a process."""
    plain: Any = next(base for base in kind.__mro__ if not issubclass(base, OfThePaper))
    read: LabelledImages = plain(data_dir=data_dir)._part(part)
    return read


def task(data: str, **options: Any) -> Recipe:
    """Return a training of the paper; ``digits`` is the built-in recipe.

    Raises:
        RecipeError: The data are not there.
    """
    if data == "digits":
        return Digits(**options)
    recipe = KINDS[data](**options)
    recipe._part("train")
    return recipe


def available(data: str) -> bool:
    """Whether the files of a data set are there."""
    try:
        task(data)
    except RecipeError:
        return False
    return True


def names(data: str) -> tuple[str, ...]:
    """Return the names of a data set's classes."""
    return NAMES.get(data, tuple(map(str, range(10))))


def retrained(
    recipe: Recipe, kept: Integers, *, seed: int, parts: dict[str, Integers], device: str = "cpu"
) -> dict[str, float]:
    """Return the accuracies of the recipe trained from scratch on the samples ``kept``, after its last epoch.

    Args:
        recipe: Whose labels are trained on.
        kept: Train indices.
        seed: Of the training: initial weights and batch order.
        parts: Test indices by name; accuracy is reported on each.
        device: Where.
    """
    again = copy.copy(recipe)
    again.seed = seed
    training = retrain_subset(again, Compute(device=device, threads=1), np.sort(kept))
    return accuracies(training, again, parts)


def recorded(
    run: Run, recipe: Recipe, *, parts: dict[str, Integers], device: str = "cpu"
) -> dict[str, float]:
    """Return the accuracies of the recorded training itself: what `retrained` gives for all samples and its seed."""
    training = Training(recipe, Compute(device=device, threads=1))
    last = run.trajectory().checkpoint(-1)
    training.load_weights(last.weights, last.buffers)
    return accuracies(training, recipe, parts)


@torch.no_grad()
def accuracies(training: Any, recipe: Recipe, parts: dict[str, Integers]) -> dict[str, float]:
    """Return the trained model's accuracy on parts of the test set."""
    dataset = recipe.test_dataset()
    everything = np.arange(len(dataset))  # type: ignore[arg-type]
    correct = sample_losses(training, dataset, everything).correct == 1
    return {name: float(correct[positions].mean()) for name, positions in parts.items()}
