"""States over training: at each epoch what the oracle gets from a training that ended there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import ReplayDiverged
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.determinism import seed_everything
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate
from hydra_pipe.workers.estimators import make
from hydra_pipe.workers.estimators.influence_after import influence_after
from hydra_pipe.workers.recursion.coefficients import coefficients, recorded_settings
from hydra_pipe.workers.recursion.forms import FORWARD
from hydra_pipe.workers.recursion.segments import Segments
from hydra_pipe.workers.replay import segmented as segment_replay
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.by_epoch import EKFAC, EXACT, FAST, RAW, ByEpoch, pairs
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.test_gradients import TestGradients
from hydra_pipe.workers.training.training import Compute, Training
from hydra_pipe.workers.training.truncated import ended_at, standing, trained_until, with_decay
from hydra_pipe.workers.training.verified import VerifiedReplay

from tests import oracle
from tests.recipes import (
    BatchNormed,
    Dampened,
    Images,
    Nesterov,
    OneCycle,
    Plain,
    Plateau,
    Sequences,
    Small,
    TwoGroups,
)

DOUBLE = Compute(dtype="float64", device="cpu")
COUPLED = Compute(dtype="float64", device="cpu", batch_norm="coupled")
SINGLE = Compute(device="cpu")
TRACKED, TESTED = np.array([0, 3, 17, 43]), np.array([1, 4, 5])
KINDS = [Small, Plain, Nesterov, Dampened, TwoGroups, OneCycle, Plateau, Images, BatchNormed, Sequences]


def recorded(recipe, tmp_path, compute=DOUBLE, every=None):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri, every).run()
    return open_trajectory(uri)


def ended(recipe, trajectory, epoch, compute=DOUBLE):
    return trained_until(Training(recipe, compute), trajectory, epoch)


def follow(recipe, trajectory, epochs, tracked=TRACKED, first_row=0, compute=DOUBLE, exact=COUPLED, **more):
    over = ByEpoch(
        recipe,
        compute,
        exact,
        trajectory,
        tracked=tracked,
        first_row=first_row,
        tested=TESTED,
        epochs=epochs,
        **more,
    )
    found = {}
    for epoch, states in over.run():
        rows = {name: form().clone().numpy() for name, form in over.forms.items()}
        found[epoch] = (states, rows)
    over.close()
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_every_epoch_is_what_a_training_that_ended_there_gives(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    n_train = len(recipe.train_dataset())
    found = follow(recipe, trajectory, range(1, recipe.epochs + 1), raw_decay=True)
    assert list(found) == list(range(1, recipe.epochs + 1))
    directions = np.random.default_rng(0).standard_normal((3, len(trajectory.checkpoint(0).weights)))
    for epoch, (states, rows) in found.items():
        until = ended(recipe, trajectory, epoch)
        assert until.last.step == len(until.batches) == epoch * (len(trajectory.batches) // recipe.epochs)
        right = oracle.dense(recipe, until, TRACKED)
        assert np.abs(right.weights - until.last.weights).max() < 1e-12
        assert oracle.relative_error(rows[FAST], right.hypergradient) < oracle.DENSE_FLOAT64
        along = oracle.unrolled(recipe, until, TRACKED).along(directions)
        assert np.abs(directions @ rows[EXACT].T - along).max() < oracle.EXACT_FLOAT64 * np.abs(along).max()
        gradients = oracle.test_gradients(recipe, right.model, TESTED)
        for name in (FAST, EXACT):
            expected = oracle.contributions(rows[name], gradients, n_train)
            size = np.abs(expected).max()
            state = states[name]
            assert np.abs(state.contribution - expected).max() < 1e-11 * size
            assert np.abs(state.mean - expected.mean(1)).max() < 1e-11 * size
            assert state.norm == pytest.approx(np.linalg.norm(rows[name], axis=1), rel=1e-12, abs=1e-300)
        assert states[EXACT].error == {}
        distance = np.linalg.norm(rows[FAST] - rows[EXACT], axis=1)
        assert states[FAST].error[EXACT] == pytest.approx(distance, rel=1e-12)


@pytest.mark.parametrize("kind", [Small, Nesterov, TwoGroups, OneCycle], ids=lambda k: k.__name__)
def test_raw_decay_changes_the_recursion_and_not_the_training(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    n_train = len(recipe.train_dataset())
    found = follow(recipe, trajectory, [2, 3], raw_decay=True)
    weights = weights_along(recipe, trajectory)
    for epoch, (states, rows) in found.items():
        until = ended(recipe, trajectory, epoch)
        raw = with_decay(until, n_train)
        assert np.array_equal(raw.weight_decay, until.weight_decay * n_train)
        # The oracle's recursion with N times the decay, along gradients of the real training.
        right = raw_oracle(recipe, until, raw, weights)
        assert oracle.relative_error(rows[FAST + RAW], right) < oracle.DENSE_FLOAT64
        bent = raw_oracle(recipe, until, raw, weights, hessian=True)
        assert oracle.relative_error(rows[EXACT + RAW], bent) < oracle.EXACT_FLOAT64
        assert set(states[FAST + RAW].error) == {EXACT, EXACT + RAW}
        distance = np.linalg.norm(rows[FAST + RAW] - rows[EXACT + RAW], axis=1)
        assert states[FAST + RAW].error[EXACT + RAW] == pytest.approx(distance, rel=1e-12)
        if (trajectory.weight_decay > 0).any():
            assert oracle.relative_error(rows[FAST + RAW], rows[FAST]) > 1e-3


def raw_oracle(recipe, until, raw, weights, hessian=False):
    """Algorithm 1 (or Eq. 33-34) densely, own gradients and Hessians by autograd at the recorded weights."""
    dataset = recipe.train_dataset()
    seed_everything(recipe.seed)  # for what is frozen
    model = recipe.model().double()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = np.concatenate([np.full(int(np.prod(e.shape)), e.group) for e in until.parameters])
    du = np.zeros((len(TRACKED), len(groups)))
    dm: list[np.ndarray | None] = [None] * len(TRACKED)

    def losses(flat, rows):
        parts = flat.split([p.numel() for p in parameters.values()])
        state = {n: w.view(p.shape) for (n, p), w in zip(parameters.items(), parts, strict=True)}
        x, y = dataset.tensors[0][rows].double(), dataset.tensors[1][rows]
        out = torch.func.functional_call(model, state, (x,))
        return torch.nn.functional.cross_entropy(out, y, reduction="none")

    for step, row in enumerate(until.batches):
        members = row[row >= 0]
        w = torch.from_numpy(weights[step])
        bent = np.zeros_like(du)
        if hessian:
            matrix = torch.autograd.functional.hessian(lambda v, m=members: losses(v, m).mean(), w).numpy()
            bent = du @ matrix
        for k, i in enumerate(TRACKED):
            own = np.zeros(len(groups))
            if i in members:
                own = torch.autograd.functional.jacobian(lambda v, j=i: losses(v, [j])[0], w).numpy()
            settings = {
                name: np.append(getattr(raw, name)[step], 0)[groups]
                for name in ("learning_rate", "momentum", "weight_decay", "dampening", "nesterov")
            }
            g = own * len(dataset) / len(members) + bent[k] + settings["weight_decay"] * du[k]
            p = settings["momentum"]
            dm[k] = g if dm[k] is None else p * dm[k] + (1 - settings["dampening"]) * g
            move = np.where(settings["nesterov"], g + p * dm[k], dm[k])
            du[k] -= settings["learning_rate"] * move
    return du


def weights_along(recipe, trajectory):
    """Return the weights before every step of the record."""
    kept = []

    class Watching(VerifiedReplay):
        def step(self, step, batch, rows):
            kept.append(self.training.weights().numpy().copy())
            return super().step(step, batch, rows)

    Watching(Training(recipe, DOUBLE), trajectory, np.empty(0, dtype=np.int64)).replay()
    return kept


@pytest.mark.parametrize("kind", [Small, TwoGroups, OneCycle, Images, BatchNormed], ids=lambda k: k.__name__)
@pytest.mark.parametrize("table", [1, 64 << 20], ids=["borders at every step", "long segments"])
def test_ekfac_carries_the_same_recursion_as_its_closed_form(kind, table, tmp_path, monkeypatch):
    monkeypatch.setattr(segment_replay, "TABLE_BYTES", table)
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    curvature = CurvatureEstimate(Training(recipe, DOUBLE), trajectory, checkpoints=2).run()
    found = follow(recipe, trajectory, [1, recipe.epochs], curvature=curvature)
    whole = make_replay(
        EKFAC, FORWARD, Training(recipe, DOUBLE), trajectory, TRACKED, curvature=curvature
    ).run()
    rows = found[recipe.epochs][1][EKFAC]
    assert oracle.relative_error(rows, whole.numpy(0, 4)) < 1e-11
    values, basis = whole.sink.coefficients, whole.sink.basis

    def bend(step, du):
        turned = basis.to_eigen(torch.from_numpy(du)[None])
        return basis.to_parameters(turned * values.bent.curvature(step))[0].numpy()

    right = oracle.dense(recipe, ended(recipe, trajectory, 1), TRACKED, curvature=bend).hypergradient
    assert oracle.relative_error(found[1][1][EKFAC], right) < 1e-11


@pytest.mark.parametrize("kind", [Small, Nesterov, Dampened, TwoGroups, OneCycle, Plateau])
def test_segments_in_a_row_are_the_closed_form(kind, tmp_path):
    """The last segment's coefficients are c_t; earlier ones reach the end through the maps."""
    settings = recorded_settings(recorded(kind(), tmp_path))
    right = coefficients(settings)
    segments = Segments(settings, torch.from_numpy)
    steps = len(right)
    borders = [0, 1, 5, steps // 2, steps]
    parts = [segments.between(a, b) for a, b in itertools.pairwise(borders)]
    onto = torch.eye(2, dtype=torch.float64)[:, :, None].expand(2, 2, right.shape[1])[0]
    for part in reversed(parts):
        found = (onto[:, None] * part.on).sum(0)
        assert np.abs(found.numpy() - right[part.first : part.stop]).max() < 1e-13
        onto = torch.einsum("fg,fkg->kg", onto, part.carried)


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed], ids=lambda k: k.__name__)
def test_single_precision_is_close_to_the_dense_form(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, SINGLE)
    exact = Compute(device="cpu", batch_norm="coupled")
    found = follow(recipe, trajectory, [1, 2], compute=SINGLE, exact=exact)
    for epoch, (_, rows) in found.items():
        right = oracle.dense(recipe, ended(recipe, trajectory, epoch, SINGLE), TRACKED).hypergradient
        assert oracle.relative_error(rows[FAST], right) < oracle.DENSE_FLOAT32


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed], ids=lambda k: k.__name__)
def test_any_cut_gives_the_same_bits(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, SINGLE)
    curvature = CurvatureEstimate(Training(recipe, SINGLE), trajectory, checkpoints=2).run()
    given = {"compute": SINGLE, "exact": Compute(device="cpu", batch_norm="coupled")}
    given |= {"curvature": curvature, "raw_decay": True}
    everyone = np.arange(0, 44, 4)
    whole = follow(recipe, trajectory, [1, 2], tracked=everyone, **given)
    for start, stop in ((0, 3), (3, 11)):
        part = follow(recipe, trajectory, [1, 2], tracked=everyone[start:stop], first_row=start, **given)
        for epoch, (states, _) in part.items():
            for name, state in states.items():
                right = whole[epoch][0][name]
                assert np.array_equal(state.contribution, right.contribution[start:stop]), name
                assert np.array_equal(state.mean, right.mean[start:stop])
                assert np.array_equal(state.norm, right.norm[start:stop])
                for reference, error in state.error.items():
                    assert np.array_equal(error, right.error[reference][start:stop])


