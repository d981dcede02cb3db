"""EKFAC with Adam and with clipping: against the dense recursion with the same curvature."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra_pipe.storage.curvature import read_curvature, write_curvature
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate
from hydra_pipe.workers.ekfac.eigenbasis import Eigenbasis, diagonal
from hydra_pipe.workers.ekfac.metric import outer_factors, outer_fit, preconditioners
from hydra_pipe.workers.persample.engine import PerSampleGradients
from hydra_pipe.workers.recursion import eigencoefficients
from hydra_pipe.workers.recursion.coefficients import recorded_settings
from hydra_pipe.workers.recursion.eigencoefficients import EigenCoefficients, cut_directions
from hydra_pipe.workers.recursion.forms import ADJOINT, EKFAC, EXACT, FAST, FORWARD
from hydra_pipe.workers.reference.dense import DenseReference
from hydra_pipe.workers.replay.by_epoch import ByEpoch
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn

from tests.recipes import Small

DOUBLE = Compute(dtype="float64", device="cpu")
TRACKED = np.array([0, 4, 17, 43])


class AdamW(Small):
    """Two groups and a rate that moves with beta1."""

    kind: type = torch.optim.AdamW
    decay = 0.05

    def optimizer(self, model):
        weights = [p for p in model.parameters() if p.ndim > 1]
        biases = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": weights, "weight_decay": self.decay}, {"params": biases, "weight_decay": 0.0}]
        return self.kind(groups, lr=0.03, betas=(0.9, 0.97))

    scheduler_interval = "step"

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=40)


class OneGroup(AdamW):
    def optimizer(self, model):
        return self.kind(model.parameters(), lr=0.03, betas=(0.9, 0.97), weight_decay=self.decay)


class Coupled(OneGroup):
    kind = torch.optim.Adam


class Clipped(OneGroup):
    clip_grad_norm = 0.5


class ClippedCoupled(Coupled):
    clip_grad_norm = 0.5


class Accumulated(Clipped):
    accumulate = 3


class Dead(OneGroup):
    """One input is always 0: its weights are never moved by a gradient."""

    def train_dataset(self):
        found = super().train_dataset()
        found.tensors[0][:, 2] = 0.0
        return found


class Tables(OneGroup):
    """A convolution, and a norm layer, which keeps its own axes."""

    shape = (2, 5, 5)

    def model(self):
        parts = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(27, 3)]
        return nn.Sequential(*parts)


class Late(OneGroup):
    """A layer that has no gradient in the first steps."""

    def model(self):
        return Opening()


class Opening(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.late, self.last = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        found = self.first(x)
        if self.training:
            self.calls += 1
        if self.calls > 4:
            found = found + self.late(x)
        return self.last(torch.tanh(found))


class ClippedSGD(Small):
    clip_grad_norm = 0.5


class AccumulatedSGD(ClippedSGD):
    accumulate = 2


def recorded(recipe, folder, compute=DOUBLE, every=4):
    uri = str(folder / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri, every).run()
    return open_trajectory(uri)


def estimated(recipe, trajectory, compute=DOUBLE, **options):
    return CurvatureEstimate(Training(recipe, compute), trajectory, **{"checkpoints": 2, **options}).run()


def dense(recipe, trajectory, curvature):
    """Carry du and the optimiser's tangent step by step, blocks as matrices, gradients by autograd one at a time."""
    reference = DenseReference(Training(recipe, DOUBLE), trajectory, TRACKED, ("ekfac",), curvature)
    return reference.run().hypergradients("ekfac")


