"""EKFAC in the recursion: against the dense recursion with the same curvature, and against its purpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.storage.curvature import read_curvature, write_curvature
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.ekfac.core import decoupled, leading
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate, chosen_checkpoints
from hydra_pipe.workers.ekfac.eigenbasis import Eigenbasis
from hydra_pipe.workers.recursion.forms import ADJOINT, EKFAC, FAST, FORWARD
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.test_gradients import TestGradients
from hydra_pipe.workers.training.training import Compute, Training
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from tests import oracle
from tests.recipes import (
    Attention,
    BatchNormed,
    Dampened,
    Images,
    Nesterov,
    OneCycle,
    Sequences,
    Small,
    TwoGroups,
    Volumes,
)

DOUBLE = Compute(dtype="float64", device="cpu")
KINDS = [Small, Nesterov, Dampened, TwoGroups, OneCycle, Images, Volumes, BatchNormed, Sequences, Attention]


def recorded(recipe, tmp_path, compute=DOUBLE):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri).run()
    return open_trajectory(uri)


def estimated(recipe, trajectory, compute=DOUBLE, **options):
    return CurvatureEstimate(Training(recipe, compute), trajectory, **{"checkpoints": 2, **options}).run()


@pytest.mark.parametrize(
    ("kind", "core"),
    [*((kind, 256) for kind in KINDS), (Small, 0), (TwoGroups, 21), (Images, 40), (BatchNormed, 1)],
    ids=lambda k: getattr(k, "__name__", str(k)),
)
def test_equals_the_dense_recursion_with_the_same_curvature(kind, core, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    curvature = estimated(recipe, trajectory, core=core)
    tracked = np.array([0, 4, 17, 43])
    replay = make_replay(
        EKFAC, FORWARD, Training(recipe, DOUBLE), trajectory, tracked, curvature=curvature
    ).run()
    basis = replay.sink.basis
    values = replay.sink.coefficients.bent.curvature

    def bend(step, du):
        turned = basis.to_eigen(torch.from_numpy(du)[None])
        return basis.to_parameters(turned * values(step))[0].numpy()

    right = oracle.dense(recipe, trajectory, tracked, curvature=bend).hypergradient
    assert oracle.relative_error(replay.numpy(0, 4), right) < 1e-11
    dropped = oracle.dense(recipe, trajectory, tracked).hypergradient
    assert oracle.relative_error(dropped, right) > 1e-3
    targets = np.random.default_rng(0).standard_normal((3, right.shape[1]))
    back = make_replay(
        EKFAC, ADJOINT, Training(recipe, DOUBLE), trajectory, tracked, curvature=curvature, targets=targets
    ).run()
    expected = -(targets @ right.T) / len(recipe.train_dataset())
    assert np.abs(back.contributions() - expected).max() < 1e-11 * np.abs(expected).max()


@pytest.mark.parametrize("kind", [Small, Images, Sequences], ids=lambda k: k.__name__)
def test_rotations_are_orthogonal_and_stored_exactly(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    curvature = estimated(recipe, trajectory)
    training = Training(recipe, DOUBLE)
    basis = Eigenbasis(curvature.blocks, training.layout, torch.float64, torch.device("cpu"), curvature.core)
    rows = torch.randn(5, training.layout.dimension, dtype=torch.float64)
    kept = rows.clone()
    turned = basis.to_eigen(rows)
    assert torch.equal(rows, kept)
    assert torch.allclose(turned.norm(dim=1), rows.norm(dim=1), rtol=1e-12)
    assert torch.allclose(basis.to_parameters(turned), rows, atol=1e-12)
    write_curvature(str(tmp_path / "curvature.zarr"), curvature)
    again = read_curvature(str(tmp_path / "curvature.zarr"))
    assert np.array_equal(again.eigenvalues, curvature.eigenvalues)
    assert again.attrs == curvature.attrs
    assert np.array_equal(again.core.coordinates, curvature.core.coordinates)
    assert np.array_equal(again.core.vectors, curvature.core.vectors)
    for one, two in zip(again.blocks, curvature.blocks, strict=True):
        assert one.entries == two.entries
        assert (one.left is None) == (two.left is None)
        assert one.right is None or np.array_equal(one.right, two.right)


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed, Sequences], ids=lambda k: k.__name__)
def test_any_subset_gives_the_same_bits(kind, tmp_path):
    recipe, compute = kind(), Compute(device="cpu")
    trajectory = recorded(recipe, tmp_path, compute)
    curvature = estimated(recipe, trajectory, compute)
    again = estimated(recipe, trajectory, compute)
    assert np.array_equal(curvature.eigenvalues, again.eigenvalues)
    whole = (
        make_replay(EKFAC, FORWARD, Training(recipe, compute), trajectory, np.arange(44), curvature=curvature)
        .run()
        .numpy(0, 44)
    )
    for tracked in ([7], [0, 1, 2], list(range(5, 40))):
        part = make_replay(
            EKFAC, FORWARD, Training(recipe, compute), trajectory, np.asarray(tracked), curvature=curvature
        ).run()
        assert np.array_equal(part.numpy(0, len(tracked)), whole[tracked])


def test_the_checkpoints_of_the_curvature_can_be_chosen(tmp_path):
    recipe = Small()
    uri = str(tmp_path / "trajectory.zarr")
    training = Training(recipe, DOUBLE)
    Recorder(training, uri, 3).run()
    trajectory = open_trajectory(uri)
    last = training.steps
    assert set(range(0, last, 3)) | {last} == set(trajectory.checkpoint_steps.tolist())
    found = CurvatureEstimate(Training(recipe, DOUBLE), trajectory, at=(7, 0, 10**6, 5)).run()
    assert found.steps.tolist() == [0, 6, last]
    alone = CurvatureEstimate(Training(recipe, DOUBLE), trajectory, at=(last,), core=0).run()
    spread = CurvatureEstimate(Training(recipe, DOUBLE), trajectory, checkpoints=1, core=0).run()
    assert alone.steps.tolist() == [last] != spread.steps.tolist()
    assert not np.allclose(alone.eigenvalues, spread.eigenvalues)


def test_eigenvalues_are_the_second_moments_of_drawn_gradients(tmp_path):
    """On a linear softmax model the diagonal is known: E over the model's own labels of g^2."""

    class Softmax(Small):
        def model(self):
            return torch.nn.Sequential(torch.nn.Linear(6, 3))

    recipe = Softmax()
    trajectory = recorded(recipe, tmp_path)
    curvature = estimated(recipe, trajectory)
    assert curvature.attrs["targets"] == "sampled"
    training = Training(recipe, DOUBLE)
    last = trajectory.checkpoint(-1)
    training.load_weights(last.weights, last.buffers)
    x = training.dataset.tensors[0].double()
    p = training.model(x).softmax(1).detach()
    hessian = torch.einsum("no,oq->noq", p, torch.eye(3, dtype=torch.float64)) - p[:, :, None] * p[:, None, :]
    a = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    full = torch.einsum("noq,ni,nj->oiqj", hessian, a, a).reshape(21, 21) / len(x)
    # total curvature (trace) is basis independent; drawing labels leaves sampling noise
    assert curvature.eigenvalues[-1].sum() == pytest.approx(full.trace().item(), rel=0.25)


