"""What all built-in image recipes share: options, label noise, loss and optimiser."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...storage.errors import RecipeError
from ..recipe import Batch, Recipe
from .data_images import ImageBytes, ImageTensors, Integers, LabelledImages, first
from .data_split import NOISE_KINDS, with_label_noise
from .options import choice, directory, number, whole

Part = Literal["train", "validation", "test"]

_MOST_SEED = 2**32 - 1


class ImageRecipe(Recipe):
    """Image classification by SGD with momentum, with deliberately wrong labels on request.

    A subclass gives ``model``, ``_part`` (arrays of one part of the data) and ``_dataset`` (the
    dataset made of them), and sets the class attributes that are its paper's settings.

    Attributes:
        data_dir: Directory of the data files; None means the recipe's default place.
        label_noise: Share of the training labels to replace, 0 to 1. Validation and test labels
            stay clean.
        noise_kind: ``"uniform"``: a wrong class, all equally likely. ``"permuted"``: the chosen
            samples' labels shuffled among themselves; those that get their own class again are not
            counted as noisy. Exactly ``int(label_noise * size)`` of every class: ``"symmetric"``: a
            wrong class, all equally likely. ``"pairflip"``: the next class. ``"asymmetric"``: the
            class that it is mistaken for (`LOOK_ALIKES`).
        noise_seed: Chooses the samples and their wrong labels; independent of ``seed``.
        train_size: Train on the first so many samples of the split; None means all.
        test_size: Test on the first so many test samples; None means all.
        lr: Initial learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD, on all parameters.
    """

    CLASSES: ClassVar[int] = 10
    LOOK_ALIKES: ClassVar[Mapping[int, int]] = {}
    """Class -> the class that it is mistaken for, of ``noise_kind="asymmetric"``."""
    OPTIONS: ClassVar[tuple[str, ...]] = (
        *("data_dir", "label_noise", "noise_kind", "noise_seed", "train_size", "test_size"),
        *("lr", "momentum", "weight_decay", "epochs", "batch_size", "seed"),
    )

    data_dir: str | None = None
    label_noise: float = 0.0
    noise_kind: str = "uniform"
    noise_seed: int = 0
    train_size: int | None = None
    test_size: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 2e-5

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike[str] | None = None,
        label_noise: float = 0.0,
        noise_kind: str = "uniform",
        noise_seed: int = 0,
        train_size: int | None = None,
        test_size: int | None = None,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Take the options; see the class attributes. None keeps the class's own value.

        Raises:
            RecipeError: A value has the wrong type or is out of its range.
        """
        if data_dir is not None:
            self.data_dir = directory("data_dir", data_dir)
        self.label_noise = number("label_noise", label_noise, least=0, most=1)
        self.noise_kind = choice("noise_kind", noise_kind, NOISE_KINDS)
        if self.noise_kind == "asymmetric" and not self.LOOK_ALIKES:
            raise RecipeError(
                f"noise_kind is 'asymmetric', but {self.name} says of no class what it is mistaken for; "
                f"use {' or '.join(repr(kind) for kind in NOISE_KINDS if kind != 'asymmetric')}"
            )
        self.noise_seed = whole("noise_seed", noise_seed, least=0, most=_MOST_SEED)
        if train_size is not None:
            self.train_size = whole("train_size", train_size, least=1)
        if test_size is not None:
            self.test_size = whole("test_size", test_size, least=1)
        if lr is not None:
            self.lr = number("lr", lr, least=0, least_open=True)
        if momentum is not None:
            self.momentum = number("momentum", momentum, least=0, most=1, most_open=True)
        if weight_decay is not None:
            self.weight_decay = number("weight_decay", weight_decay, least=0)
        if epochs is not None:
            self.epochs = whole("epochs", epochs, least=1)
        if batch_size is not None:
            self.batch_size = whole("batch_size", batch_size, least=1)
        if seed is not None:
            self.seed = whole("seed", seed, least=0, most=_MOST_SEED)

    def arguments(self) -> Mapping[str, Any]:
        """Return the options that differ from the class's own values, as they stand now."""
        return {
            option: getattr(self, option)
            for option in self.OPTIONS
            if getattr(self, option) != getattr(type(self), option)
        }

    def _part(self, part: Part) -> LabelledImages:
        """Return the clean samples of one part; the training and test parts are cut later."""
        raise NotImplementedError(f"{type(self).__name__} must define _part()")

    def _dataset(
        self, samples: LabelledImages, *, training: bool, original_labels: Integers | None = None
    ) -> Dataset[Any]:
        """Return the dataset of ``samples``; float32 images as they are unless overridden."""
        return ImageTensors(samples, original_labels=original_labels)

    def train_dataset(self) -> Dataset[Any]:
        """Return the training dataset, label noise applied; ``.targets`` are the labels trained on."""
        clean = first(self._part("train"), self.train_size, "train_size")
        if self.label_noise == 0:
            return self._dataset(clean, training=True)
        noisy = LabelledImages(
            images=clean.images,
            labels=with_label_noise(
                clean.labels,
                share=self.label_noise,
                kind=self.noise_kind,
                seed=self.noise_seed,
                classes=self.CLASSES,
                partners=self.LOOK_ALIKES,
            ),
            source_index=clean.source_index,
        )
        return self._dataset(noisy, training=True, original_labels=clean.labels)

    def test_dataset(self) -> Dataset[Any]:
        """Return the test dataset."""
        return self._dataset(first(self._part("test"), self.test_size, "test_size"), training=False)

    def noisy_labels(self, dataset: Dataset[Any]) -> tuple[Integers, Integers] | None:
        """Return (indices of changed labels, their original labels), or None without label noise.

        Both are (k,) int64, ascending in the index. Samples whose new label equals the old one (it
        happens with ``noise_kind="permuted"``) are not among them.
        """
        if not isinstance(dataset, (ImageTensors, ImageBytes)):
            return None
        if dataset.original_targets is dataset.targets:
            return None
        originals = dataset.original_targets.numpy()
        changed = np.flatnonzero(dataset.targets.numpy() != originals).astype(np.int64)
        return changed, originals[changed]

    def show(self, item: Any) -> Any:
        """Return the image as its file has it: normalisation undone."""
        image_CHW: Tensor = item[0]
        mean, std = (
            torch.tensor(getattr(self, name, value)) for name, value in (("MEAN", 0.0), ("STD", 1.0))
        )
        return (image_CHW * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).clamp(0, 1).numpy()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of each sample, shape (B,)."""
        images, targets = batch
        return F.cross_entropy(model(images), targets, reduction="none")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return SGD with momentum over all parameters."""
        return torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
