"""The default recipe: handwritten digits that come with scikit-learn, and a network that trains in seconds."""

from __future__ import annotations

import gzip
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from ...storage.errors import RecipeError
from .data_images import LabelledImages
from .data_split import stratified_split
from .image import ImageRecipe, Part


def small_cnn() -> nn.Sequential:
    """Return the network: (B, 1, 8, 8) images to (B, 10) scores, 5,050 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


@cache
def _digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the images (1797, 8, 8) with values 0 to 16, and their labels, read once a process.

    They are read from scikit-learn's file, where it lies: to import scikit-learn takes seconds in every worker.
    """
    package = find_spec("sklearn")
    places = (package.submodule_search_locations or []) if package else []
    for place in places:
        path = Path(place, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            with gzip.open(path, "rt", encoding="utf-8") as file:
                table = np.loadtxt(file, delimiter=",")
            table.setflags(write=False)
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits  # it has moved the file

    bunch = load_digits()
    return np.asarray(bunch.images, dtype=np.float64), np.asarray(bunch.target, dtype=np.int64)


class Digits(ImageRecipe):
    """1,797 digits of 8 x 8 pixels in [0, 1]: 1,437 to train on, 360 to test on, stratified.

    Needs no download. Over seeds 0 to 7, 97.2% to 98.9% of the test samples are right after 20 epochs.
    """

    NAME = "digits"
    TEST_SAMPLES = 360

    lr = 0.05
    weight_decay = 5e-4

    def __init__(self, *, data_dir: str | os.PathLike[str] | None = None, **common: Any) -> None:
        """Take the common options; see ``ImageRecipe``. There is no data directory to give."""
        if data_dir is not None:
            raise RecipeError(
                f"data_dir is {data_dir!r}, but digits come with scikit-learn: leave data_dir out"
            )
        super().__init__(**common)

    def model(self) -> nn.Module:
        """Return a small convolutional network, 5,050 parameters."""
        return small_cnn()

    def _part(self, part: Part) -> LabelledImages:
        pixels, labels = _digits()
        everything = LabelledImages(
            images=(pixels.astype(np.float32) / 16)[:, None],
            labels=labels,
            source_index=np.arange(len(labels), dtype=np.int64),
        )
        kept, out = stratified_split(labels, self.TEST_SAMPLES)
        return everything.take(kept if part == "train" else out)