def test_the_ended_record_is_that_of_a_shorter_training(tmp_path):
    """Schedules that do not look ahead: two epochs of three are the record of a training of two."""
    recipe = Nesterov()
    trajectory = recorded(recipe, tmp_path, every=5)
    shorter = Nesterov()
    shorter.epochs = 2
    (tmp_path / "short").mkdir()
    right = recorded(shorter, tmp_path / "short", every=5)
    until = ended(recipe, trajectory, 2)
    for name in ("batches", "learning_rate", "coefficient", "loss", "checkpoint_steps"):
        assert np.array_equal(getattr(until, name), getattr(right, name)), name
    assert until.epoch_digest == right.epoch_digest
    for k in (0, 1, -1):
        assert np.array_equal(until.checkpoint(k).weights, right.checkpoint(k).weights)
        assert np.array_equal(until.checkpoint(k).momentum, right.checkpoint(k).momentum)
    tracked = np.arange(9)
    rows = Replay(Training(shorter, DOUBLE), until, tracked, FastRows).run().numpy(0, 9)
    assert np.array_equal(rows, Replay(Training(shorter, DOUBLE), right, tracked, FastRows).run().numpy(0, 9))
    same = ended_at(until, 1, standing_after(recipe, trajectory, 1))
    assert np.array_equal(same.coefficient, ended(recipe, trajectory, 1).coefficient)


