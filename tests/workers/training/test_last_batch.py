"""A last batch that the model cannot train on is refused before anything runs."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.model.state import pack_buffers
from hydra_pipe.workers.training.last_batch import check_last_batch
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn

from tests.recipes import Small, gaussian


class Odd(Small):
    """33 samples in batches of 8: one is left over."""

    def train_dataset(self):
        return gaussian(33, self.shape, self.classes, 1)


class Normed(Odd):
    def model(self):
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


class NormedPlanes(Odd):
    """BatchNorm over planes of several pixels has enough values in one sample."""

    shape = (2, 4, 4)

    def model(self):
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))


class NormedPoints(NormedPlanes):
    """BatchNorm over planes of one pixel has not."""

    def model(self):
        return nn.Sequential(nn.Conv2d(2, 3, 4), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 3))


class Grouped(Odd):
    """GroupNorm with one channel a group: torch counts the batch, too."""

    def model(self):
        return nn.Sequential(nn.Linear(6, 5), nn.GroupNorm(5, 5), nn.Linear(5, 3))


class Functional(Odd):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.out(F.batch_norm(self.inner(x), None, None, training=self.training))

    def model(self):
        return self.Net()


class Evaluated(Normed):
    """Its BatchNorm never trains."""

    def model(self):
        class Net(nn.Sequential):
            def train(self, mode=True):
                super().train(mode)
                self[1].eval()
                return self

        return Net(*super().model())


class Tripled(Normed):
    """Three views of each sample: one sample is three values."""

    def losses(self, model, batch):
        x, y = batch
        scores = model(torch.cat([x, x + 1, x + 2])).view(3, len(x), -1).mean(0)
        return F.cross_entropy(scores, y, reduction="none")


class Squeezes(Odd):
    def losses(self, model, batch):
        return super().losses(model, batch).squeeze()


class Penalised(Odd):
    """Differentiates inside its losses while it trains."""

    def losses(self, model, batch):
        x, y = batch
        x = x.requires_grad_(model.training)
        losses = F.cross_entropy(model(x), y, reduction="none")
        if not model.training:
            return losses
        return losses + torch.autograd.grad(losses.sum(), x, create_graph=True)[0].square().sum(1)


class Ragged(Odd):
    """Its losses cannot do with fewer than two samples."""

    def losses(self, model, batch):
        if len(batch[0]) < 2 and model.training:
            raise RuntimeError("contrast needs two")
        return super().losses(model, batch)


def training(recipe, **compute):
    return Training(recipe, Compute(device="cpu", **compute))


@pytest.mark.parametrize(
    ("recipe", "layer"),
    [
        (Normed, r"layer '1' \(BatchNorm1d\)"),
        (NormedPoints, r"layer '1' \(BatchNorm2d\)"),
        (Grouped, r"layer '1' \(GroupNorm\)"),
        (Functional, r"layer"),
    ],
)
def test_one_sample_left_over_is_refused(recipe, layer):
    with pytest.raises(RecipeError) as caught:
        check_last_batch(training(recipe()))
    message = str(caught.value)
    assert "holds 1 of 33 samples (N mod batch_size = 33 mod 8)" in message
    assert "use another batch_size, such as 7, or drop a sample" in message
    assert re.search(layer, message)


@pytest.mark.parametrize("recipe", [Odd, NormedPlanes, Evaluated, Tripled, Penalised])
def test_what_can_train_on_one_sample_is_not_refused(recipe):
    check_last_batch(training(recipe()))


@pytest.mark.parametrize("size", [7, 9, 11, 33, 64])
def test_other_batch_sizes_are_not_refused(size):
    recipe = Normed()
    recipe.batch_size = size
    check_last_batch(training(recipe))


def test_batches_of_one_are_refused():
    recipe = Normed()
    recipe.batch_size = 1
    with pytest.raises(RecipeError, match=r"33 mod 1.*such as 3,"):
        check_last_batch(training(recipe))


def test_losses_that_squeeze_the_batch_away_are_refused():
    with pytest.raises(RecipeError, match=r"losses\(\) returned \(\) and must return shape \(1,\)"):
        check_last_batch(training(Squeezes()))


def test_what_else_the_last_batch_raises_is_said():
    with pytest.raises(
        RecipeError, match=r"33 mod 8\) and failed: RuntimeError: contrast needs two in losses"
    ):
        check_last_batch(training(Ragged()))


def test_buffers_and_generators_stay():
    made = training(NormedPlanes())
    before, state = pack_buffers(made.model), torch.get_rng_state()
    check_last_batch(made)
    assert pack_buffers(made.model) == before
    assert torch.equal(torch.get_rng_state(), state)
