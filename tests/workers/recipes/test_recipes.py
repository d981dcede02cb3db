"""The built-in recipes: options, label noise, schedules, and that digits learns."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.recipes import BUILT_IN, names
from hydra_pipe.workers.recipes.cifar10 import Cifar10
from hydra_pipe.workers.recipes.densenet import DenseNet40
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.recipes.lenet import LeNet5
from hydra_pipe.workers.recipes.loading import load_recipe
from hydra_pipe.workers.recipes.mnist import FashionMnist, Mnist
from hydra_pipe.workers.recipes.mobilenet import MobileNetV2
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau

ALL = [Digits, Mnist, FashionMnist, Cifar10]


def test_names_need_no_torch():
    script = (
        "import sys, hydra_pipe.workers.recipes as r; print(r.names()); "
        "heavy = {'torch', 'sklearn', 'numpy', 'ray'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert names() == ["digits", "mnist", "fashion-mnist", "cifar10"]


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_every_built_in_loads_and_carries_its_name(name):
    recipe = load_recipe(name, {})
    assert isinstance(recipe, Recipe)
    assert recipe.name == name


@pytest.mark.parametrize(
    ("recipe", "epochs", "batch_size", "lr", "weight_decay"),
    [
        (Digits(), 20, 64, 0.05, 5e-4),
        (Mnist(), 20, 64, 0.01, 2e-5),
        (FashionMnist(), 20, 64, 0.01, 2e-5),
        (Cifar10(), 150, 64, 0.1, 2.5e-5),
    ],
    ids=names(),
)
def test_settings_of_the_paper(recipe, epochs, batch_size, lr, weight_decay):
    optimizer = recipe.optimizer(torch.nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.SGD
    group = optimizer.param_groups[0]
    assert (recipe.epochs, recipe.batch_size) == (epochs, batch_size)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (lr, 0.9, weight_decay)


def test_mnist_rate_falls_after_five_epochs():
    recipe = Mnist()
    optimizer = recipe.optimizer(torch.nn.Linear(2, 2))
    scheduler = recipe.scheduler(optimizer)
    assert isinstance(scheduler, MultiStepLR)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.01] * 5 + [0.001] * 15)


@pytest.mark.parametrize(("recipe", "factor"), [(FashionMnist(), 0.5), (Cifar10(), 0.1)])
def test_plateau_schedules(recipe, factor):
    optimizer = recipe.optimizer(torch.nn.Linear(2, 2))
    scheduler = recipe.scheduler(optimizer)
    assert isinstance(scheduler, ReduceLROnPlateau)
    assert recipe.plateau_metric == "train+validation"
    before = optimizer.param_groups[0]["lr"]
    rates = []
    for metric in (1.0, 0.99995, 0.99992, 0.99991, 0.9):  # none falls by 0.01% of 1 until the last
        scheduler.step(metric)
        rates.append(optimizer.param_groups[0]["lr"] / before)
    assert rates == pytest.approx([1, 1, 1, factor, factor])


def test_models():
    assert isinstance(Mnist().model(), LeNet5)
    assert isinstance(FashionMnist().model(), LeNet5)
    assert isinstance(Cifar10().model(), DenseNet40)
    assert isinstance(Cifar10(model="mobilenetv2").model(), MobileNetV2)


@pytest.mark.parametrize("recipe_class", ALL)
def test_options_are_attributes_arguments_and_survive_pickling(recipe_class):
    given = {
        "label_noise": 0.25,
        "noise_kind": "permuted",
        "noise_seed": 3,
        "train_size": 100,
        "test_size": 10,
        "lr": 1,
        "momentum": 0.5,
        "weight_decay": 0,
        "epochs": 2,
        "batch_size": 7,
        "seed": 9,
    }
    recipe = pickle.loads(pickle.dumps(recipe_class(**given)))
    assert recipe.arguments() == given
    assert {name: getattr(recipe, name) for name in given} == given
    assert json.loads(json.dumps(recipe.arguments())) == given
    assert type(recipe)(**recipe.arguments()).arguments() == given
    assert recipe_class().arguments() == {}


def test_cifar_arguments():
    recipe = Cifar10(model="mobilenetv2", augment=True)
    assert recipe.arguments() == {"model": "mobilenetv2", "augment": True}


def test_attributes_set_later_count():
    recipe = Digits()
    recipe.epochs, recipe.batch_size, recipe.seed = 3, 10, 4
    assert recipe.arguments() == {"epochs": 3, "batch_size": 10, "seed": 4}
    assert Digits().epochs == 20


def test_relative_data_directory_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Mnist(data_dir="files").data_dir == str(tmp_path / "files")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("label_noise", 1.5, "at least 0 and at most 1"),
        ("label_noise", -0.1, "at least 0 and at most 1"),
        ("label_noise", "half", "must be a number"),
        ("label_noise", float("nan"), "must be a number"),
        ("label_noise", True, "must be a number"),
        ("noise_kind", "permute", "did you mean permuted?"),
        ("noise_kind", 1, "one of uniform, permuted"),
        ("noise_seed", -1, "from 0 to 4294967295: set noise_seed=0"),
        ("train_size", 0, "at least 1"),
        ("train_size", 2.5, "must be a whole number"),
        ("test_size", -3, "at least 1"),
        ("lr", 0, "above 0"),
        ("momentum", 1, "below 1"),
        ("weight_decay", -1, "at least 0"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("seed", "0", "must be a whole number"),
        ("data_dir", 5, "path of a directory"),
    ],
)
def test_wrong_values_name_value_and_limit(option, value, words):
    with pytest.raises(RecipeError) as caught:
        Mnist(**{option: value})
    message = str(caught.value)
    assert message.startswith(f"{option} is {value!r}, but must be")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(("option", "value"), [("model", "mobilenet"), ("augment", "yes"), ("augment", 1)])
def test_wrong_values_of_cifar(option, value):
    with pytest.raises(RecipeError, match=f"{option} is {value!r}"):
        Cifar10(**{option: value})


def test_digits_have_no_directory():
    with pytest.raises(RecipeError, match="leave data_dir out"):
        Digits(data_dir="here")


def test_sizes_take_the_first_of_the_split():
    whole, part = Digits(), Digits(train_size=50, test_size=20)
    assert torch.equal(part.train_dataset().source_index, whole.train_dataset().source_index[:50])
    assert torch.equal(part.test_dataset().source_index, whole.test_dataset().source_index[:20])
    with pytest.raises(RecipeError, match="train_size is 1438, but there are 1437 samples"):
        Digits(train_size=1438).train_dataset()
    with pytest.raises(RecipeError, match="test_size is 361, but there are 360 samples"):
        Digits(test_size=361).test_dataset()


def test_asymmetric_noise_needs_classes_that_are_mistaken_for_each_other():
    with pytest.raises(
        RecipeError, match="digits says of no class what it is mistaken for; use 'uniform' or"
    ):
        Digits(noise_kind="asymmetric")
    assert FashionMnist(noise_kind="asymmetric").LOOK_ALIKES[7] == 9
    assert Cifar10(noise_kind="asymmetric").LOOK_ALIKES[9] == 1


@pytest.mark.parametrize("kind", ["uniform", "permuted"])
def test_noisy_labels_say_what_was_changed(kind):
    recipe, clean = Digits(label_noise=0.1, noise_kind=kind), Digits().train_dataset()
    noisy = recipe.train_dataset()
    indices, originals = recipe.noisy_labels(noisy)
    assert torch.equal(noisy.tensors[0], clean.tensors[0])
    assert np.array_equal(indices, np.flatnonzero(noisy.targets != clean.targets))
    assert np.array_equal(originals, clean.targets[indices])
    assert len(indices) == 144 if kind == "uniform" else 110 < len(indices) < 144
    assert recipe.labels(noisy) == noisy.targets.tolist()
    assert [int(noisy[i][1]) for i in indices] == noisy.targets[indices].tolist()
    assert torch.equal(recipe.test_dataset().targets, Digits().test_dataset().targets)
    assert recipe.noisy_labels(recipe.test_dataset()) is None


def test_without_noise_nothing_is_noisy():
    recipe = Digits()
    assert recipe.noisy_labels(recipe.train_dataset()) is None
    assert recipe.noisy_labels(object()) is None


def test_digits_learn():
    """A plain loop over 20 epochs gets at least 97% of the test samples right."""
    recipe = Digits()
    torch.manual_seed(recipe.seed)
    model = recipe.model()
    optimizer = recipe.optimizer(model)
    images, targets = recipe.train_dataset().tensors
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(images)).split(recipe.batch_size):
            optimizer.zero_grad()
            losses = recipe.losses(model, (images[chosen], targets[chosen]))
            assert losses.shape == (len(chosen),)
            losses.mean().backward()
            optimizer.step()
    test = recipe.test_dataset()
    right = recipe.predictions(model, test.tensors) == test.targets
    assert right.float().mean() >= 0.97