def standing_after(recipe, trajectory, epoch):
    training = Training(recipe, DOUBLE)
    until = trained_until(training, trajectory, epoch)
    return standing(training, until.last.step)


def test_another_training_is_noticed_at_the_epoch(tmp_path):
    trajectory = recorded(Small(), tmp_path)
    trajectory.epoch_digest[0] = "0" * 64
    with pytest.raises(ReplayDiverged, match="after epoch 1"):
        ended(Small(), trajectory, 1)


@pytest.mark.parametrize("name", ["influence-cg", "influence-lissa"])
@pytest.mark.parametrize("by_test", [False, True])
def test_influence_at_an_epoch_is_that_of_a_training_that_ended_there(name, by_test, tmp_path):
    recipe = Small()
    trajectory = recorded(recipe, tmp_path)
    options = {"influence-cg": {"damping": 1.0, "tolerance": 1e-12}}.get(name, {"damping": 1.0, "depth": 50})
    found = influence_after(
        recipe,
        DOUBLE,
        trajectory,
        2,
        make(name, options),
        tracked=TRACKED,
        tested=TESTED,
        by_test=by_test,
        report=lambda done, total: None,
    )
    shorter = Small()
    shorter.epochs = 2
    (tmp_path / "short").mkdir()
    short = recorded(shorter, tmp_path / "short")
    gradient = TestGradients(Training(shorter, DOUBLE), short).rows(TESTED).gradient
    from hydra_pipe.workers.estimators.base import Ground, Targets

    ground = Ground(training=Training(shorter, DOUBLE), trajectory=short, tracked=TRACKED)
    right = make(name, options).contributions(ground, Targets(index=TESTED, gradient=gradient), print_nothing)
    assert np.abs(found.mean - right.values.mean(0)).max() < 1e-9 * np.abs(right.values).max()
    if by_test:
        assert np.array_equal(found.contribution, right.values.T)
    else:
        assert found.contribution is None


def print_nothing(_done, _total):
    pass


def test_pairs():
    assert pairs([EXACT, FAST, "influence-cg"]) == [(EXACT, FAST), (EXACT, "influence-cg")]
    both = pairs([EXACT, FAST, EKFAC, EXACT + RAW, FAST + RAW, "influence-cg"])
    assert [method for reference, method in both if reference == EXACT + RAW] == [FAST + RAW, "influence-cg"]
    assert (EXACT, EXACT + RAW) in both
