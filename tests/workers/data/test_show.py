"""How samples are shown: the default, the built-in recipes, and what a recipe may return."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.data.show import TEXT, Picture, default_look, look
from hydra_pipe.workers.recipes.cifar10 import Cifar10
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.recipes.loading import load_recipe

from hydra_pipe import Recipe

FASHION = Path("/usr/share/datasets/fashion-mnist")


class Showing(Recipe):
    """Shows what it is given."""

    def __init__(self, shown: Any) -> None:
        self.shown = shown

    def show(self, item: Any) -> Any:
        if isinstance(self.shown, Exception):
            raise self.shown
        return self.shown


def seen(item: Any, shape: tuple[int, ...] | None = None) -> Picture | str | None:
    recipe = Showing(default_look(item, shape))
    return look(recipe, None, "train sample 0")


@pytest.mark.parametrize(
    ("item", "shape"),
    [
        ((torch.rand(1, 5, 7), 3), (5, 7)),
        ((torch.rand(3, 5, 7), 3), (5, 7, 3)),
        ((torch.rand(5, 7, 3), 3), (5, 7, 3)),
        ((torch.rand(5, 7), 3), (5, 7)),
        ({"label": 1, "pixel_values": torch.rand(3, 4, 4)}, (4, 4, 3)),
        (namedtuple("Item", "x y")(torch.rand(1, 4, 4).double(), 0), (4, 4)),
        ((torch.randint(0, 255, (3, 6, 6), dtype=torch.uint8), 0), (6, 6, 3)),
        ((torch.randn(2, 9).bool(), 0), (2, 9)),
        ((torch.randn(3, 4, 4).bfloat16(), 0), (4, 4, 3)),
        ([np.random.default_rng(0).random((8, 8)), 1], (8, 8)),
    ],
)
def test_images_of_pairs_and_mappings_are_pictures(item, shape):
    found = seen(item)
    assert isinstance(found, Picture)
    assert found.pixels.shape == shape
    assert found.pixels.dtype == np.uint8


def test_normalised_images_are_scaled_to_their_own_range():
    image = torch.tensor([[-2.0, 0.0], [1.0, 2.0]])
    found = seen((image, 0))
    assert isinstance(found, Picture)
    assert found.pixels.tolist() == [[0, 128], [191, 255]]
    kept = seen((torch.tensor([[0.2, 0.4], [0.6, 0.6]]), 0))
    assert isinstance(kept, Picture)
    assert kept.pixels.tolist() == [[51, 102], [153, 153]]


def test_rows_are_images_only_where_the_recipe_says_so():
    row = torch.linspace(0, 1, 16)
    assert str(seen((row, 0))).startswith("x0=0, x1=0.06667, x2=0.1333")
    found = seen((row, 0), (4, 4))
    assert isinstance(found, Picture)
    assert found.pixels.shape == (4, 4)
    flat = seen((torch.rand(12), 0), (3, 2, 2))
    assert isinstance(flat, Picture)
    assert flat.pixels.shape == (2, 2, 3)


def test_texts_tokens_and_features_are_text():
    assert seen(("a sentence", 1)) == "a sentence"
    assert seen({"text": "hello", "label": 0}) == "hello"
    assert seen({"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor(1)}) == "5 6 7"
    assert seen((["many", "little", "words"], 0)) == "many little words"
    assert str(seen((torch.arange(30.0), 0))).endswith("x23=23, …")
    assert seen(torch.tensor([0.5, -1.25])) == "x0=0.5, x1=-1.25"
    long = str(seen(("w" * 1000, 0)))
    assert len(long) == TEXT
    assert long.endswith("…")


@pytest.mark.parametrize(
    "item", [(torch.rand(2, 3, 4, 5), 0), (torch.rand(2, 5, 5), 0), (torch.zeros(0), 0), (None, 0), ({}, 1)]
)
def test_what_cannot_be_seen_is_nothing(item):
    assert seen(item) is None


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        (np.zeros((2, 3, 4, 5)), r"float64 of shape \(2, 3, 4, 5\)"),
        (np.zeros((5, 5, 2)), r"shape \(5, 5, 2\)"),
        (np.full((5, 5), 3.0), "from 3 to 3"),
        (np.zeros((5, 5), np.int64), "int64"),
        (np.full((5, 5), np.nan), "float64"),
        (17.5, r"shape \(\)"),
        (object(), "returned object"),
        (ValueError("no such thing"), "ValueError: no such thing"),
    ],
)
def test_what_is_neither_image_nor_text_is_refused_in_a_line(shown, told):
    with pytest.raises(RecipeError, match=told) as caught:
        look(Showing(shown), None, "test sample 3")
    assert "\n" not in str(caught.value)
    assert "test sample 3" in str(caught.value)


def test_what_a_recipe_returns_is_taken():
    assert look(Showing(None), None, "x") is None
    assert look(Showing("said"), None, "x") == "said"
    for shape in ((4, 6), (4, 6, 3), (3, 4, 6), (1, 4, 6)):
        found = look(Showing(np.ones(shape)), None, "x")
        assert isinstance(found, Picture)
        assert found.pixels.shape[:2] == (4, 6)
        assert found.pixels.min() == 255


def test_digits_are_8_by_8_and_as_they_are():
    recipe = Digits()
    item = recipe.train_dataset()[3]
    found = look(recipe, item, "x")
    assert isinstance(found, Picture)
    assert np.abs(found.pixels / 255 - item[0][0].numpy()).max() < 0.003
    assert found.pixels.shape == (8, 8)


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"{FASHION} is not there")
def test_fashion_mnist_is_shown_as_its_file_has_it():
    recipe = load_recipe("fashion-mnist", {"train_size": 4})
    found = look(recipe, recipe.train_dataset()[1], "x")
    raw = recipe._part("train").images[1, 0]
    assert isinstance(found, Picture)
    assert np.array_equal(found.pixels, raw)


def test_cifar_is_shown_in_its_own_colours():
    recipe = Cifar10()
    raw = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.MEAN, recipe.STD))
    found = look(recipe, ((torch.from_numpy(raw) / 255 - mean) / std, 0), "x")
    assert isinstance(found, Picture)
    assert np.array_equal(found.pixels, raw.transpose(1, 2, 0))
