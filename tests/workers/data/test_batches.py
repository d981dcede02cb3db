"""Batches: what makes them is the recipe's own collate, wherever it was put."""

from __future__ import annotations

import torch
from hydra_pipe.workers.data.batches import fetch, is_plain
from hydra_pipe.workers.data.labels import defines_labels

from tests.recipes import Small


class Joined(Small):
    def collate(self, items):
        return ["joined", len(items)]


def test_rows_of_a_tensor_dataset_are_cut_where_nothing_else_is_asked():
    recipe = Small()
    dataset = recipe.train_dataset()
    assert is_plain(recipe, dataset)
    inputs, targets = fetch(recipe, dataset, [2, 0])
    assert torch.equal(inputs, dataset.tensors[0][[2, 0]])
    assert torch.equal(targets, dataset.tensors[1][[2, 0]])


def test_a_collate_of_the_class_or_put_on_the_instance_is_asked():
    put = Small()
    put.collate = lambda items: ["put", len(items)]
    for recipe, word in ((Joined(), "joined"), (put, "put")):
        dataset = recipe.train_dataset()
        assert not is_plain(recipe, dataset)
        assert fetch(recipe, dataset, [2, 0]) == [word, 2]


def test_labels_put_on_an_instance_are_its_own():
    recipe = Joined()
    assert not defines_labels(recipe)
    recipe.labels = lambda dataset: None
    assert defines_labels(recipe)
