"""Labelled images in memory: arrays as read from a source, and the datasets made of them.

Shape letters: n images, C channels, H x W pixels, k images of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ...storage.errors import RecipeError

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImages:
    """Images with their classes, as arrays.

    Attributes:
        images: (n, C, H, W), uint8 as stored in files or float32.
        labels: (n,) classes.
        source_index: (n,) position of each image in the published data set's file order.
    """

    images: npt.NDArray[np.generic]
    labels: Integers
    source_index: Integers

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Integers) -> LabelledImages:
        """Return the images at ``positions``, in that order."""
        return LabelledImages(
            images=self.images[positions],
            labels=self.labels[positions],
            source_index=self.source_index[positions],
        )


def first(samples: LabelledImages, size: int | None, option: str) -> LabelledImages:
    """Return the first ``size`` samples (all for None).

    Raises:
        RecipeError: ``size`` exceeds what there is; ``option`` names it in the message.
    """
    if size is None:
        return samples
    if size > len(samples):
        raise RecipeError(
            f"{option} is {size}, but there are {len(samples)} samples: set {option}={len(samples)} or less"
        )
    return samples.take(np.arange(size, dtype=np.int64))


class ImageTensors(TensorDataset):
    """Images and classes as two tensors, so that a batch is one ``index_select`` of each.

    Attributes:
        targets: (n,) int64 classes the model is trained on.
        original_targets: (n,) int64 classes before label noise; the same tensor where there is none.
        source_index: (n,) int64 position in the published data set's file order.
    """

    def __init__(self, samples: LabelledImages, *, original_labels: Integers | None = None) -> None:
        """Take float32 ``samples``; ``original_labels`` are given where labels carry noise."""
        super().__init__(torch.from_numpy(samples.images), torch.from_numpy(samples.labels))
        self.targets = self.tensors[1]
        self.original_targets = self.targets if original_labels is None else torch.from_numpy(original_labels)
        self.source_index = torch.from_numpy(samples.source_index)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Return the items at ``indices`` from one gather; PyTorch's loaders call this."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return list(zip(*(tensor.index_select(0, chosen).unbind(0) for tensor in self.tensors), strict=True))


class ImageBytes(Dataset[tuple[Tensor, Tensor]]):
    """Images kept as uint8 (a quarter of the memory), normalised and augmented on access.

    An item is ``((pixel / 255 - mean) / std, class)``, the image float32 of shape (C, H, W).
    Augmentation pads by ``PAD`` zeros (after normalisation: the mean colour), crops back at random
    and flips left-right with probability 1/2. It draws from torch's global generator, once per item
    in order, so that a loader seeded per step gets the same pictures again.

    Attributes:
        targets, original_targets, source_index: as in ``ImageTensors``.
    """

    PAD = 4

    def __init__(
        self,
        samples: LabelledImages,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        original_labels: Integers | None = None,
    ) -> None:
        """Take uint8 ``samples``; ``mean`` and ``std`` per channel are in units of [0, 1]."""
        self.images = torch.from_numpy(samples.images)
        self.targets = torch.from_numpy(samples.labels)
        self.original_targets = self.targets if original_labels is None else torch.from_numpy(original_labels)
        self.source_index = torch.from_numpy(samples.source_index)
        self.augment = augment
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the items at ``indices``, normalised together and augmented one by one."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        pixels_kCHW = self.images.index_select(0, chosen).to(torch.float32)
        images = list(((pixels_kCHW / 255 - self._mean) / self._std).unbind(0))
        if self.augment:
            images = [self._augmented(image) for image in images]
        return list(zip(images, self.targets.index_select(0, chosen).unbind(0), strict=True))

    def _augmented(self, image_CHW: Tensor) -> Tensor:
        height, width = image_CHW.shape[1:]
        top, left = torch.randint(0, 2 * self.PAD + 1, (2,)).tolist()
        mirrored = bool(torch.rand(()) < 0.5)
        padded = torch.nn.functional.pad(image_CHW, (self.PAD,) * 4)
        cropped = padded[:, top : top + height, left : left + width]
        return cropped.flip(2) if mirrored else cropped.contiguous()
