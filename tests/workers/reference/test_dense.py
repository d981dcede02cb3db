"""The reference that ships: against the oracle and autograd through the whole training, which share nothing with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import ReplayDiverged
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate
from hydra_pipe.workers.recursion.coefficients import recorded_settings
from hydra_pipe.workers.recursion.eigencoefficients import stability_limit
from hydra_pipe.workers.recursion.forms import EKFAC, FORWARD
from hydra_pipe.workers.reference.dense import DenseReference, dense_test_gradients
from hydra_pipe.workers.reference.ekfac import largest_stable_curvature
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests import oracle
from tests.recipes import (
    Attention,
    Augmented,
    BatchNormed,
    Dampened,
    Images,
    Nesterov,
    OneCycle,
    Plain,
    Sequences,
    Small,
    TwoGroups,
)
from tests.workers.replay.test_optimisers import Sampled, Stepped

KINDS = [Small, Plain, Nesterov, Dampened, TwoGroups, OneCycle, Images, BatchNormed, Sequences, Attention]
KINDS.append(Augmented)
TRACKED = np.array([0, 4, 17, 43])


def double(batch_norm="constant"):
    return Compute(dtype="float64", device="cpu", batch_norm=batch_norm)


def recorded(recipe, tmp_path, compute):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri).run()
    return open_trajectory(uri)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_agrees_with_the_oracle_and_with_autograd_through_training(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, double())
    found = DenseReference(Training(recipe, double()), trajectory, TRACKED, ("none", "exact")).run()
    right = oracle.dense(recipe, trajectory, TRACKED)
    assert oracle.relative_error(found.hypergradients("none"), right.hypergradient) < oracle.DENSE_FLOAT64
    assert np.abs(found.loss - right.loss).max() < 1e-12 * right.loss.max()
    vectors = np.random.default_rng(0).standard_normal((3, right.hypergradient.shape[1]))
    exact = oracle.unrolled(recipe, trajectory, TRACKED).along(vectors)
    along = vectors @ found.hypergradients("exact").T
    assert np.abs(along - exact).max() < oracle.EXACT_FLOAT64 * np.abs(exact).max()
    tests = [0, 3, 11]
    gradients = dense_test_gradients(Training(recipe, double()), trajectory, tests)
    assert oracle.relative_error(gradients, oracle.test_gradients(recipe, right.model, tests)) < 1e-12


def test_batch_statistics_are_constants_or_not_as_asked(tmp_path):
    recipe = BatchNormed()
    trajectory = recorded(recipe, tmp_path, double())
    rows = {}
    for kind in ("constant", "coupled"):
        found = DenseReference(Training(recipe, double(kind)), trajectory, TRACKED, ("none",)).run()
        right = oracle.dense(recipe, trajectory, TRACKED, batch_norm=kind).hypergradient
        rows[kind] = found.hypergradients("none")
        assert oracle.relative_error(rows[kind], right) < oracle.DENSE_FLOAT64
    assert oracle.relative_error(rows["constant"], rows["coupled"]) > 1e-2


@pytest.mark.parametrize("core", [0, 9])
@pytest.mark.parametrize("kind", [Small, TwoGroups, Images, BatchNormed], ids=lambda k: k.__name__)
def test_ekfac_is_a_matrix(kind, core, tmp_path):
    """The oracle's recursion with the curvature as one big matrix: kron(left, right) a block, then the core."""
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, double())
    curvature = CurvatureEstimate(Training(recipe, double()), trajectory, checkpoints=2, core=core).run()
    settings = recorded_settings(trajectory)
    limits = np.append(stability_limit(settings), 0.0)
    curvature.eigenvalues[:] *= 2 * limits.max() / curvature.eigenvalues.max()  # so that some are cut
    for group in range(len(limits) - 1):
        assert largest_stable_curvature(trajectory, group) == pytest.approx(limits[group], rel=1e-12)
    dimension = curvature.eigenvalues.shape[1]
    turn, limit = np.zeros((dimension, dimension)), np.zeros(dimension)
    start = 0
    for block in curvature.blocks:
        stop = start + block.rows * block.columns
        places = np.concatenate(
            [
                np.arange(trajectory.parameters[i].start, trajectory.parameters[i].start + size).reshape(
                    block.rows, -1
                )
                for i in block.entries
                for size in [int(np.prod(trajectory.parameters[i].shape))]
            ],
            1,
        ).reshape(-1)
        left = np.eye(block.rows) if block.left is None else block.left
        right = np.eye(block.columns) if block.right is None else block.right
        turn[places, start:stop] = np.kron(left, right)
        limit[start:stop] = max(0.0, limits[trajectory.parameters[block.entries[0]].group])
        start = stop
    assert (curvature.core is None) == (core == 0)
    if curvature.core is not None:
        chosen = curvature.core.coordinates
        turn[:, chosen] = turn[:, chosen] @ curvature.core.vectors
    matrices = [(turn * np.clip(row, 0, limit)) @ turn.T for row in curvature.eigenvalues]
    nearest = [int(np.abs(curvature.steps - t).argmin()) for t in range(len(trajectory.loss))]
    reference = DenseReference(Training(recipe, double()), trajectory, TRACKED, ("ekfac",), curvature).run()
    found = reference.hypergradients("ekfac")
    right = oracle.dense(
        recipe, trajectory, TRACKED, curvature=lambda step, du: matrices[nearest[step]] @ du
    ).hypergradient
    assert oracle.relative_error(found, right) < 1e-11
    engine = make_replay(
        EKFAC, FORWARD, Training(recipe, double()), trajectory, TRACKED, curvature=curvature
    ).run()
    assert (curvature.eigenvalues > engine.sink.coefficients.bent.eigenvalues.numpy()).any()
    assert oracle.relative_error(engine.numpy(0, 4), found) < 1e-11


