"""Record and replay against the oracle: every layer, optimiser setting and oddity, float64 and float32."""

from __future__ import annotations

import numpy as np
import pytest
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.recursion.coefficients import phi, recorded_settings
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.test_gradients import TestGradients
from hydra_pipe.workers.training.training import Compute, Training

from tests import oracle
from tests.recipes import TRACEABLE, Attention, BatchNormed, Images, Long, Sequences, Small, TwoGroups


def recorded(recipe, tmp_path, compute):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri).run()
    return open_trajectory(uri)


def replayed(recipe, trajectory, compute, tracked):
    replay = Replay(Training(recipe, compute), trajectory, np.asarray(tracked), FastRows)
    buffers = replay.run()
    rows = buffers.numpy(0, len(tracked)).copy()
    replay.close()
    return rows, replay


@pytest.mark.parametrize("kind", TRACEABLE, ids=lambda k: k.__name__)
def test_equals_dense_algorithm_1_in_float64(kind, tmp_path):
    recipe, compute = kind(), Compute(dtype="float64", device="cpu")
    trajectory = recorded(recipe, tmp_path, compute)
    tracked = [0, 3, 4, 17, 44] if kind is not BatchNormed else [0, 3, 4, 17, 43]
    right = oracle.dense(recipe, trajectory, tracked)
    rows, _ = replayed(recipe, trajectory, compute, tracked)
    assert np.abs(trajectory.loss - right.loss).max() < 1e-12
    last = trajectory.checkpoint(-1)
    assert np.abs(last.weights - right.weights).max() < 1e-12
    assert np.linalg.norm(right.hypergradient, axis=1).min() > 0
    assert oracle.relative_error(rows, right.hypergradient) < oracle.DENSE_FLOAT64


@pytest.mark.parametrize("kind", [Small, Images, TwoGroups, Sequences, BatchNormed], ids=lambda k: k.__name__)
def test_equals_dense_algorithm_1_in_float32(kind, tmp_path):
    recipe, compute = kind(), Compute(device="cpu")
    trajectory = recorded(recipe, tmp_path, compute)
    tracked = [1, 8, 20, 21]
    right = oracle.dense(recipe, trajectory, tracked)
    rows, _ = replayed(recipe, trajectory, compute, tracked)
    assert oracle.relative_error(rows, right.hypergradient) < oracle.DENSE_FLOAT32


def test_batch_norm_coupled_differentiates_through_the_statistics(tmp_path):
    recipe, compute = BatchNormed(), Compute(dtype="float64", device="cpu", batch_norm="coupled")
    trajectory = recorded(recipe, tmp_path, compute)
    tracked = [0, 5, 43]
    coupled = oracle.dense(recipe, trajectory, tracked, batch_norm="coupled").hypergradient
    constant = oracle.dense(recipe, trajectory, tracked, batch_norm="constant").hypergradient
    rows, _ = replayed(recipe, trajectory, compute, tracked)
    assert oracle.relative_error(rows, coupled) < oracle.DENSE_FLOAT64
    assert oracle.relative_error(constant, coupled) > 0.01  # the two notions really differ


def test_strategies_are_chosen_by_trying(tmp_path):
    compute = Compute(dtype="float64", device="cpu")
    trajectory = recorded(Sequences(), tmp_path, compute)
    _, replay = replayed(Sequences(), trajectory, compute, [0])
    chosen = dict(
        zip([e.name for e in replay.training.layout.entries], replay.sink.engine.strategies, strict=True)
    )
    assert chosen["scale"] == "func"
    assert chosen["conv.weight"] == chosen["norm.weight"] == chosen["embed.weight"] == "rule"
    assert chosen["twice.weight"] == "rule"
    trajectory = recorded(Attention(), tmp_path, compute)
    _, replay = replayed(Attention(), trajectory, compute, [0])
    chosen = dict(
        zip([e.name for e in replay.training.layout.entries], replay.sink.engine.strategies, strict=True)
    )
    assert chosen["attention.in_proj_weight"] == chosen["attention.out_proj.weight"] == "rule"
    assert chosen["out.weight"] == "outer"


@pytest.mark.parametrize(
    "kind", [Small, Images, Long, Sequences, BatchNormed, Attention], ids=lambda k: k.__name__
)
def test_any_subset_gives_the_same_bits(kind, tmp_path):
    recipe, compute = kind(), Compute(device="cpu")
    trajectory = recorded(recipe, tmp_path, compute)
    count = 44
    whole, _ = replayed(recipe, trajectory, compute, range(count))
    for tracked in ([7], [0, 1, 2], list(range(5, 40)), [43, 2]):
        part, _ = replayed(recipe, trajectory, compute, tracked)
        assert np.array_equal(part, whole[tracked])


@pytest.mark.parametrize("kind", [k for k in TRACEABLE if k is not BatchNormed], ids=lambda k: k.__name__)
def test_conservation_law(kind, tmp_path):
    """sum_i hypergradient_i / N = w_T - phi_T w_0 per group: no oracle needed."""
    recipe, compute = kind(), Compute(dtype="float64", device="cpu")
    trajectory = recorded(recipe, tmp_path, compute)
    rows, replay = replayed(recipe, trajectory, compute, range(45))
    kept = phi(recorded_settings(trajectory))
    groups = replay.training.layout.column_groups().numpy()
    kept = np.append(kept, 1.0)[groups]
    change = trajectory.checkpoint(-1).weights - kept * trajectory.checkpoint(0).weights
    assert np.abs(rows.mean(0) - change).max() < 1e-12 * max(1.0, np.abs(change).max())


@pytest.mark.parametrize("kind", [Small, Images, Sequences, BatchNormed, Attention], ids=lambda k: k.__name__)
def test_test_gradients(kind, tmp_path):
    recipe, compute = kind(), Compute(dtype="float64", device="cpu")
    trajectory = recorded(recipe, tmp_path, compute)
    model = oracle.dense(recipe, trajectory, [0]).model
    right = oracle.test_gradients(recipe, model, range(12))
    gradients = TestGradients(Training(recipe, compute), trajectory)
    rows = gradients.rows(np.arange(12))
    assert oracle.relative_error(rows.gradient, right) < oracle.DENSE_FLOAT64
    assert np.array_equal(rows.label, np.asarray(recipe.labels(recipe.test_dataset())))
    assert set(rows.prediction.tolist()) <= set(range(11))
    assert np.isfinite(rows.loss).all()
