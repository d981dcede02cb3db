"""Trainings that people really run and that rules tried once, on a few samples, get wrong.

Each stands for a kind: gradients that are zero at first, parameters that few samples use, losses in which
samples see each other, rare draws, layers that keep a state, updates that are no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from tests.recipes import Small, gaussian


class Odd(Small):
    """Plain SGD on few samples: the base of the others."""

    epochs, batch_size = 2, 8
    count = 24
    rate, momentum = 0.1, 0.0

    def train_dataset(self):
        return gaussian(self.count, self.shape, self.classes, 1)

    def test_dataset(self):
        return gaussian(5, self.shape, self.classes, 2)

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.rate, momentum=self.momentum)


class _Adapter(nn.Module):
    """``W x + B (A x)`` with W frozen and B = 0 at first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, inputs) * 0.5)
        self.B = nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x):
        return self.base(x) + (x @ self.A.T) @ self.B.T


class Adapters(Odd):
    def model(self):
        return nn.Sequential(_Adapter(6, 8), nn.Tanh(), _Adapter(8, 3))


class _Attended(nn.Module):
    def __init__(self, *, gate: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.gate = nn.Parameter(torch.zeros(())) if gate else 1.0
        self.head = nn.Linear(6, 3)
        if not gate:
            nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head((x + self.gate * self.attention(x, x, x)[0]).mean(1))


class ZeroHead(Odd):
    shape, epochs = (5, 6), 3

    def model(self):
        return _Attended(gate=False)


class ZeroGate(ZeroHead):
    def model(self):
        return _Attended(gate=True)


class _Recurrent(nn.Module):
    def __init__(self, *, zero: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)
        if zero:
            nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class ZeroRecurrent(ZeroHead):
    rate, epochs = 0.5, 4

    def model(self):
        return _Recurrent(zero=True)


class Recurrent(ZeroHead):
    def model(self):
        return _Recurrent(zero=False)


class _RareRow(nn.Module):
    """A matrix and a row of a table that one sample alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4)
        self.rare = nn.Linear(4, 4, bias=False)
        self.out = nn.Linear(4, 3)

    def forward(self, tokens):
        h = self.table(tokens).mean(1)
        special = (tokens == 11).any(1)
        return self.out(torch.where(special.unsqueeze(1), torch.tanh(h @ self.rare.weight), h))


class RareRow(Odd):
    count = 40

    def model(self):
        return _RareRow()

    def train_dataset(self):
        tokens = torch.randint(0, 11, (self.count, 3), generator=torch.Generator().manual_seed(1))
        tokens[33, 0] = 11
        return TensorDataset(tokens, tokens.sum(1) % 3)

    def test_dataset(self):
        tokens = torch.randint(0, 12, (70, 3), generator=torch.Generator().manual_seed(2))
        tokens[:69] = tokens[:69].clamp(max=10)
        tokens[69, 0] = 11
        return TensorDataset(tokens, tokens.sum(1) % 3)


class _Experts(nn.Module):
    """Top-1 of two experts; the router starts at zero, so that all go to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 2, bias=False)
        nn.init.zeros_(self.router.weight)
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        share = self.router(x).softmax(1)
        choice = share.argmax(1)
        h = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            here = choice == k
            h[here] = expert(x[here]) * share[here, k : k + 1]
        return self.out(torch.tanh(h))


class Experts(Odd):
    rate, epochs = 0.5, 4

    def model(self):
        return _Experts()


class _Scaled(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6))
        self.drop = drop

    def forward(self, x):
        h = self.scale * torch.tanh(self.fc(x))
        if self.training and self.drop:
            h = h * x.new_empty(len(x), 1).bernoulli_(1 - self.drop) / (1 - self.drop)
        return self.out(x + h)


