"""Other labels in the items of a training set: of every form that is understood, and the others refused."""

from __future__ import annotations

from collections import UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.data.batches import fetch
from hydra_pipe.workers.training.relabelled import Relabelled, check_replaceable, relabelled
from torch.utils.data import Dataset

from tests.recipes import Small

INDEX, LABEL = np.array([1, 4]), np.array([2, 0])


class Pair(NamedTuple):
    x: torch.Tensor
    y: int


class Items(Dataset):
    """Six items of one form, the label of item i being i % 3."""

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.form(torch.full((2,), float(i)), i % 3)


FORMS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "triple": lambda x, y: (x, np.int64(y), "more"),
    "tensor": lambda x, y: (x, torch.tensor(y)),
    "named": Pair,
    "dict": lambda x, y: {"input": x, "label": y},
    "mapping": lambda x, y: UserDict(input=x, targets=torch.tensor(y, dtype=torch.int32)),
}


def label_of(item):
    return item[1] if isinstance(item, (tuple, list)) else next(v for k, v in item.items() if k != "input")


def of(form) -> Small:
    recipe = Small()
    recipe.train_dataset = lambda: Items(form)
    return recipe


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_label_is_another_and_all_else_stays(form):
    recipe = of(form)
    check_replaceable(recipe, INDEX, np.arange(6) % 3)
    old, new = recipe.train_dataset(), relabelled(recipe, INDEX, LABEL).train_dataset()
    assert isinstance(new, Relabelled)
    assert [int(label_of(new[i])) for i in range(len(new))] == [0, 2, 2, 0, 0, 2]
    for i in range(6):
        assert type(new[i]) is type(old[i])
        assert type(label_of(new[i])) is type(label_of(old[i]))
        if isinstance(label_of(new[i]), torch.Tensor):
            assert label_of(new[i]).dtype == label_of(old[i]).dtype
    assert int(label_of(recipe.train_dataset()[1])) == 1  # the user's own is as it was


def test_a_tensor_dataset_stays_one_and_the_given_tensors_stay_as_they_are():
    recipe = Small()
    before = recipe.train_dataset().tensors[1]
    other = relabelled(recipe, INDEX, LABEL).train_dataset()
    inputs, labels = fetch(recipe, other, np.arange(6))
    assert labels.tolist() == [
        LABEL[0] if i == 1 else LABEL[1] if i == 4 else int(before[i]) for i in range(6)
    ]
    assert torch.equal(inputs, recipe.train_dataset().tensors[0][:6])


def test_items_fetched_together_are_changed_alike():
    class Many(Items):
        def __getitems__(self, indices):
            return [self[i] for i in reversed(indices)][::-1]

    new = Relabelled(Many(FORMS["tuple"]), {1: 2})
    assert [label for _, label in new.__getitems__([0, 1, 2])] == [0, 2, 2]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda x, y: x, "a Tensor"),
        (lambda x, y: (x, torch.eye(3)[y]), r"\(Tensor, Tensor\)"),
        (lambda x, y: (x, "name"), r"\(Tensor, str\)"),
        (lambda x, y: {"input": x, "class": y}, "a mapping with input, class"),
        (lambda x, y: (x, y + 10), "holds 11 and its class is 1"),
    ],
)
def test_labels_that_cannot_be_replaced_are_refused_by_name(form, said):
    with pytest.raises(RecipeError, match=said) as caught:
        check_replaceable(of(form), INDEX, np.arange(6) % 3)
    assert "recipe 'small'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_dataset_of_soft_labels_is_refused():
    recipe = Small()
    recipe.train_dataset = lambda: torch.utils.data.TensorDataset(torch.zeros(6, 2), torch.zeros(6, 3))
    with pytest.raises(RecipeError, match="no second tensor of one label a sample"):
        check_replaceable(recipe, INDEX, np.arange(6) % 3)
