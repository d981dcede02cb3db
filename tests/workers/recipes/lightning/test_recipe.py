"""A recipe of a LightningModule: its own training, and what only a Trainer can follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")

from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.training.training import Compute, Training

from hydra_pipe import LightningRecipe
from tests.tiny_lightning import N, Net, net, some


class Mine(LightningRecipe):
    epochs, batch_size, accumulate, clip_grad_norm = 2, 4, 2, 0.5

    def __init__(self, module=Net, **given):
        both = {
            "train_dataset": some(N, 1),
            "test_dataset": lambda: some(3, 2),
            "losses": Net.losses,
            **given,
        }
        super().__init__(module=module, **both)


def test_it_trains_as_the_module_says():
    training = Training(Mine(), Compute())
    assert isinstance(training.optimizer, torch.optim.AdamW)
    recipe = training.recipe
    assert recipe.scheduler_interval == "step"
    scheduler = recipe.scheduler(training.optimizer)
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)
    assert scheduler.optimizer is training.optimizer
    for step, batch in enumerate(training.loader(0, 2)):
        training.step(step, batch)
    assert np.isfinite(training.own_losses.numpy()).all()
    assert recipe.arguments() == {"precision": "32-true"}


def test_a_module_that_is_given_is_copied():
    given = net()
    recipe = Mine(module=given)
    torch.nn.init.zeros_(given.layers[0].weight)
    assert recipe.model().layers[0].weight.abs().max() > 0
    assert recipe.model() is not recipe.model()


def test_losses_are_under_autocast_where_the_precision_says_so():
    batch = some(3, 2)[:]
    module = net().eval()
    plain, low = (Mine(module, precision=p).losses(module, batch) for p in ("32", "bf16-mixed"))
    assert 0 < float((plain - low).abs().max()) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low, module.losses(batch))
    for recipe in (Mine(module), Mine(module, precision="bf16-mixed")):
        assert recipe.predictions(module, batch).shape == (3,)
        assert recipe.sample_targets(module, batch)[1].shape == (3,)


def test_losses_of_torch_take_pairs():
    module, batch = net().eval(), some(3, 2)[:]
    own = Mine(module).losses(module, batch)
    assert torch.equal(own, Mine(module, losses=F.cross_entropy).losses(module, batch))
    targets = torch.randn(3, 3)
    squares = Mine(module, losses=F.mse_loss).losses(module, (batch[0], targets))
    assert torch.allclose(squares, (module(batch[0]) - targets).square().mean(1))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


def both(model, say):
    optimizer = sgd(model)
    return say(optimizer, step_lr(optimizer))


@pytest.mark.parametrize(
    ("say", "interval"),
    [
        (lambda o, s: o, None),
        (lambda o, s: [o], None),
        (lambda o, s: {"optimizer": o}, None),
        (lambda o, s: ([o], [s]), "epoch"),
        (lambda o, s: [{"optimizer": o, "lr_scheduler": s}], "epoch"),
        (lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step"}}, "step"),
    ],
)
def test_forms_of_configure_optimizers(say, interval):
    recipe = Mine(made_with(lambda model: both(model, say)))
    scheduler = recipe.scheduler(recipe.optimizer(recipe.model()))
    assert (scheduler is not None) == (interval is not None)
    assert recipe.scheduler_interval == (interval or "epoch")


def made_with(configure):
    module = net()
    kind = type("Other", (Net,), {"configure_optimizers": configure})
    module.__class__ = kind
    return module


def plateau(model):
    optimizer = sgd(model)
    watching = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return {"optimizer": optimizer, "lr_scheduler": watching, "monitor": "val_loss"}


@pytest.mark.parametrize(
    ("configure", "told"),
    [
        (lambda model: [sgd(model), sgd(model)], "returned SGD, SGD; one optimizer is followed"),
        (lambda model: None, "returned NoneType; one optimizer is followed"),
        (plateau, "moves ReduceLROnPlateau by monitor, which only a Trainer follows"),
        (
            lambda model: both(model, lambda o, s: ([o], [{"scheduler": s, "frequency": 2}])),
            "moves StepLR by frequency, which only a Trainer follows",
        ),
        (lambda model: both(model, lambda o, s: ([o], [s, s])), "returned 2 schedules"),
        (lambda model: model.trainer.estimated_stepping_batches, "asks its Trainer, and a recipe has none"),
    ],
)
def test_what_only_a_trainer_follows_is_refused(configure, told):
    recipe = Mine(made_with(configure))
    with pytest.raises(RecipeError, match=told):
        recipe.optimizer(recipe.model())


def test_another_error_of_configure_optimizers_is_the_modules_own():
    def broken(model):
        raise RuntimeError("no such file")

    recipe = Mine(made_with(broken))
    with pytest.raises(RuntimeError, match="no such file"):
        recipe.optimizer(recipe.model())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"precision": "16-mixed"}, "precision is '16-mixed'; use one of 32-true, 64-true, bf16-mixed"),
        ({"losses": "cross_entropy"}, r"losses is a str; give a function of \(module, batch\)"),
    ],
)
def test_arguments_that_are_wrong(given, told):
    with pytest.raises(RecipeError, match=told):
        Mine(**given)


def test_a_function_that_gives_no_module():
    with pytest.raises(RecipeError, match=r"module\(\) returned int"):
        Mine(lambda: 3).model()
