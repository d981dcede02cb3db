"""CIFAR-10 on DenseNet-40 or MobileNetV2, with the settings of the HyDRA paper (its Table 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset

from .data_cifar import FILES, missing_files, read_images
from .data_images import ImageBytes, Integers, LabelledImages
from .data_place import data_directory
from .data_split import held_out_split
from .densenet import DenseNet40
from .image import ImageRecipe, Part
from .mobilenet import MobileNetV2
from .options import choice, flag

MODELS: Mapping[str, type[DenseNet40 | MobileNetV2]] = {
    "densenet40": DenseNet40,
    "mobilenetv2": MobileNetV2,
}


class Cifar10(ImageRecipe):
    """Photographs, 32 x 32: 40,000 to train on, 10,000 for validation, 10,000 to test on.

    150 epochs of batches of 64, learning rate 0.1, times 0.1 when the sum of training and
    validation loss has not fallen by 0.01% of its best value for more than two epochs; momentum 0.9,
    weight decay 2.5e-5. The validation part is a fixed random fifth of the five training files; the
    training part is in random order, the test part in file order.

    Attributes:
        architecture: ``"densenet40"`` or ``"mobilenetv2"``; the option is called ``model``.
        augment: Crop and flip the training images at random.
    """

    NAME = "cifar10"
    SOURCE = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    LOOK_ALIKES: ClassVar[Mapping[int, int]] = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
    """Truck -> automobile, bird -> airplane, deer -> horse, cat and dog either way."""
    MEAN = (0.4914, 0.4822, 0.4465)
    STD = (0.2470, 0.2435, 0.2616)
    VALIDATION_PARTS = 5

    epochs = 150
    lr = 0.1
    weight_decay = 2.5e-5
    plateau_metric: Literal["train", "validation", "train+validation"] = "train+validation"
    architecture: str = "densenet40"
    augment: bool = False

    def __init__(self, *, model: str = "densenet40", augment: bool = False, **common: Any) -> None:
        """Take the options; ``common`` are those of ``ImageRecipe``.

        Raises:
            RecipeError: A value has the wrong type or is out of its range.
        """
        super().__init__(**common)
        self.architecture = choice("model", model, tuple(MODELS))
        self.augment = flag("augment", augment)

    def arguments(self) -> Mapping[str, Any]:
        """Return the options that differ from the class's own values, as they stand now."""
        own = {"model": self.architecture} if self.architecture != type(self).architecture else {}
        flags = {"augment": self.augment} if self.augment != type(self).augment else {}
        return {**own, **flags, **super().arguments()}

    def model(self) -> nn.Module:
        """Return DenseNet-40 (176,122 parameters) or MobileNetV2 (2,236,682)."""
        return MODELS[self.architecture](self.CLASSES)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
        """Return the schedule that multiplies the learning rate by 0.1 on plateaus."""
        return ReduceLROnPlateau(optimizer, factor=0.1, patience=2, threshold=1e-4, threshold_mode="rel")

    def validation_dataset(self) -> Dataset[Any]:
        """Return the held-out fifth of the training files, labels clean, never augmented."""
        return self._dataset(self._part("validation"), training=False)

    def _part(self, part: Part) -> LabelledImages:
        directory = data_directory(
            self.NAME, self.data_dir, files=FILES, missing=missing_files, source=self.SOURCE
        )
        samples = read_images(directory, train=part != "test", classes=self.CLASSES)
        if part == "test":
            return samples
        kept, out = held_out_split(len(samples), len(samples) // self.VALIDATION_PARTS)
        return samples.take(kept if part == "train" else out)

    def _dataset(
        self, samples: LabelledImages, *, training: bool, original_labels: Integers | None = None
    ) -> ImageBytes:
        return ImageBytes(
            samples,
            mean=self.MEAN,
            std=self.STD,
            augment=self.augment and training,
            original_labels=original_labels,
        )