@pytest.mark.parametrize("kind", [Images, BatchNormed, Attention], ids=lambda k: k.__name__)
def test_float32_runs_are_followed_at_their_own_weights(kind, tmp_path):
    """In float64 along the weights of the float32 training, dropout included."""
    recipe = kind()
    single = Compute(dtype="float32", device="cpu")
    trajectory = recorded(recipe, tmp_path, single)
    reference = DenseReference(Training(recipe, single), trajectory, TRACKED, ("none", "exact")).run()
    assert reference.hypergradients("none").dtype == np.float64
    assert 0 < np.abs(reference.loss - trajectory.loss).max() < 1e-5 * trajectory.loss.max()


class Shaken(Small):
    """Noise of the model's own, in place and not; its bits depend on the dtype it is drawn in."""

    def model(self):
        return _Shaken()


class _Shaken(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)

    def forward(self, x):
        x = self.first(x + 0.5 * torch.randn_like(x))
        x = x * torch.empty_like(x).uniform_(0.5, 1.5) + torch.rand(5, dtype=x.dtype)
        return self.last(torch.native_dropout(torch.tanh(x), 0.3, True)[0])


def test_noise_of_the_model_is_that_of_the_run(tmp_path):
    single = Compute(dtype="float32", device="cpu")
    trajectory = recorded(Shaken(), tmp_path, single)
    training = Training(Shaken(), single)
    reference = DenseReference(training, trajectory, TRACKED, ("none", "exact")).run()
    assert np.abs(reference.loss - trajectory.loss).max() < 1e-5 * trajectory.loss.max()
    fast = Replay(Training(Shaken(), single), trajectory, TRACKED, FastRows).run().numpy(0, 4)
    assert oracle.relative_error(fast, reference.hypergradients("none")) < oracle.DENSE_FLOAT32
    plain = DenseReference(training := Training(Shaken(), single), trajectory, TRACKED, ("none",))
    plain.dense.training = _Elsewhere(training)  # drawn in float64
    assert np.abs(plain.run().loss - trajectory.loss).max() > 1e-2 * trajectory.loss.max()


class _Elsewhere:
    """A training that says it draws in float64."""

    def __init__(self, training):
        self.training = training
        self.dtype = torch.float64

    def __getattr__(self, name):
        return getattr(self.training, name)


def test_another_training_is_noticed(tmp_path):
    trajectory = recorded(Small(), tmp_path, double())
    with pytest.raises(ReplayDiverged):
        DenseReference(Training(Augmented(), double()), trajectory, TRACKED, ("none",)).run()


def test_the_reference_uses_none_of_the_engines():
    """What it is held against must not be what it is made of."""
    import ast
    from pathlib import Path

    from hydra_pipe.workers.reference import dense as reference_dense
    from hydra_pipe.workers.reference import ekfac as reference_ekfac

    rooms = set()
    for module in (reference_dense, reference_ekfac):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                rooms.add(node.module.split(".")[0])
    assert "training" in rooms
    assert not rooms & {"persample", "recursion", "ekfac", "hessian", "replay", "estimators"}


STEPPED = [
    Stepped("adamw", 0.3, 3, "late"),
    Stepped("adam", None, 1, "one-cycle"),
    Stepped("adam", 0.3, 1, "groups"),
    Stepped("sgd", 0.3, 3, "late"),
    Sampled("sgd"),
    Sampled("adamw"),
]


@pytest.mark.parametrize("recipe", STEPPED, ids=lambda r: f"{type(r).__name__}-{r.kind}-{r.around}")
def test_every_optimiser_and_what_surrounds_its_step(recipe, tmp_path):
    trajectory = recorded(recipe, tmp_path, double())
    samples = np.array([0, 3, 8, 12])
    found = DenseReference(Training(recipe, double()), trajectory, samples, ("none", "exact")).run()
    right = oracle.dense(recipe, trajectory, samples)
    assert oracle.relative_error(found.hypergradients("none"), right.hypergradient) < oracle.DENSE_FLOAT64
    assert np.abs(found.loss - trajectory.loss).max() < 1e-12
    assert found.deviation < 1e-4
    vectors = np.random.default_rng(0).standard_normal((3, right.hypergradient.shape[1]))
    exact = oracle.unrolled(recipe, trajectory, samples).along(vectors)
    along = vectors @ found.hypergradients("exact").T
    assert np.abs(along - exact).max() < oracle.EXACT_FLOAT64 * np.abs(exact).max()
