"""A task that is not smooth: LeNet-5 with ReLU on 3,200 Fashion-MNIST samples, a tenth of the labels wrong.

    hydra-pipe run benchmarks/clothes_lenet.py:ClothesCosine --hessian exact --mode adjoint --out runs/clothes
    hydra-pipe evaluate runs/clothes benchmarks/clothes_lenet.py:ClothesCosine --subsets 60 --fractions 0.5,0.9

SGD with momentum 0.9, 200 steps of 64 at rate 0.02, lowered along a cosine to zero, or constant; 64 test samples.
"""

from __future__ import annotations

import math

import torch
from hydra_pipe.workers.recipes.mnist import FashionMnist
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler


class ClothesConstant(FashionMnist):
    """Fashion-MNIST at a constant rate."""

    NAME = "clothes-constant"

    epochs = 4
    lr = 0.02
    label_noise = 0.1
    train_size = 3200
    test_size = 64
    scheduler_interval = "step"

    def __init__(self, *, label_noise: float = 0.1, **common: object) -> None:
        """Take the options of the recipe; a tenth of the labels is wrong unless said otherwise."""
        super().__init__(label_noise=label_noise, **common)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        """Return no schedule."""
        return None

    def validation_dataset(self) -> None:
        """Return no validation samples."""


class ClothesCosine(ClothesConstant):
    """The same with the rate lowered along a cosine to zero, moved after every step."""

    NAME = "clothes-cosine"

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return the cosine."""
        return CosineAnnealingLR(optimizer, self.epochs * math.ceil((self.train_size or 0) / self.batch_size))
