"""Recipes that each have one mistake; all must be refused in one line, before anything is written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import torch
from hydra_pipe.workers.recipe import Recipe
from torch import nn
from torch.utils.data import IterableDataset, Subset, TensorDataset

from tests.recipes import Small, gaussian


class NotARecipe:
    pass


class Empty(Recipe):
    """Defines nothing."""


class UsesAdagrad(Small):
    def optimizer(self, model):
        return torch.optim.Adagrad(model.parameters())


class OwnSgd(Small):
    class Mine(torch.optim.SGD):
        pass

    def optimizer(self, model):
        return self.Mine(model.parameters(), lr=0.1)


class Maximizes(Small):
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)


class OptimizesNothing(Small):
    def optimizer(self, model):
        return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


class OptimizerRaises(Small):
    def optimizer(self, model):
        raise ValueError("no such group\nand a second line")


class Streams(Small):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    def train_dataset(self):
        return self.Endless()


class NoLength(Small):
    class Bare:
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(6), 0

    def train_dataset(self):
        return self.Bare()


class NoSamples(Small):
    def train_dataset(self):
        return TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))


class NoTestSamples(Small):
    def test_dataset(self):
        return TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))


class DatasetRaises(Small):
    def train_dataset(self):
        raise FileNotFoundError("there is no data.npz")


class ItemRaises(Small):
    class Broken(TensorDataset):
        def __getitem__(self, index):
            raise OSError("disk read error")

    def train_dataset(self):
        return self.Broken(torch.zeros(9, 6), torch.zeros(9, dtype=torch.int64))


class MeanLoss(Small):
    def losses(self, model, batch):
        return super().losses(model, batch).mean()


class LossPerClass(Small):
    def losses(self, model, batch):
        return model(batch[0])


class LossIsFloat(Small):
    def losses(self, model, batch):
        return 1.0


class LossRaises(Small):
    def losses(self, model, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nsecond line")


class LossDetached(Small):
    def losses(self, model, batch):
        return super().losses(model, batch).detach()


class IntegerLoss(Small):
    def losses(self, model, batch):
        return super().losses(model, batch).long()


class Shares(Small):
    """Train and test overlap."""

    def __init__(self) -> None:
        self.both = gaussian(60, self.shape, self.classes, 1)

    def train_dataset(self):
        return Subset(self.both, range(45))

    def test_dataset(self):
        return Subset(self.both, range(40, 60))


class SameObject(Small):
    def __init__(self) -> None:
        self.both = gaussian(45, self.shape, self.classes, 1)

    def train_dataset(self):
        return self.both

    def test_dataset(self):
        return self.both


class FewLabels(Small):
    def labels(self, dataset):
        return [0, 1, 2]


class NegativeLabels(Small):
    def labels(self, dataset):
        return [-1] * len(dataset)


class NamedLabels(Small):
    def labels(self, dataset):
        return ["cat"] * len(dataset)


class LabelsRaise(Small):
    def labels(self, dataset):
        raise KeyError("targets")


class CollateRaises(Small):
    def collate(self, items):
        raise ValueError("ragged")


class MaxNorm(Small):
    def model(self):
        return nn.Sequential(nn.Embedding(6, 3, max_norm=1.0), nn.Flatten(), nn.Linear(18, 3))


class Synced(Small):
    def model(self):
        return nn.Sequential(nn.Linear(6, 5), nn.SyncBatchNorm(5), nn.Linear(5, 3))


class Lazy(Small):
    def model(self):
        return nn.Sequential(nn.LazyLinear(3))


class Frozen(Small):
    def model(self):
        return super().model().requires_grad_(False)


class NoModel(Small):
    def model(self):
        return None


class ModelRaises(Small):
    def model(self):
        raise RuntimeError("no such layer")


class NoEpochs(Small):
    epochs = 0


class HalfBatch(Small):
    batch_size = 2.5


class BadInterval(Small):
    scheduler_interval = "batch"


class SchedulerRaises(Small):
    def scheduler(self, optimizer):
        raise ValueError("total_steps is missing")


class SchedulerIsNone(Small):
    def scheduler(self, optimizer):
        return 3


class ConstructorRaises(Small):
    def __init__(self, width: int = 3) -> None:
        raise ValueError(f"width {width} is odd")


class Unpicklable(Small):
    def __init__(self) -> None:
        self.lock = threading.Lock()


class NanLoss(Small):
    """Fine until a NaN input comes up."""

    def train_dataset(self):
        dataset = super().train_dataset()
        dataset.tensors[0][17] = float("nan")
        return dataset


class OtherTestShape(Small):
    def test_dataset(self):
        return gaussian(12, (7,), self.classes, 2)


class ValidationRaises(Small):
    def validation_dataset(self):
        raise ValueError("no split")


class BadName(Small):
    NAME = "../escape"


# ---------------------------------------------------------------------- found while they run


class Left(Small):
    """One sample is left over, and BatchNorm cannot normalise it."""

    def model(self):
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    def train_dataset(self):
        return gaussian(41, self.shape, self.classes, 1)


class Clipped(Small):
    clip_grad_norm = -1.0


class ConstructorExits(Small):
    def __init__(self) -> None:
        sys.exit("no")


class Lengths(Small):
    """The derivative of a norm is no number at 0, which its loss never shows."""

    zeros: tuple[int, ...] = (17, 30)
    test_zeros: tuple[int, ...] = ()

    def train_dataset(self):
        return self.emptied(super().train_dataset(), self.zeros)

    def test_dataset(self):
        return self.emptied(super().test_dataset(), self.test_zeros)

    @staticmethod
    def emptied(dataset, zeros):
        dataset.tensors[0][list(zeros)] = 0
        return dataset

    def model(self):
        return nn.Sequential(nn.Linear(6, 3, bias=False))

    def losses(self, model, batch):
        scores = model(batch[0])
        length = scores.square().sum(1).sqrt()
        return nn.functional.cross_entropy(scores, batch[1], reduction="none") + 0.1 * length


class TestLengths(Lengths):
    __test__ = False
    zeros = ()
    test_zeros = (5,)


class Calls(Small):
    """Does ``how`` at the fifth call of ``where``; the first are those of the survey."""

    def __init__(self, where: str = "losses", how: str = "KeyError", after: int = 40) -> None:
        self.where, self.how, self.after, self.calls = where, how, after, 0

    def misbehave(self, where: str) -> None:
        if where != self.where:
            return
        self.calls += 1
        if self.calls <= self.after:
            return
        if self.how == "exit":
            raise SystemExit(3)
        if self.how == "base":
            raise Halt("stop here\nand there")
        raise {"KeyError": KeyError("weight"), "ValueError": ValueError("odd")}[self.how]

    def losses(self, model, batch):
        self.misbehave("losses" if model.training else "test losses")
        return super().losses(model, batch)

    def train_dataset(self):
        return Fetched(super().train_dataset(), self, "train item")

    def test_dataset(self):
        return Fetched(super().test_dataset(), self, "test item")

    def optimizer(self, model):
        self.misbehave("optimizer")
        return super().optimizer(model)

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)

    def rate(self, epoch):
        self.misbehave("scheduler")
        return 1.0


class Halt(BaseException):
    """An exception that is no Exception."""


class Fetched:
    def __init__(self, inner, recipe, where) -> None:
        self.inner, self.recipe, self.where = inner, recipe, where
        self.targets = inner.tensors[1]

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index):
        self.recipe.misbehave(self.where)
        return self.inner[index]


class Says(Small):
    """Prints wherever it can, also past Python."""

    def losses(self, model, batch):
        print("from losses")
        return super().losses(model, batch)

    def train_dataset(self):
        print("from train_dataset")
        os.write(1, b"from the descriptor\n")
        subprocess.run(["echo", "from a child"], check=True)
        return super().train_dataset()

    def optimizer(self, model):
        sys.stdout.write("from optimizer\n")
        return super().optimizer(model)


class Constant(Small):
    """Test losses that do not depend on the weights."""

    def losses(self, model, batch):
        losses = super().losses(model, batch)
        return losses if model.training else torch.ones_like(losses) + 0 * losses


class Still(Small):
    """A learning rate of 0."""

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.0)


class Double(Small):
    """float64 data, as numpy makes them, for a float32 model."""

    def train_dataset(self):
        return self.widened(super().train_dataset())

    def test_dataset(self):
        return self.widened(super().test_dataset())

    @staticmethod
    def widened(dataset):
        return TensorDataset(dataset.tensors[0].double(), dataset.tensors[1])


class Misspelt(Small):
    epoch = 7
    sampler = None
