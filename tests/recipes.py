"""Small recipes that between them use every layer, optimiser setting and oddity that matters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hydra_pipe.workers.recipe import Recipe
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset


def gaussian(count: int, shape: tuple[int, ...], classes: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(classes, (count,), generator=generator)
    return TensorDataset(centers[labels] + torch.randn(count, *shape, generator=generator), labels)


class Small(Recipe):
    """A linear softmax classifier on 45 samples: the base of the others."""

    epochs, batch_size, seed = 3, 8, 3
    shape: tuple[int, ...] = (6,)
    classes = 3

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def train_dataset(self) -> Dataset[Any]:
        return gaussian(45, self.shape, self.classes, 1)

    def test_dataset(self) -> Dataset[Any]:
        return gaussian(12, self.shape, self.classes, 2)

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs), targets, reduction="none")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


class Plain(Small):
    """No momentum, no decay."""

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)


class Nesterov(Small):
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.03)


class Dampened(Small):
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, dampening=0.4, weight_decay=0.03)


class TwoGroups(Small):
    """Biases without decay and with another rate; a frozen and a forgotten parameter."""

    def model(self):
        model = nn.Sequential(
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)
        )
        model[2].weight.requires_grad_(False)
        return model

    def optimizer(self, model):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n != "4.weight"]
        return torch.optim.SGD(
            [
                {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 0.05},
                {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0, "lr": 0.2},
            ],
            lr=0.1,
            momentum=0.9,
        )


class OneCycle(Small):
    """Learning rate and momentum move at every step."""

    scheduler_interval = "step"

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=18, cycle_momentum=True)


class Plateau(Small):
    plateau_metric = "train+validation"
    epochs = 6

    def validation_dataset(self):
        return gaussian(10, self.shape, self.classes, 5)

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


class Images(Small):
    """Convolutions with stride, padding, dilation and groups; GroupNorm; dropout."""

    shape = (2, 9, 9)
    epochs = 2

    def model(self):
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=1),
            nn.GroupNorm(3, 6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=3, dilation=2, padding="same", padding_mode="circular"),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 4, (3, 2), bias=False),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(4 * 3 * 4, 3),
        )


class Long(Small):
    """So many epochs that factors of the wide layer are folded into dense rows on the way."""

    shape = (64,)
    epochs = 31

    def model(self):
        return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 3))

    def train_dataset(self):
        return gaussian(45, self.shape, self.classes, 1)

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)


class Volumes(Small):
    shape = (1, 5, 6, 4)
    epochs = 2

    def model(self):
        return nn.Sequential(
            nn.Conv3d(1, 3, (2, 3, 2), stride=(1, 2, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3)
        )


class BatchNormed(Small):
    """BatchNorm1d and 2d in training mode: samples of a batch see each other."""

    shape = (2, 6, 6)
    epochs = 2

    def model(self):
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(64, 6),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Linear(6, 3),
        )

    def train_dataset(self):
        return gaussian(44, self.shape, self.classes, 1)


class _Sequence(nn.Module):
    """Embedding tied to the read-out, Conv1d, LayerNorm, RMSNorm, a layer used twice, 3-D Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.rms = nn.RMSNorm(6)
        self.twice = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.rms(self.twice(torch.tanh(self.twice(self.norm(x)))))
        return self.out((x * self.scale).mean(1))


class Sequences(Small):
    """Shared and functional parameters: the rules alone are not enough."""

    epochs = 2

    def model(self):
        return _Sequence()

    def _data(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 11, (count, 5), generator=generator)
        return TensorDataset(tokens, tokens.sum(1) % 11)

    def train_dataset(self):
        return self._data(45, 1)

    def test_dataset(self):
        return self._data(12, 2)


class Attention(Small):
    """MultiheadAttention uses its projections functionally, with dropout."""

    shape = (4, 6)
    epochs = 2

    def model(self):
        return _Attention()


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Augmented(Small):
    """Noise added in ``__getitem__`` and no TensorDataset: the loader's generator matters."""

    def train_dataset(self):
        return _Noisy(super().train_dataset())


class _Noisy(Dataset[Any]):
    def __init__(self, inner: TensorDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        x, y = self.inner[index]
        return x + 0.1 * torch.randn(x.shape), y


class Overlapping(Small):
    def train_dataset(self):
        self.both = gaussian(60, self.shape, self.classes, 1)
        return Subset(self.both, range(45))

    def test_dataset(self):
        return Subset(self.both, range(40, 60))


TRACEABLE = [
    Small,
    Plain,
    Nesterov,
    Dampened,
    TwoGroups,
    OneCycle,
    Plateau,
    Images,
    Long,
    Volumes,
    BatchNormed,
    Sequences,
    Attention,
    Augmented,
]
