"""Recipes that say only model, data and losses, and training loops written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hydra_pipe import Recipe, Recording, recording

N = 22


def some(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class Mine(Recipe):
    """What is needed beside a loop's record."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))

    def train_dataset(self) -> Dataset[Any]:
        return some(N, 1)

    def test_dataset(self) -> Dataset[Any]:
        return some(4, 2)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Whole(Mine):
    """The same, with all that a recipe of its own run says."""

    epochs, batch_size, seed = 3, 6, 3
    accumulate, clip_grad_norm = 2, 0.3
    scheduler_interval = "step"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        weights = [p for p in model.parameters() if p.ndim > 1]
        biases = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.02}]
        return torch.optim.AdamW(groups, lr=0.03, weight_decay=0.1)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.03, 0.02], total_steps=7)


class WholeLayers(Whole):
    """With batch statistics, SGD and neither clipping nor accumulation."""

    epochs, batch_size, accumulate, clip_grad_norm = 2, 11, 1, None
    scheduler_interval = "epoch"

    def model(self) -> nn.Module:
        return Mine.model(self)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


class Bare(Whole):
    """``Whole`` without what its loop's record knows."""

    accumulate, clip_grad_norm = 1, None
    optimizer = Recipe.optimizer
    scheduler = Recipe.scheduler


def batches(epochs: int = 1, size: int = 11) -> Iterable[Tensor]:
    for epoch in range(epochs):
        yield from torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(size)


def simple(
    out: Any, change: Callable[[nn.Module, torch.optim.Optimizer], None] | None = None, **given: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Recording]:
    """Return a model, its optimiser and a recording of both, in that order of making."""
    torch.manual_seed(0)
    model = Mine().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if change is not None:
        change(model, optimizer)
    given = {"n_train": N, **given}
    return model, optimizer, recording(model, optimizer, out=out, **given)


def losses_of(model: nn.Module, indices: Sequence[int] | Tensor, noise: float = 0.0) -> Tensor:
    inputs, targets = some(N, 1)[torch.as_tensor(indices)]
    return F.cross_entropy(model(inputs + noise), targets, reduction="none")