def test_without_a_core_none_is_stored(tmp_path):
    curvature = estimated(Small(), recorded(Small(), tmp_path), core=0)
    write_curvature(str(tmp_path / "curvature.zarr"), curvature)
    assert curvature.core is None
    assert read_curvature(str(tmp_path / "curvature.zarr")).core is None


def second_moments(recipe, trajectory, k):
    """E[g g^T] over drawn labels of a linear softmax model, its expectation taken exactly."""
    training = Training(recipe, DOUBLE)
    training.load_weights(trajectory.checkpoint(k).weights, trajectory.checkpoint(k).buffers)
    x = training.dataset.tensors[0].double()
    p = training.model(x).softmax(1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    a = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    moments = torch.einsum("noq,ni,nj->oiqj", hessian, a, a) / len(x)
    size = moments.shape[0] * moments.shape[1]
    return moments.reshape(size, size)


def test_a_core_of_everything_diagonalises_the_curvature(tmp_path):
    """What stays coupled is the noise of the drawn labels, far less than what is without a core."""

    class Softmax(Small):
        def model(self):
            return torch.nn.Sequential(torch.nn.Linear(6, 3))

        def train_dataset(self):
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(3000, 6, generator=generator) + torch.linspace(0, 2, 6)
            return TensorDataset(x, (x[:, 0] > x[:, 1]).long() + (x[:, 2] > 1).long())

        epochs, batch_size = 1, 100

    recipe = Softmax()
    trajectory = recorded(recipe, tmp_path)
    layout = Training(recipe, DOUBLE).layout
    # rows of the flat vector are (weight, bias); the block's matrix is (outputs, inputs + 1)
    order = torch.arange(18).reshape(3, 6)
    order = torch.cat([order, torch.arange(18, 21)[:, None]], 1).flatten()
    full = torch.empty(21, 21, dtype=torch.float64)
    (at,) = chosen_checkpoints(trajectory, 1)
    full[order[:, None], order[None, :]] = second_moments(recipe, trajectory, at)
    coupled = {}
    for core in (0, 21):
        found = estimated(recipe, trajectory, core=core, checkpoints=1, samples=12000)
        basis = Eigenbasis(found.blocks, layout, torch.float64, torch.device("cpu"), found.core)
        turned = basis.to_eigen(basis.to_eigen(full).T)
        coupled[core] = ((turned - turned.diagonal().diag()).norm() / turned.norm()).item()
    assert coupled[21] < 0.5 * coupled[0], coupled


def test_groups_are_never_mixed():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((2, 50, 7)) @ generator.standard_normal((7, 7))
    moments = np.einsum("knc,knd->kcd", rows, rows) / 50
    groups = np.array([0, 1, 1, 0, 0, 1, 0])
    vectors, values = decoupled(moments, groups)
    assert np.abs(vectors[np.ix_(groups == 0, groups == 1)]).max() == 0
    assert np.allclose(vectors @ vectors.T, np.eye(7))
    assert np.allclose(values, ((rows @ vectors) ** 2).mean(1))
    own = np.flatnonzero(groups == 1)
    turned = (vectors.T @ moments.mean(0) @ vectors)[np.ix_(own, own)]
    assert np.abs(turned - np.diag(turned.diagonal())).max() < 1e-12 * turned.max()


def test_frozen_coordinates_never_lead():
    chosen = leading(np.array([[5.0, 9.0, 1.0, 4.0]]), np.array([0, -1, 0, 0]), 2)
    assert chosen.tolist() == [0, 3]
    assert leading(np.array([[5.0, 9.0, 1.0, 4.0]]), np.array([0, -1, 0, 0]), 9).tolist() == [0, 2, 3]


class Digits(Small):
    """Real data that is not fitted perfectly, so that curvature lasts through training."""

    epochs, batch_size = 10, 25

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))

    def _part(self, span):
        data = load_digits()
        return TensorDataset(torch.tensor(data.data[span] / 16).float(), torch.tensor(data.target[span]))

    def train_dataset(self):
        return self._part(slice(0, 500))

    def test_dataset(self):
        return self._part(slice(500, 506))


def test_it_is_much_closer_to_the_exact_form_than_the_fast_form(tmp_path):
    recipe = Digits()
    trajectory = recorded(recipe, tmp_path)
    coupled = Compute(dtype="float64", device="cpu", batch_norm="coupled")
    targets = TestGradients(Training(recipe, DOUBLE), trajectory).rows(np.arange(6)).gradient
    tracked = np.arange(500)
    exact = Adjoint(Training(recipe, coupled), trajectory, tracked, targets).run().contributions()
    fast = (
        make_replay(FAST, ADJOINT, Training(recipe, DOUBLE), trajectory, tracked, targets=targets)
        .run()
        .contributions()
    )

    def ekfac(core):
        curvature = estimated(recipe, trajectory, core=core)
        return make_replay(
            EKFAC,
            ADJOINT,
            Training(recipe, DOUBLE),
            trajectory,
            tracked,
            curvature=curvature,
            targets=targets,
        ).run()

    def rank(found):
        return np.mean([spearmanr(a, b).statistic for a, b in zip(found, exact, strict=True)])

    without, leads = rank(ekfac(0).contributions()), rank(ekfac(256).contributions())
    assert without > rank(fast) + 0.1
    assert leads > without + 0.1
