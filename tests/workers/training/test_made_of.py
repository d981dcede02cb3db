"""What a run was made from: rounding and other machines are no difference, anything else is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.training.made_of import (
    UNSTABLE,
    data_of,
    differences,
    first_steps,
    made_of,
    signature,
    with_first_steps,
)
from hydra_pipe.workers.training.training import Compute, Training
from torch.utils.data import Dataset

from tests.recipes import OneCycle, Small, gaussian


def look(recipe: Recipe, dtype: str = "float32") -> dict[str, Any]:
    training = Training(recipe, Compute(device="cpu", dtype=dtype))
    datasets = {"training": recipe.train_dataset(), "test": recipe.test_dataset(), "validation": None}
    made = made_of(training, data_of(recipe, datasets, {"training": recipe.labels(datasets["training"])}))
    return with_first_steps(made, first_steps(training))


def test_the_same_recipe_is_the_same():
    for recipe in (Small(), OneCycle()):
        assert look(recipe) == look(recipe)
        assert differences(look(recipe), look(recipe)) == []


def test_the_settings_of_the_first_steps_are_those_of_the_record(tmp_path):
    from hydra_pipe.storage.trajectory import open_trajectory
    from hydra_pipe.workers.training.record import Recorder

    Recorder(Training(OneCycle(), Compute(device="cpu")), str(tmp_path / "t.zarr")).run()
    trajectory = open_trajectory(str(tmp_path / "t.zarr"))
    found = look(OneCycle())
    assert found["losses"] == trajectory.loss[:4].tolist()
    assert found["settings"]["learning_rate"] == trajectory.learning_rate[:4].tolist()
    assert found["settings"]["momentum"] == trajectory.momentum[:4].tolist()


@pytest.mark.parametrize(("by", "same"), [(1e-7, True), (1e-4, False)])
def test_floats_may_round(by, same):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    moved = values * (1 + by * torch.randn(1000, generator=torch.Generator().manual_seed(1)))
    pair = [{"data": {"test samples": signature([("", v)])}} for v in (values, moved)]
    assert (differences(*pair) == []) is same
    assert pair[0] != pair[1]


def test_one_changed_number_swapped_blocks_and_integers_are_seen():
    big = torch.randn(3 << 20, generator=torch.Generator().manual_seed(0))
    one = big.clone()
    one[12345] += 0.1
    blocks = torch.cat([big[1 << 20 : 2 << 20], big[: 1 << 20], big[2 << 20 :]])
    for other in (one, blocks, big[:-1], big.double()):
        assert differences(*({"data": {"x": signature([("", v)])}} for v in (big, other))) == ["x"]
    whole = torch.arange(10)
    other = whole.clone()
    other[3] = 4
    assert differences(*({"data": {"x": signature([("", v)])}} for v in (whole, other))) == ["x"]
    strange = torch.tensor([float("nan"), 1.0])
    found = {"data": {"x": signature([("", strange)])}}
    assert differences(found, copy.deepcopy(found)) == []


def test_weights_and_losses_are_compared_on_one_kind_of_machine_alone():
    stored, now = look(Small()), look(Small())
    now["losses"] = [value * 1.1 for value in now["losses"]]
    now["weights"] = {**now["weights"], "bits": "x", "probe": [0.0, 0.0]}
    words = differences(stored, now)
    assert words[0] == "initial weights"
    assert words[1].startswith("losses of the first steps (stored ")
    now["environment"] = {**now["environment"], "device": "another"}
    assert differences(stored, now) == []


def test_losses_may_round_and_need_not_be_finite():
    stored, now = look(Small()), look(Small())
    now["losses"] = [value * (1 + 1e-6) for value in now["losses"]]
    assert differences(stored, now) == []
    stored["losses"], now["losses"] = [1.0, None], [1.0, None]
    assert differences(stored, now) == []
    now["losses"] = [1.0, 2.0]
    assert differences(stored, now) == ["losses of the first steps (stored not finite, now 2 at step 1)"]


def test_a_validation_set_that_came_or_went():
    stored, now = look(Small()), look(Small())
    now["data"] = {**now["data"], "validation samples": signature([("", torch.ones(3))])}
    assert differences(stored, now) == ["validation samples (there were none)"]
    assert differences(now, stored) == ["validation samples (there are none now)"]


class Restless(Dataset[Any]):
    """Items drawn from a generator of its own that nobody seeds."""

    def __init__(self) -> None:
        self.data, self.generator = gaussian(45, (6,), 3, 1), np.random.default_rng()

    def __len__(self) -> int:
        return 45

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.data[index]
        return inputs + torch.from_numpy(self.generator.normal(size=6)).float(), target


class OnRestless(Small):
    def test_dataset(self) -> Dataset[Any]:
        return Restless()


def test_items_that_differ_at_every_reading_are_not_compared():
    found, again = look(OnRestless()), look(OnRestless())
    assert found["data"]["test samples"] == {UNSTABLE: True}
    assert differences(found, again) == []


class Augmented(Small):
    def test_dataset(self) -> Dataset[Any]:
        class Drawn(Restless):
            def __getitem__(self, index: int) -> Any:
                return self.data[index][0] + torch.randn(6), self.data[index][1]

        return Drawn()


def test_augmentation_from_the_global_generators_is_no_difference():
    torch.manual_seed(0)
    found = look(Augmented())
    torch.manual_seed(1)
    assert differences(found, look(Augmented())) == []
    assert UNSTABLE not in found["data"]["test samples"]
