"""Recipes for tests that interrupt: pauses that change no bit, and data that lies in a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from tests.recipes import Small


class Paused(Small):
    """``Small`` with a pause in every pass, so that a signal finds it at work."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def losses(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(self.pause)
        return super().losses(model, batch)


class FromFile(Small):
    """``Small`` with inputs from ``data.npy``, which somebody may change."""

    def __init__(self, path: str) -> None:
        self.path = path

    @staticmethod
    def write(path: Path) -> None:
        np.save(path, Small().train_dataset().tensors[0].numpy())

    def train_dataset(self) -> TensorDataset:
        inputs = torch.from_numpy(np.load(self.path))
        return TensorDataset(inputs, super().train_dataset().tensors[1])


class Wide(Small):
    """Enough parameters that hypergradients are what fills a disk."""

    epochs = 2

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(6, 300), torch.nn.Tanh(), torch.nn.Linear(300, 3))
