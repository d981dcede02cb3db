"""Exact contributions where the update is no gradient, against central differences through an own loop."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.hessian.second_order import (
    FieldSecondOrder,
    FieldTangentTile,
    TangentTile,
)
from hydra_pipe.workers.hessian.tiles import HessianTiles
from hydra_pipe.workers.reference.dense import DenseReference
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.exact import ExactRows
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests.odd_recipes import Field, Recurrent, Stateful
from tests.recipes import Small

COUPLED = Compute(dtype="float64", device="cpu", batch_norm="coupled")
DETACHED = ["focal", "branch", "data", "no_grad", "rounded"]


def recorded(recipe, tmp_path, compute=COUPLED):
    Recorder(Training(recipe, compute), str(tmp_path / "trajectory.zarr")).run()
    return open_trajectory(str(tmp_path / "trajectory.zarr"))


def differences(recipe, trajectory, h=1e-5):
    """Return d w_T / d eps_i by training twice for each sample, its loss weighted by 1 +- h N / B, (N, D)."""
    data = recipe.train_dataset().tensors
    start = torch.tensor(trajectory.checkpoint(0).weights)
    count = len(data[0])

    def final(i, eps):
        model = recipe.model().double()
        torch.nn.utils.vector_to_parameters(start.clone(), model.parameters())
        model.train()
        optimizer = recipe.optimizer(model)
        for row in trajectory.batches:
            members = [int(m) for m in row if m >= 0]
            losses = recipe.losses(model, (data[0][members].double(), data[1][members]))
            weights = torch.full((len(members),), 1.0 / len(members), dtype=torch.float64)
            if i in members:
                weights[members.index(i)] += eps * count / len(members)
            optimizer.zero_grad()
            (weights * losses).sum().backward()
            optimizer.step()
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()

    return np.stack([(final(i, h) - final(i, -h)) / (2 * h) for i in range(count)])


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A function of a kind of `Field`: its record and its derivative, made once."""

    @functools.cache
    def of(kind):
        trajectory = recorded(Field(kind), tmp_path_factory.mktemp(kind))
        return trajectory, differences(Field(kind), trajectory)

    return of


@pytest.mark.parametrize("kind", [*DETACHED, "weight_norm"])
def test_forward_and_adjoint_are_the_derivative_of_the_update(kind, known):
    recipe = Field(kind)
    trajectory, right = known(kind)
    everyone = np.arange(16)
    ahead = Replay(Training(recipe, COUPLED), trajectory, everyone, ExactRows)
    rows = ahead.run().numpy(0, 16)
    assert np.abs(rows - right).max() < 1e-6 * np.abs(right).max()
    targets = np.random.default_rng(0).standard_normal((3, rows.shape[1]))
    back = Adjoint(Training(recipe, COUPLED), trajectory, everyone, targets)
    found = -16 * back.run().contributions()
    assert np.abs(found - targets @ rows.T).max() < 1e-11 * np.abs(found).max()
    if kind == "weight_norm":  # a gradient, and torch's own double backward is wrong there
        assert ahead.sink.tiles.kind is back.tiles.kind is TangentTile
        assert ahead.sink.tiles.field is None
    elif kind == "focal":  # the gradient of another loss than the one it says
        assert ahead.sink.tiles.kind is back.tiles.kind is FieldTangentTile
    else:
        assert (ahead.sink.tiles.kind, back.tiles.kind) == (FieldTangentTile, FieldSecondOrder)
        assert "is not what double backward gives" in back.tiles.choice


def test_a_field_that_hides_what_it_is_is_refused_by_name(tmp_path):
    recipe = Field("hidden")
    trajectory = recorded(recipe, tmp_path)
    targets = np.zeros((1, len(trajectory.checkpoint(0).weights)))
    for kind, last in ((Replay, ExactRows), (Adjoint, targets)):
        with pytest.raises(
            RecipeError, match=r"update of parameter 'f\.0\.weight' is not what double backward"
        ):
            kind(Training(recipe, COUPLED), trajectory, np.arange(16), last)


@pytest.mark.parametrize("kind", DETACHED)
def test_the_reference_of_verify_deep_finds_the_derivative_too(kind, known):
    recipe = Field(kind)
    trajectory, right = known(kind)
    right = right[[0, 5]]
    reference = DenseReference(Training(recipe, COUPLED), trajectory, np.array([0, 5]), ("exact",)).run()
    assert reference.differences
    assert reference.deviation > 1e-3
    found = reference.hypergradients("exact")
    assert np.abs(found - right).max() < 1e-5 * np.abs(right).max()


