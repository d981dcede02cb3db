"""A small language model: two layers of attention over the characters of Python's own documentation.

    hydra-pipe run benchmarks/small_transformer.py:SmallTransformer --hessian exact --mode adjoint --out runs/text
    hydra-pipe evaluate runs/text benchmarks/small_transformer.py:SmallTransformer --subsets 60 --fractions 0.5,0.9

256 sequences of 32 characters, 96 steps of 16 by AdamW with warm-up and cosine, clipped to norm 0.35; a sample is a sequence, its loss the mean
over its characters. The text is that of the interpreter's ``help()`` (module ``pydoc_data.topics``), so that figures belong
to a version of Python.
"""

from __future__ import annotations

import math
import string

import numpy as np
import torch
import torch.nn.functional as F
from hydra_pipe.workers.recipe import Batch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hydra_pipe import Recipe

LETTERS = string.ascii_lowercase + " .,()'=_"
LENGTH = 32


def pages() -> np.ndarray:
    """Return the text as rows of LENGTH + 1 characters, (sequences, LENGTH + 1) int64; what is no letter is the last kind."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics)).lower()
    code = {letter: k for k, letter in enumerate(LETTERS)}
    found = np.array([code.get(letter, len(LETTERS)) for letter in text])
    rows = len(found) // (LENGTH + 1)
    return found[: rows * (LENGTH + 1)].reshape(rows, LENGTH + 1)


class Layer(nn.Module):
    """Attention to what came before, then two linear layers, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return the layer's output, (B, L, width)."""
        parts = self.attend(self.before(x_BLC)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x_BLC = x_BLC + self.project(seen)
        return x_BLC + self.narrow(F.gelu(self.wide(self.between(x_BLC))))


class Characters(nn.Module):
    """The next character's logits at every place, (B, L) to (B, L, kinds)."""

    def __init__(self, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.kind, self.place = nn.Embedding(len(LETTERS) + 1, width), nn.Embedding(LENGTH, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.last, self.logits = nn.LayerNorm(width), nn.Linear(width, len(LETTERS) + 1)

    def forward(self, text_BL: Tensor) -> Tensor:
        """Return the logits."""
        places = torch.arange(text_BL.shape[1], device=text_BL.device).expand_as(text_BL)
        return self.logits(self.last(self.layers(self.kind(text_BL) + self.place(places))))


class SmallTransformer(Recipe):
    """The language model and its text."""

    NAME = "small-transformer"

    epochs = 6
    batch_size = 16
    seed = 0
    lr = 5e-3
    weight_decay = 1e-2
    clip_grad_norm = 0.35
    scheduler_interval = "step"

    def __init__(self, *, train_size: int = 256, test_size: int = 32, seed: int = 0, epochs: int = 6) -> None:
        """Take the sizes."""
        self.train_size, self.test_size, self.seed, self.epochs = train_size, test_size, seed, epochs

    def model(self) -> nn.Module:
        """Return the network."""
        return Characters()

    def _rows(self, first: int, count: int) -> TensorDataset:
        every = pages()
        order = np.random.default_rng(0).permutation(len(every))
        chosen = torch.from_numpy(every[order[first : first + count]])
        return TensorDataset(chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous())

    def train_dataset(self) -> TensorDataset:
        """Return sequences and, for each place, the character that follows."""
        return self._rows(0, self.train_size)

    def test_dataset(self) -> TensorDataset:
        """Return others of the same text."""
        return self._rows(self.train_size, self.test_size)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each sequence's mean cross-entropy, (B,)."""
        text, follows = batch
        return F.cross_entropy(model(text).transpose(1, 2), follows, reduction="none").mean(1)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Return a warm-up over a tenth of the steps and a cosine to zero, moved after every step."""
        steps = self.epochs * math.ceil(self.train_size / self.batch_size)
        warm = max(1, steps // 10)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
