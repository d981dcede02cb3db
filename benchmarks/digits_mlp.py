"""The task of the fidelity measurements: small enough to be retrained hundreds of times.

    hydra-pipe run benchmarks/digits_mlp.py:DigitsMLP --hessian exact --mode adjoint --out runs/fidelity
    hydra-pipe evaluate runs/fidelity benchmarks/digits_mlp.py:DigitsMLP

1,000 digits (8 x 8 pixels) of which 10% have a wrong label, a network of 64-32-10 units with tanh
(2,410 parameters), SGD with momentum, 300 steps of 50 samples; 200 test samples with right labels. And the same with AdamW, without and with
clipping, for 80 test samples.
"""

from __future__ import annotations

import math

import torch
from hydra_pipe.workers.recipes.digits import Digits
from torch import nn


class DigitsMLP(Digits):
    """Digits on a small network that is smooth in its weights, with 10% wrong labels."""

    NAME = "digits-mlp"

    epochs = 15
    batch_size = 50
    seed = 0
    lr = 0.03
    momentum = 0.9
    weight_decay = 1e-4
    label_noise = 0.1
    train_size = 1000
    test_size = 200

    def __init__(self, *, label_noise: float = 0.1, **common: object) -> None:
        """Take the options of the digits recipe; a tenth of the labels is wrong unless said otherwise."""
        super().__init__(label_noise=label_noise, **common)

    def model(self) -> nn.Module:
        """Return the network, 64*32 + 32 + 32*10 + 10 = 2,410 parameters."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


class DigitsAdamW(DigitsMLP):
    """The same with AdamW, its rate warmed up over a tenth of the steps and then lowered along a cosine."""

    NAME = "digits-adamw"

    lr = 5e-3
    weight_decay = 1e-2
    test_size = 80
    scheduler_interval = "step"

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the warm-up and the cosine, moved after every step."""
        steps = self.epochs * math.ceil(self.train_size / self.batch_size)
        warm = max(1, steps // 10)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class DigitsAdamWClipped(DigitsAdamW):
    """The same with gradients clipped to norm 0.4, which happens in most of the steps."""

    NAME = "digits-adamw-clipped"

    clip_grad_norm = 0.4