def test_the_reference_says_where_double_backward_is_right(tmp_path):
    recipe = Small()
    trajectory = recorded(recipe, tmp_path)
    reference = DenseReference(Training(recipe, COUPLED), trajectory, np.array([0, 5]), ("exact",)).run()
    assert not reference.differences
    assert reference.deviation < 1e-6


@pytest.mark.parametrize("kind", [Replay, Adjoint])
def test_recurrent_layers_go_several_directions_at_a_time_in_float32_too(kind, tmp_path):
    """Fused, an LSTM has forward mode in float64 and not in float32; step by step it has it in both."""
    recipe = Recurrent()
    single = Compute(dtype="float32", device="cpu", batch_norm="coupled")
    trajectory = recorded(recipe, tmp_path, single)
    double = recorded(recipe, tmp_path / "double")
    targets = np.random.default_rng(0).standard_normal((2, len(double.checkpoint(0).weights)))
    last = targets.astype(np.float32) if kind is Adjoint else ExactRows
    replay = kind(Training(recipe, single), trajectory, np.arange(24), last)
    tiles = replay.tiles if kind is Adjoint else replay.sink.tiles
    assert tiles.kind is TangentTile
    assert tiles.refusal is None
    right = -24 * Adjoint(Training(recipe, COUPLED), double, np.arange(24), targets).run().contributions()
    replay.run()
    found = -24 * replay.contributions() if kind is Adjoint else targets @ replay.numpy(0, 24).T
    assert np.abs(found - right).max() < 1e-4 * np.abs(right).max()


def test_distances_without_second_derivatives_are_refused_with_advice(tmp_path):
    """cdist of few rows has no double backward in torch 2.13."""

    class Distances(Small):
        def losses(self, model, batch):
            return torch.cdist(model(batch[0]), torch.eye(3).to(batch[0])).square().sum(1) / (1 + batch[1])

    with pytest.raises(RecipeError, match=r"double backward fails .*; use --hessian none or ekfac"):
        HessianTiles(Training(Distances(), COUPLED))


def test_a_state_that_carries_past_weights_is_refused():
    """Without it the rows are off by 1.4%: the center moves with weights that the sample moved."""
    with pytest.raises(RecipeError, match=r"keeps a state \(.*_Stateful.center.*\) that past weights moved"):
        HessianTiles(Training(Stateful("center"), COUPLED))


@pytest.mark.parametrize("kind", ["spectral", "instance"])
def test_products_start_from_the_state_of_the_step(kind, tmp_path):
    recipe = Stateful(kind)
    trajectory = recorded(recipe, tmp_path)
    everyone = np.arange(24)
    targets = np.random.default_rng(0).standard_normal((2, len(trajectory.checkpoint(0).weights)))
    back = Adjoint(Training(recipe, COUPLED), trajectory, everyone, targets)
    found = -24 * back.run().contributions()
    rows = Replay(Training(recipe, COUPLED), trajectory, everyone, ExactRows).run().numpy(0, 24)
    assert np.abs(found - targets @ rows.T).max() < 1e-10 * np.abs(found).max()


def test_a_layer_under_two_names_keeps_its_parameters(tmp_path):
    """functional_call leaves what it was given in it (torch 2.13): the next step then trained nothing."""

    class Twice(Field):
        def model(self):
            layer = torch.nn.Linear(5, 5)
            return torch.nn.Sequential(
                torch.nn.Linear(6, 5), layer, torch.nn.Tanh(), layer, torch.nn.Linear(5, 3)
            )

        def losses(self, model, batch):
            return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    recipe = Twice()
    trajectory = recorded(recipe, tmp_path)
    right = differences(recipe, trajectory)
    everyone = np.arange(16)
    rows = Replay(Training(recipe, COUPLED), trajectory, everyone, ExactRows).run().numpy(0, 16)
    assert np.abs(rows - right).max() < 1e-6 * np.abs(right).max()
    targets = np.random.default_rng(0).standard_normal((2, rows.shape[1]))
    found = -16 * Adjoint(Training(recipe, COUPLED), trajectory, everyone, targets).run().contributions()
    assert np.abs(found - targets @ rows.T).max() < 1e-11 * np.abs(found).max()
