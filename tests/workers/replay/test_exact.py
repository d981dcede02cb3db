"""The Hessian kept: forward and adjoint mode against autograd through the whole training."""

from __future__ import annotations

import numpy as np
import pytest
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.hessian.tiles import TILE
from hydra_pipe.workers.replay import adjoint
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.exact import ExactRows
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests import oracle
from tests.recipes import TRACEABLE, BatchNormed, Images, Long, Sequences, Small, TwoGroups

EXACT = Compute(dtype="float64", device="cpu", batch_norm="coupled")
SINGLE = Compute(dtype="float32", device="cpu", batch_norm="coupled")
SMOOTH = [kind for kind in TRACEABLE if kind is not Long]  # its 186 steps take autograd minutes


def recorded(recipe, tmp_path, compute=EXACT, every=None):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri, every).run()
    return open_trajectory(uri)


def directions(dimension, count=3):
    return np.random.default_rng(0).standard_normal((count, dimension))


@pytest.mark.parametrize("kind", SMOOTH, ids=lambda k: k.__name__)
def test_forward_and_adjoint_equal_autograd_through_training(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    tracked = np.array([0, 3, 17, 43])
    vectors = directions(len(trajectory.checkpoint(0).weights))
    right = oracle.unrolled(recipe, trajectory, tracked).along(vectors)
    rows = Replay(Training(recipe, EXACT), trajectory, tracked, ExactRows).run().numpy(0, 4)
    forward = vectors @ rows.T
    assert np.abs(forward - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()
    backward = Adjoint(Training(recipe, EXACT), trajectory, tracked, vectors).run().contributions()
    n_train = len(recipe.train_dataset())
    assert np.abs(-backward * n_train - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed], ids=lambda k: k.__name__)
def test_the_hessian_matters(kind, tmp_path):
    """A test of the tests: the fast form is far from the exact one here."""
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    tracked = np.array([0, 3, 17, 43])
    fast = oracle.dense(recipe, trajectory, tracked).hypergradient
    exact = Replay(Training(recipe, EXACT), trajectory, tracked, ExactRows).run().numpy(0, 4)
    assert oracle.relative_error(fast, exact) > 0.05


@pytest.mark.parametrize("kind", [Small, Images, TwoGroups, BatchNormed], ids=lambda k: k.__name__)
def test_forward_equals_adjoint_in_float32(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, SINGLE)
    tracked = np.arange(0, 44, 5)
    vectors = directions(len(trajectory.checkpoint(0).weights)).astype(np.float32)
    rows = Replay(Training(recipe, SINGLE), trajectory, tracked, ExactRows).run().numpy(0, len(tracked))
    backward = Adjoint(Training(recipe, SINGLE), trajectory, tracked, vectors).run().contributions()
    forward = -(vectors @ rows.T) / len(recipe.train_dataset())
    assert np.abs(forward - backward).max() < 1e-3 * np.abs(forward).max()


@pytest.mark.parametrize("kind", [Images, BatchNormed], ids=lambda k: k.__name__)
def test_segments_and_other_tracked_samples_change_no_bit_of_a_tile_of_targets(kind, tmp_path, monkeypatch):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, SINGLE, every=7)
    vectors = directions(len(trajectory.checkpoint(0).weights), TILE + 3).astype(np.float32)
    whole = Adjoint(Training(recipe, SINGLE), trajectory, np.arange(44), vectors).run().contributions()
    monkeypatch.setattr(adjoint, "SEGMENT_BYTES", 1)  # one step at a time: segments halved to the end
    for tile in (slice(0, TILE), slice(TILE, None)):
        halved = (
            Adjoint(Training(recipe, SINGLE), trajectory, np.array([3, 9, 40]), vectors[tile])
            .run()
            .contributions()
        )
        assert np.array_equal(halved, whole[tile][:, [3, 9, 40]])


@pytest.mark.parametrize("kind", [Images, BatchNormed, TwoGroups, Sequences], ids=lambda k: k.__name__)
def test_other_tracked_samples_change_no_bit_of_a_row(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, SINGLE)
    tracked = np.arange(0, 44, 2)
    every = Replay(Training(recipe, SINGLE), trajectory, tracked, ExactRows).run().numpy(0, 22)
    for chosen in ([1, 4, 20], [20], list(range(1, 22, 2))):
        part = Replay(Training(recipe, SINGLE), trajectory, tracked[chosen], ExactRows).run()
        assert np.array_equal(part.numpy(0, len(chosen)), every[chosen])