@pytest.mark.parametrize(
    ("kind", "core"),
    [
        *((kind, 256) for kind in (AdamW, OneGroup, Coupled, Clipped, ClippedCoupled, Accumulated)),
        *((kind, 256) for kind in (Dead, Tables, Late, ClippedSGD, AccumulatedSGD)),
        (Coupled, 9),
        (Clipped, 0),
    ],
    ids=lambda k: getattr(k, "__name__", str(k)),
)
def test_equals_the_dense_recursion_with_the_same_curvature(kind, core, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    curvature = estimated(recipe, trajectory, core=core)
    given = (trajectory, TRACKED)
    replay = make_replay(EKFAC, FORWARD, Training(recipe, DOUBLE), *given, curvature=curvature).run()
    found = replay.numpy(0, len(TRACKED))
    right = dense(recipe, trajectory, curvature)
    assert np.abs(found - right).max() < 1e-11 * np.abs(right).max()
    flat = replace(curvature, eigenvalues=np.zeros_like(curvature.eigenvalues))
    dropped = make_replay(EKFAC, FORWARD, Training(recipe, DOUBLE), *given, curvature=flat).run()
    assert np.abs(dropped.numpy(0, len(TRACKED)) - right).max() > 1e-3 * np.abs(right).max()
    targets = np.random.default_rng(0).standard_normal((3, right.shape[1]))
    back = make_replay(
        EKFAC, ADJOINT, Training(recipe, DOUBLE), *given, curvature=curvature, targets=targets
    ).run()
    expected = -(targets @ right.T) / len(recipe.train_dataset())
    assert np.abs(back.contributions() - expected).max() < 1e-11 * np.abs(expected).max()
    if "clip" in kind.__name__.lower() or kind in (Accumulated, AccumulatedSGD):
        assert (trajectory.clip_factor < 1).any()
        unclipped = replace(trajectory, clip_factor=None, clip_norm=None)
        other = make_replay(
            EKFAC, FORWARD, Training(recipe, DOUBLE), unclipped, TRACKED, curvature=curvature
        ).run()
        assert np.abs(other.numpy(0, len(TRACKED)) - right).max() > 1e-2 * np.abs(right).max()


@pytest.mark.parametrize("kind", [ClippedCoupled, Tables, AccumulatedSGD], ids=lambda k: k.__name__)
def test_any_subset_gives_the_same_bits(kind, tmp_path):
    recipe, compute = kind(), Compute(device="cpu")
    trajectory = recorded(recipe, tmp_path, compute)
    curvature = estimated(recipe, trajectory, compute)
    assert np.array_equal(curvature.eigenvalues, estimated(recipe, trajectory, compute).eigenvalues)

    def rows(tracked):
        replay = make_replay(
            EKFAC, FORWARD, Training(recipe, compute), trajectory, tracked, curvature=curvature
        )
        return replay.run().numpy(0, len(tracked))

    whole = rows(np.arange(44))
    for tracked in ([7], [0, 1, 2], list(range(5, 40))):
        assert np.array_equal(rows(np.asarray(tracked)), whole[tracked])


def test_the_metric_is_that_of_the_checkpoints(tmp_path):
    """P and rho bring D_t back: exactly in the geometric mean of every lane, at every checkpoint."""
    recipe = Dead()
    trajectory = recorded(recipe, tmp_path)
    curvature = estimated(recipe, trajectory)
    settings, layout = recorded_settings(trajectory), Training(recipe, DOUBLE).layout
    lanes = layout.column_groups().numpy()
    metric = curvature.metric
    dead = np.zeros(layout.dimension, dtype=bool)
    dead[:30].reshape(5, 6)[:, 2] = True
    assert np.array_equal(metric.scale == 0, dead)
    seen = 0
    for update, logarithm, moved in preconditioners(trajectory, settings, lanes):
        assert np.array_equal(moved, ~dead)
        error = (logarithm - np.log(np.where(dead, 1.0, metric.scale * metric.rate[update, 0])))[moved]
        assert abs(error.mean()) < 1e-12
        seen += 1
    assert seen == len(trajectory.checkpoint_steps) - 1
    kept = trajectory.checkpoint(-1)
    root = np.sqrt(kept.second_moment / (1 - 0.97 ** kept.count[0]))
    assert np.allclose(np.exp(logarithm), 1 / (root + 1e-8))


def test_the_metric_is_an_outer_product_where_gradients_are(tmp_path):
    p, q = np.array([3.0, 0.5, 2.0]), np.array([1.0, 7.0, 0.1, 4.0])
    there = np.ones((4, 4), dtype=bool)
    there[3], there[0, 1], there[2, 3] = False, False, False
    fitted, seen = outer_fit(np.where(there, np.log(np.outer(np.append(p, 1.0), q)), 9.0), there)
    assert np.allclose(np.exp(fitted[:3]), np.outer(p, q), rtol=1e-9)
    assert np.array_equal(seen, np.repeat([[True], [True], [True], [False]], 4, 1))
    recipe = Tables()
    curvature = estimated(recipe, recorded(recipe, tmp_path))
    layout = Training(recipe, DOUBLE).layout
    basis = Eigenbasis(curvature.blocks, layout, torch.float64, torch.device("cpu"), None)
    found = {}
    for k, block in enumerate(basis.blocks):
        matrix = basis.matrix(torch.from_numpy(curvature.metric.scale), k).numpy()
        found[layout.entries[block.entries[0]].name] = outer_factors(matrix) is not None
    assert found["0.weight"] is False  # a convolution's gradient is no outer product
    assert found["4.weight"] is True


@pytest.mark.parametrize("how", ["another metric", "rows come whole"])
def test_gradients_that_do_not_come_as_factors(how, tmp_path, monkeypatch):
    """A metric that is no outer product, as older runs have it; a layer whose rule does not fit some steps."""
    recipe = Clipped()
    trajectory = recorded(recipe, tmp_path)
    curvature = estimated(recipe, trajectory, core=9)
    if how == "another metric":
        noise = np.random.default_rng(0).standard_normal(len(curvature.metric.scale))
        scale = curvature.metric.scale * np.exp(0.3 * noise)
        curvature = replace(curvature, metric=replace(curvature.metric, scale=scale))
    else:
        calls = itertools.count()
        monkeypatch.setattr(PerSampleGradients, "_misfits", lambda *_: [0] if next(calls) % 3 == 1 else [])
    replay = make_replay(EKFAC, FORWARD, Training(recipe, DOUBLE), trajectory, TRACKED, curvature=curvature)
    assert bool(replay.sink.engine.sides) == (how != "another metric")
    right = dense(recipe, trajectory, curvature)
    assert np.abs(replay.run().numpy(0, 4) - right).max() < 1e-11 * np.abs(right).max()


def test_coefficients_made_again_are_those_of_the_table(tmp_path, monkeypatch):
    recipe = ClippedCoupled()
    trajectory = recorded(recipe, tmp_path)
    curvature = estimated(recipe, trajectory)
    lanes = torch.zeros(curvature.eigenvalues.shape[1], dtype=torch.int64)
    given = (recorded_settings(trajectory), lanes, curvature, torch.device("cpu"), torch.float32)
    whole = EigenCoefficients(*given)
    monkeypatch.setattr(eigencoefficients, "TABLE_BYTES", 0)
    again = EigenCoefficients(*given)
    steps = range(len(trajectory.batches))
    assert 1 < again.length < whole.length == len(steps)
    assert all(torch.equal(whole.at(t), again.at(t)) for t in [*steps, 3])


def test_the_stores_keep_the_metric(tmp_path):
    recipe = Coupled()
    curvature = estimated(recipe, recorded(recipe, tmp_path), core=5)
    write_curvature(str(tmp_path / "curvature.zarr"), curvature)
    again = read_curvature(str(tmp_path / "curvature.zarr")).metric
    assert np.array_equal(again.scale, curvature.metric.scale)
    assert np.array_equal(again.rate, curvature.metric.rate)
    assert np.array_equal(again.decay, curvature.metric.decay)
    layout = Training(recipe, DOUBLE).layout
    basis = Eigenbasis(curvature.blocks, layout, torch.float64, torch.device("cpu"), curvature.core)
    turn = basis.to_parameters(torch.eye(layout.dimension, dtype=torch.float64)).numpy()
    assert np.allclose(np.diag(turn @ np.diag(again.scale) @ turn.T), diagonal(basis, again.scale))
    other = estimated(OneGroup(), recorded(OneGroup(), tmp_path))
    assert other.metric.decay is None


def test_eigenvalues_beyond_what_a_step_bears_are_counted_and_cut(tmp_path):
    recipe = OneGroup()
    trajectory = recorded(recipe, tmp_path)
    curvature = estimated(recipe, trajectory, core=0)
    settings = recorded_settings(trajectory)
    lanes = np.zeros(curvature.eigenvalues.shape[1], dtype=np.int64)
    assert cut_directions(settings, lanes, curvature) == 0
    high = curvature.eigenvalues.copy()
    high[:, [3, 5]] = 1e9
    cut = replace(curvature, eigenvalues=high)
    assert cut_directions(settings, lanes, cut) == 2
    replay = make_replay(EKFAC, FORWARD, Training(recipe, DOUBLE), trajectory, TRACKED, curvature=cut).run()
    assert np.isfinite(replay.numpy(0, 4)).all()
    # The roots of z^2 - z (1 - e - h s k x + p) + p (1 - e) stay inside the unit circle at every step.
    form = replay.sink.coefficients.bent.form
    for t in range(len(settings.learning_rate)):
        e, p = form.shrink[t, 0], form.carry[t, 0]
        push = form.rate[t, 0] * form.along[t, 0] * form.gain[t, 0]
        x = float(replay.sink.coefficients.bent.curvature(t)[3])
        roots = np.roots([1.0, -(1 - e - push * x + p), p * (1 - e)])
        assert 0.9 < np.abs(roots).max() < 1.0


@pytest.mark.parametrize("kind", [ClippedCoupled, AccumulatedSGD], ids=lambda k: k.__name__)
def test_states_by_epoch_end_where_the_closed_forms_do(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    curvature = estimated(recipe, trajectory)
    coupled = replace(DOUBLE, batch_norm="coupled")
    tested, epochs = np.array([1, 4]), [1, recipe.epochs]
    followed = ByEpoch(
        recipe,
        DOUBLE,
        coupled,
        trajectory,
        tracked=TRACKED,
        first_row=0,
        tested=tested,
        epochs=epochs,
        curvature=curvature,
    )
    assert [epoch for epoch, _states in followed.run()] == epochs
    for form in (FAST, EKFAC, EXACT):
        training = Training(recipe, coupled if form == EXACT else DOUBLE)
        bent = curvature if form == EKFAC else None
        whole = make_replay(form, FORWARD, training, trajectory, TRACKED, curvature=bent).run().numpy(0, 4)
        assert np.abs(followed.forms[form]().numpy() - whole).max() < 1e-11 * np.abs(whole).max()