class Mining(Odd):
    """Only the hardest half of a batch counts, and at least 8."""

    batch_size, count = 16, 48

    def model(self):
        return _Scaled()

    def losses(self, model, batch):
        ce = super().losses(model, batch)
        if not model.training:
            return ce
        k = max(min(8, len(ce)), len(ce) // 2)
        least = torch.topk(ce.detach(), k).values[-1]
        return torch.where(ce >= least, ce * len(ce) / k, torch.zeros_like(ce))


class Weighted(Mining):
    """Weights normalised over the batch, in training and in testing."""

    def losses(self, model, batch):
        weight = 1.0 + batch[1].double()
        return Small.losses(self, model, batch) * weight / weight.mean()


class Negatives(Mining):
    """The other samples of a batch are a sample's negatives."""

    def losses(self, model, batch):
        z = F.normalize(model(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T * 4, torch.arange(len(z)), reduction="none") + Small.losses(
            self, model, batch
        )


class RareDrop(Odd):
    """Stochastic depth at a rate that most batches never see."""

    batch_size, count, epochs = 16, 128, 4

    def model(self):
        return _Scaled(drop=0.02)


class _Stateful(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first: nn.Module = nn.Linear(6, 8)
        if kind == "spectral":
            self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
        self.norm = nn.BatchNorm1d(8)
        self.instance = nn.InstanceNorm1d(1, track_running_stats=True)
        self.register_buffer("center", torch.zeros(8))
        self.scale = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(self.first(x))
        if self.kind == "instance":
            h = self.instance(h.unsqueeze(1)).squeeze(1)
        if self.kind == "center" and self.training:
            self.center = 0.9 * self.center + 0.1 * h.detach().mean(0)
        return self.out(self.scale * torch.tanh(h - self.center))


class Stateful(Odd):
    """BatchNorm beside layers that keep a state of their own."""

    def __init__(self, kind: str = "spectral") -> None:
        self.kind = kind

    def arguments(self):
        return {"kind": self.kind}

    def model(self):
        return _Stateful(self.kind)


class Spectral(Odd):
    """A power iteration beside a parameter without a layer: two passes, one state."""

    def model(self):
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), _Scaled())


class _Rounded(torch.autograd.Function):
    """Rounding whose backward pass is the identity: a field that hides what it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x * 8) / 8

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


class Field(Odd):
    """Updates that are not the gradient of their loss, by kind."""

    epochs, rate, momentum, batch_size, count = 3, 0.3, 0.5, 4, 16

    def __init__(self, kind: str = "focal") -> None:
        self.kind = kind

    def arguments(self):
        return {"kind": self.kind}

    def test_dataset(self):
        return gaussian(4, self.shape, self.classes, 2)

    def model(self):
        first: nn.Module = nn.Linear(6, 4)
        if self.kind == "weight_norm":
            first = nn.utils.parametrizations.weight_norm(first)
        return nn.ModuleDict(
            {"f": nn.Sequential(first, nn.Tanh()), "p": nn.Linear(4, 3), "q": nn.Linear(4, 3)}
        )

    def losses(self, model, batch):
        inputs, targets = batch
        z = model["f"](inputs)
        if self.kind == "rounded":
            z = z + (torch.round(z * 8) / 8 - z).detach()
        if self.kind == "hidden":
            z = _Rounded.apply(z)
        ce = F.cross_entropy(model["p"](z), targets, reduction="none")
        zero = 0 * model["q"](z).sum(1)
        if not model.training or self.kind in ("weight_norm", "rounded", "hidden"):
            return ce + zero
        if self.kind == "focal":
            return (1 - torch.exp(-ce)).detach() ** 2 * ce + zero
        if self.kind == "data":
            return ce + ((model["q"](z) - model["p"](z).data) ** 2).mean(1)
        if self.kind == "no_grad":
            with torch.no_grad():
                aim = model["p"](z).softmax(1) * 2
            return ce + ((model["q"](z) - aim) ** 2).mean(1)
        return ce + ((model["q"](z) - model["p"](z).detach()) ** 2).mean(1)


SIMPLE = [
    Adapters,
    ZeroHead,
    ZeroGate,
    ZeroRecurrent,
    RareRow,
    Experts,
    Mining,
    Weighted,
    Negatives,
    RareDrop,
    Spectral,
]
"""Those that the fast form must get right, held against the oracle."""
