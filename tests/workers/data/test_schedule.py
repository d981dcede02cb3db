"""Batches, epochs and steps of the optimiser, from what a recipe says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.data.schedule import schedule_of
from hydra_pipe.workers.determinism import derived_seed


def recipe(order=lambda epoch, generator: None, **changes):
    known = {"epochs": 3, "batch_size": 4, "seed": 7, "accumulate": 1, "max_steps": None, "_schedule": None}
    return SimpleNamespace(order=order, **known | changes)


def permutations(count, size, epochs, seed):
    """A permutation an epoch, drawn from (seed, epoch) and cut into batches."""
    rows = []
    for epoch in range(epochs):
        order = torch.randperm(
            count, generator=torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
        )
        rows += [part.tolist() + [-1] * (size - len(part)) for part in order.split(size)]
    return np.array(rows)


def test_without_more_it_is_a_permutation_an_epoch():
    found = schedule_of(recipe(), 10)
    assert np.array_equal(found.batches, permutations(10, 4, 3, 7))
    assert found.epoch_ends == (3, 6, 9)
    assert found.updates.all()
    assert found.distinct
    assert not found.accumulates


def test_what_is_left_of_an_epoch_makes_a_smaller_step():
    found = schedule_of(recipe(accumulate=2), 10)  # three batches an epoch: two and one
    assert found.updates.tolist() == [False, True, True] * 3
    assert found.first.tolist() == [0, 0, 2, 3, 3, 5, 6, 6, 8]
    assert [found.parts(t) for t in range(3)] == [2, 2, 1]
    assert np.array_equal(found.batches, permutations(10, 4, 3, 7))


@pytest.mark.parametrize(
    ("steps", "batches", "ends"), [(4, 6, (3, 6)), (5, 8, (3, 6, 8)), (9, 14, (3, 6, 9, 12, 14))]
)
def test_max_steps_counts_steps_of_the_optimiser_and_stands_in_for_epochs(steps, batches, ends):
    found = schedule_of(recipe(accumulate=2, max_steps=steps), 10)
    assert found.updates.sum() == steps
    assert len(found.batches) == batches
    assert found.epoch_ends == ends
    assert np.array_equal(found.batches, permutations(10, 4, 5, 7)[:batches])


def test_an_order_may_repeat_and_leave_out():
    def order(epoch, generator):
        return torch.cat([torch.tensor([3, 3, epoch]), torch.randint(10, (3,), generator=generator)])

    found = schedule_of(recipe(order), 10)
    assert found.batches[::2, :3].tolist() == [[3, 3, 0], [3, 3, 1], [3, 3, 2]]
    assert (found.batches[1::2] >= 0).sum(1).tolist() == [2, 2, 2]
    assert not found.distinct
    again = schedule_of(recipe(order), 10)
    assert np.array_equal(found.batches, again.batches)  # drawn from (seed, epoch)
    assert schedule_of(recipe(lambda e, g: range(9, -1, -1)), 10).distinct


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"accumulate": 0}, "accumulate is 0; it must be a whole number of at least 1"),
        ({"accumulate": True}, "accumulate is True"),
        ({"max_steps": 2.5}, "max_steps is 2.5"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"order": lambda e, g: []}, "order\\(\\) returned .* for epoch 0"),
        ({"order": lambda e, g: [[0, 1]]}, "of shape \\(1, 2\\)"),
        ({"order": lambda e, g: [0.5]}, "float64"),
        ({"order": lambda e, g: [0, 10]}, "the index 10 for epoch 0; training indices go from 0 to 9"),
        ({"order": lambda e, g: [-1]}, "the index -1"),
        ({"order": lambda e, g: 1 / 0}, "order\\(0, generator\\) raised ZeroDivisionError"),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(given, said):
    with pytest.raises(RecipeError, match=said) as found:
        schedule_of(recipe(**given), 10)
    assert "\n" not in str(found.value)


def test_more_indices_than_half_of_the_memory_are_refused_at_once():
    with pytest.raises(
        RecipeError, match=r"^3,000,000,000,000 batches of 4 samples .* train for fewer epochs or steps$"
    ):
        schedule_of(recipe(epochs=10**12), 10)
    with pytest.raises(RecipeError, match=r"^2,000,000,000,000 batches of 4 samples"):
        schedule_of(recipe(accumulate=2, max_steps=10**12), 10)
