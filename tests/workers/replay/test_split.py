"""EKFAC in two parts: the same numbers as in the eigenbasis as a whole."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate
from hydra_pipe.workers.recursion.coefficients import recorded_settings
from hydra_pipe.workers.recursion.eigencoefficients import EigenCoefficients, flat_directions
from hydra_pipe.workers.recursion.forms import EKFAC, FORWARD
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.ekfac import EkfacProducts, EkfacRows
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.replay.split import SplitProducts, SplitRows, bent_coordinates, splits
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.test_gradients import TestGradients
from hydra_pipe.workers.training.training import Compute, Training

from tests import oracle
from tests.recipes import Attention, Images, Nesterov, Small, TwoGroups

DOUBLE = Compute(dtype="float64", device="cpu")


class Wide(Small):
    """Large enough that factors and what bends are less than whole rows."""

    def model(self):
        return torch.nn.Sequential(
            torch.nn.Linear(6, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 3)
        )


def made(recipe, tmp_path, compute=DOUBLE, flat=0.2, core=5):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri).run()
    trajectory = open_trajectory(uri)
    estimate = CurvatureEstimate(Training(recipe, compute), trajectory, checkpoints=2, core=core, flat=flat)
    return trajectory, estimate.run()


def rows_of(sink, recipe, trajectory, curvature, tracked, compute=DOUBLE):
    replay = Replay(Training(recipe, compute), trajectory, tracked, partial(sink, curvature=curvature)).run()
    replay.close()
    return replay.numpy(0, len(tracked))


@pytest.mark.parametrize("kind", [Small, TwoGroups, Images, Attention, Wide], ids=lambda k: k.__name__)
def test_two_parts_are_the_whole(kind, tmp_path):
    recipe = kind()
    trajectory, curvature = made(recipe, tmp_path)
    bent = bent_coordinates(curvature)
    assert 5 <= len(bent) < curvature.eigenvalues.shape[1]
    tracked = np.array([0, 4, 17, 43])
    whole = rows_of(EkfacRows, recipe, trajectory, curvature, tracked)
    parts = rows_of(SplitRows, recipe, trajectory, curvature, tracked)
    assert oracle.relative_error(parts, whole) < 1e-11
    outer = TestGradients(Training(recipe, DOUBLE), trajectory).rows(np.arange(3)).gradient
    other = np.random.default_rng(0).standard_normal(outer.shape)
    for targets in (outer, other):
        found = {}
        for sink in (EkfacProducts, SplitProducts):
            given = partial(sink, curvature=curvature, targets_QD=targets)
            replay = Replay(Training(recipe, DOUBLE), trajectory, tracked, given).run()
            replay.close()
            found[sink] = replay.contributions()
        right = found[EkfacProducts]
        assert np.abs(found[SplitProducts] - right).max() < 1e-10 * np.abs(right).max()


def test_any_subset_gives_the_same_bits(tmp_path):
    recipe, compute = Wide(), Compute(device="cpu")
    trajectory, curvature = made(recipe, tmp_path, compute)
    assert splits(Training(recipe, compute), trajectory, curvature)
    replay = make_replay(
        EKFAC, FORWARD, Training(recipe, compute), trajectory, np.arange(44), curvature=curvature
    )
    assert isinstance(replay.sink, SplitRows)
    whole = replay.run().numpy(0, 44)
    for tracked in ([7], list(range(5, 40))):
        chosen = np.asarray(tracked)
        assert np.array_equal(
            rows_of(SplitRows, recipe, trajectory, curvature, chosen, compute), whole[chosen]
        )


def test_a_small_model_or_a_step_that_clips_is_not_split(tmp_path):
    class Clipped(Wide):
        clip_grad_norm = 1e-3

    for name, kind in (("small", Small), ("clipped", Clipped)):
        folder = tmp_path / name
        folder.mkdir()
        trajectory, curvature = made(kind(), folder, flat=0.01)
        assert not splits(Training(kind(), DOUBLE), trajectory, curvature)


def test_no_coefficient_of_a_flat_direction_changes_by_more_than_its_share(tmp_path):
    recipe = Nesterov()
    trajectory, curvature = made(recipe, tmp_path, flat=0.0)
    settings, device = recorded_settings(trajectory), torch.device("cpu")
    lanes = np.zeros(curvature.eigenvalues.shape[1], dtype=np.int64)
    with_it = EigenCoefficients(settings, torch.from_numpy(lanes), curvature, device, torch.float64)
    curvature_0 = type(curvature)(
        blocks=curvature.blocks,
        core=curvature.core,
        steps=curvature.steps,
        eigenvalues=curvature.eigenvalues * 0,
        attrs={},
    )
    without = EigenCoefficients(settings, torch.from_numpy(lanes), curvature_0, device, torch.float64)
    steps = range(len(settings.learning_rate))
    change = np.max([(with_it.at(t) / without.at(t) - 1).abs().numpy() for t in steps], axis=0)
    for share in (0.01, 0.3):
        flat = flat_directions(settings, lanes, curvature, share)
        assert 0 < flat.sum() < len(flat)
        assert change[flat].max() <= share
        assert change[~flat].max() > share / 2
