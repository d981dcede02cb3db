"""The recipe of the run that an earlier version left in ``tests/data``. Its code must stay as it is: runs know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hydra_pipe import Recipe


class Kept(Recipe):
    epochs = 2
    batch_size = 5
    seed = 11

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def _data(self, count: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(count, 4, generator=generator)
        return TensorDataset(inputs, inputs[:, :3].argmax(1))

    def train_dataset(self) -> TensorDataset:
        return self._data(24, 1)

    def test_dataset(self) -> TensorDataset:
        return self._data(6, 2)

    def losses(self, model: nn.Module, batch: Sequence[Any]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
