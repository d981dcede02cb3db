"""Names on a recipe that are likely mistakes are said."""

from __future__ import annotations

from functools import cached_property

import pytest
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.recipes import names
from hydra_pipe.workers.recipes.loading import load_recipe
from hydra_pipe.workers.training.recipe_names import unknown_names
from hydra_pipe.workers.training.validate import check_numbers

from tests.recipes import TRACEABLE, Small


def weigh(recipe):
    return recipe.sample_weights


class Mistaken(Small):
    epoch = 3
    batchSize = 4
    sampler = None
    gradient_clip_val = 0.5
    n_epochs = 10

    def __init__(self):
        self.collate_fn = list

    def scedhuler(self, optimizer):
        return None

    def training_step(self, batch):
        return self.criterion(batch)  # reads it, though nothing calls this

    criterion = None


class Own(Small):
    """The same names, read by its own code; and names that are like none."""

    lr, width, hidden_units = 0.1, 4, [1]
    epoch = 3
    sampler = "uniform"
    gradient_clip_val = 0.5
    sample_weights = None
    show = None

    def __init__(self):
        self.n_epochs = 4

    @cached_property
    def criterion(self):
        return self.gradient_clip_val

    @property
    def precision(self):
        return self.epoch

    def loss(self, x):
        return (self.criterion, self.precision, x)

    def losses(self, model, batch):
        self.loss([n for n in [self.n_epochs] if n])
        getattr(self, "sampler", None)
        return super().losses(model, batch)

    def _private(self):
        return None

    batch_sized = property(lambda self: self.batch_sized)


class Inherits(Own):
    """Read by the class it inherits from."""

    epoch = 5


def test_likely_mistakes_are_said_with_what_to_do():
    said = {line.split("'")[3]: line for line in unknown_names(Mistaken())}
    hints = {
        "epoch": "did you mean epochs?",
        "batchSize": "did you mean batch_size?",
        "sampler": "say order(epoch, generator)",
        "gradient_clip_val": "say clip_grad_norm",
        "n_epochs": "say epochs",
        "collate_fn": r"say collate(items)",
        "scedhuler": "did you mean scheduler?",
        "training_step": "say losses(model, batch)",
    }
    assert said.keys() == hints.keys()
    for name, hint in hints.items():
        assert hint in said[name]
        assert said[name].startswith("recipe 'mistaken' has ")


@pytest.mark.parametrize("recipe", [Own, Inherits, *TRACEABLE], ids=lambda kind: kind.__name__)
def test_what_the_recipe_reads_is_its_own(recipe):
    assert unknown_names(recipe()) == []


@pytest.mark.parametrize("name", names())
def test_built_in_recipes_have_no_unknown_names(name):
    assert unknown_names(load_recipe(name, {})) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_grad_norm", 1.0),
        ("accumulate", 4),
        ("max_steps", 10),
        ("order", lambda self, epoch, generator: [0]),
        ("show", lambda self, item: item),
    ],
)
def test_names_of_ours_are_no_mistakes(name, value):
    recipe = type("Ours", (Small,), {name: value})()
    check_numbers(recipe)
    assert unknown_names(recipe) == []


def test_a_missing_method_is_looked_for_under_other_names():
    class Lossy(Small):
        losses = Recipe.losses

        def loss(self, model, batch):
            return None

    with pytest.raises(RecipeError, match=r"does not define losses\(\); is loss\(\) meant\? rename it"):
        check_numbers(Lossy())
