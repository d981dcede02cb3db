"""A tiny LightningModule with its data, and Trainers that do nothing but train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hydra_pipe import LightningCallback, open_run

N = 18
CLIPPED: dict[str, Any] = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
ALL = 1000
"""Batches that are replayed at once."""


def some(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class Net(lightning.LightningModule):
    """An MLP with dropout, AdamW and a schedule of steps, as anyone would write it."""

    dropout = 0.3

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.03, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


class Still(Net):
    """Without dropout, whose masks differ with and without a record."""

    dropout = 0.0


def trainer(**given: Any) -> lightning.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return lightning.Trainer(**{**quiet, **given})


def loader(seed: int = 5, **given: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(some(N, 1), **{"batch_size": 4, "shuffle": True, "generator": generator, **given})


def net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(3)
    return kind()


def trained(
    folder: Path, model: Net, loaded: Any = None, *, callbacks: Any = (), **given: Any
) -> LightningCallback:
    """A training with a record, all of it replayed at once."""
    told = {name: given.pop(name) for name in ("test_dataset", "losses", "seed") if name in given}
    said = {"losses": Net.losses, "test_dataset": some(3, 2), "check": ALL, **told}
    hydra = LightningCallback(out=folder / "run", **said)
    made = trainer(callbacks=[*callbacks, hydra], **given)
    made.fit(model, loader() if loaded is None else loaded)
    return hydra


def record_of(folder: Path) -> Any:
    return open_run(str(folder / "run")).trajectory()


def last_weights(folder: Path) -> Any:
    record = record_of(folder)
    return record.checkpoint(len(record.checkpoint_steps) - 1).weights


def weights_of(model: Net) -> Any:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
