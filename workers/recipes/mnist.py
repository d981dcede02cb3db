"""MNIST and Fashion-MNIST on LeNet-5, with the settings of the HyDRA paper (its Table 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau
from torch.utils.data import Dataset

from .data_idx import FILES, missing_files, read_images
from .data_images import ImageTensors, Integers, LabelledImages
from .data_place import data_directory
from .data_split import held_out_split
from .image import ImageRecipe, Part
from .lenet import LeNet5


class Mnist(ImageRecipe):
    """Handwritten digits, 28 x 28: 50,000 to train on, 10,000 for validation, 10,000 to test on.

    20 epochs of batches of 64, learning rate 0.01, times 0.1 after 5 epochs, momentum 0.9, weight
    decay 2e-5. The validation part is a fixed random sixth of the training file; the training part
    is in random order, the test part in file order (``source_index`` of the datasets leads back).
    """

    NAME = "mnist"
    USUAL_PLACES: ClassVar[tuple[str, ...]] = ()
    SOURCE: ClassVar[str] = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    MEAN: ClassVar[float] = 0.1307
    STD: ClassVar[float] = 0.3081
    VALIDATION_PARTS: ClassVar[int] = 6

    def model(self) -> nn.Module:
        """Return LeNet-5 with ReLU, 61,706 parameters."""
        return LeNet5(self.CLASSES)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> MultiStepLR | ReduceLROnPlateau:
        """Return the schedule that multiplies the learning rate by 0.1 after 5 epochs."""
        return MultiStepLR(optimizer, milestones=[5], gamma=0.1)

    def validation_dataset(self) -> Dataset[tuple[torch.Tensor, ...]]:
        """Return the held-out sixth of the training file, labels clean."""
        return self._dataset(self._part("validation"), training=False)

    def _part(self, part: Part) -> LabelledImages:
        directory = data_directory(
            str(self.NAME),
            self.data_dir,
            files=FILES,
            missing=missing_files,
            usual=self.USUAL_PLACES,
            source=self.SOURCE,
        )
        samples = read_images(directory, train=part != "test", classes=self.CLASSES)
        if part == "test":
            return samples
        kept, out = held_out_split(len(samples), len(samples) // self.VALIDATION_PARTS)
        return samples.take(kept if part == "train" else out)

    def _dataset(
        self, samples: LabelledImages, *, training: bool, original_labels: Integers | None = None
    ) -> ImageTensors:
        pixels = samples.images.astype(np.float32)
        pixels /= 255
        pixels -= np.float32(self.MEAN)
        pixels /= np.float32(self.STD)
        scaled = LabelledImages(images=pixels, labels=samples.labels, source_index=samples.source_index)
        return ImageTensors(scaled, original_labels=original_labels)


class FashionMnist(Mnist):
    """Clothes, 28 x 28, in MNIST's format and split.

    20 epochs of batches of 64, learning rate 0.01, halved when the sum of training and validation
    loss has not fallen by 0.01% of its best value for more than two epochs; momentum 0.9, weight
    decay 2e-5. Without ``data_dir`` the files of Debian's package dataset-fashion-mnist are used
    where it is installed.
    """

    NAME = "fashion-mnist"
    USUAL_PLACES = ("/usr/share/datasets/fashion-mnist",)
    SOURCE = "https://github.com/zalandoresearch/fashion-mnist (or Debian's package dataset-fashion-mnist)"
    LOOK_ALIKES: ClassVar[Mapping[int, int]] = {6: 0, 0: 6, 2: 4, 4: 2, 7: 9, 9: 7}
    """Shirt and T-shirt, pullover and coat, sneaker and ankle boot, either way."""
    MEAN = 0.2860
    STD = 0.3530

    plateau_metric: Literal["train", "validation", "train+validation"] = "train+validation"

    def scheduler(self, optimizer: torch.optim.Optimizer) -> MultiStepLR | ReduceLROnPlateau:
        """Return the schedule that halves the learning rate on plateaus."""
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=1e-4, threshold_mode="rel")
