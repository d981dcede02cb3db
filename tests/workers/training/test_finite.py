"""Which step and which samples a number that is none comes from."""

from __future__ import annotations

import pytest
import torch
from hydra_pipe.storage.errors import NonFiniteTangents
from hydra_pipe.workers.training.finite import check_gradients, finite
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn

from tests.recipes import Small, gaussian


class Roots(Small):
    """sqrt of a score that is 0 for chosen samples: the loss is finite, its gradient is not."""

    zeros: tuple[int, ...] = (3,)
    batch_size = 45

    def model(self):
        return nn.Sequential(nn.Linear(6, 3, bias=False))

    def train_dataset(self):
        dataset = gaussian(45, self.shape, self.classes, 1)
        dataset.tensors[0][list(self.zeros)] = 0
        return dataset

    def losses(self, model, batch):
        return model(batch[0]).square().sum(1).sqrt()


class NormedRoots(Roots):
    """Neither can BatchNorm train on one sample."""

    def model(self):
        return nn.ModuleList([nn.BatchNorm1d(6, affine=False), *super().model()])

    def losses(self, model, batch):
        return super().losses(model[1], batch) + model[0](batch[0]).mean(1)


class Huge(Roots):
    """Gradients whose norm overflows are still finite."""

    zeros = ()

    def losses(self, model, batch):
        return super().losses(model, batch) * 1e37


def stepped(recipe: Roots, *, guarded: bool = True, step: int = 0) -> Training:
    training = Training(recipe, Compute(device="cpu"))
    training.guarded = guarded
    training.step(step, next(training.loader(step, step + 1)))
    return training


@pytest.mark.parametrize("zeros", [(3,), (3, 4, 40), tuple(range(20))])
def test_the_samples_that_have_no_gradient_are_named(zeros):
    recipe = Roots()
    recipe.zeros = zeros
    with pytest.raises(NonFiniteTangents) as caught:
        stepped(recipe, step=1)
    message = str(caught.value)
    assert "parameter '0.weight' is not finite at step 1 of 3" in message
    order = Training(recipe, Compute(device="cpu")).batches[1].tolist()
    named = message.split("that of train_index ")[1].split(" alone")[0].removesuffix(", …")
    assert [int(i) for i in named.split(", ")] == [i for i in order if i in zeros][:8]


def test_samples_are_found_where_none_can_train_alone():
    with pytest.raises(NonFiniteTangents, match=r"that of train_index 3 alone is not"):
        stepped(NormedRoots())


def test_where_nobody_asked_nothing_is_looked_at():
    training = stepped(Roots(), guarded=False)
    assert not finite(training.parameters)


def test_a_loss_that_is_not_finite_is_not_ours_to_name():
    training = stepped(Roots(), guarded=False)
    check_gradients(training, 0, next(training.loader(0, 1)), torch.tensor(float("nan")))


def test_large_gradients_are_finite():
    stepped(Huge())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_sees_one_number(bad):
    tensors = [torch.zeros(3), torch.zeros(2, 2), torch.full((2,), 3e38)]
    assert finite(tensors)
    assert finite([])
    tensors[1][1, 0] = bad
    assert not finite(tensors)
