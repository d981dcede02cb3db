"""One face for every form and mode, one rule for losses that are no numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import NonFiniteLoss, ReplayDiverged
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate
from hydra_pipe.workers.recursion.forms import ADJOINT, EKFAC, EXACT, FAST, FORWARD
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests import oracle
from tests.recipes import Small, TwoGroups

DOUBLE = Compute(dtype="float64", device="cpu")
COUPLED = replace(DOUBLE, batch_norm="coupled")
TRACKED = np.array([0, 4, 9, 43])


def recorded(recipe, tmp_path, every=None):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, DOUBLE), uri, every).run()
    return open_trajectory(uri)


@pytest.mark.parametrize("form", [FAST, EKFAC, EXACT])
@pytest.mark.parametrize("kind", [Small, TwoGroups], ids=lambda k: k.__name__)
def test_every_form_has_the_same_face_and_agrees_with_itself(form, kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    given = {}
    if form == EKFAC:
        given["curvature"] = CurvatureEstimate(Training(recipe, DOUBLE), trajectory, checkpoints=2).run()
    compute = COUPLED if form == EXACT else DOUBLE
    targets = np.random.default_rng(0).standard_normal((3, len(trajectory.checkpoint(0).weights)))
    training = Training(recipe, compute)
    ahead = make_replay(form, FORWARD, training, trajectory, TRACKED, **given)
    seen = []
    assert ahead.run(lambda done, total: seen.append((done, total))) is ahead
    assert seen[-1] == (training.steps, training.steps)
    back = make_replay(
        form, ADJOINT, Training(recipe, compute), trajectory, TRACKED, targets=targets, **given
    )
    found = back.run().contributions()
    right = -targets @ ahead.numpy(0, len(TRACKED)).T / training.n_train
    assert np.abs(found - right).max() < 1e-11 * np.abs(right).max()
    products = {"products", "field", "differences", "running_statistics"}
    assert set(ahead.told()) == {"ways"} | (products if form == EXACT else set())
    assert set(back.told()) == (products if form == EXACT else {"ways"})
    for replay in (ahead, back):
        replay.close()
        hooks = (m._forward_hooks or m._forward_pre_hooks for m in replay.training.model.modules())
        assert not any(hooks)
    if form == FAST:
        rows = ahead.numpy(0, len(TRACKED))
        assert oracle.relative_error(rows, oracle.dense(recipe, trajectory, TRACKED).hypergradient) < 1e-12


class Spoilt(Replay):
    """A replay whose loss at one step is no number, though training goes on as recorded."""

    bad = 2

    def step(self, step, batch, rows):
        loss = super().step(step, batch, rows)
        if step != self.bad:
            return loss
        own = self.training.own_losses.clone()
        own[1] = torch.nan
        self.training.own_losses = own
        return own.mean()


@pytest.mark.parametrize("at_once", [True, False], ids=["CPU", "accelerator"])
def test_a_loss_that_is_no_number_is_named_with_its_step_and_sample(at_once, tmp_path):
    recipe = Small()
    trajectory = recorded(recipe, tmp_path)
    replay = Spoilt(Training(recipe, DOUBLE), trajectory, TRACKED, FastRows)
    assert replay.at_once
    replay.at_once = at_once
    sample = trajectory.batches[replay.bad][1]
    with pytest.raises(NonFiniteLoss, match=rf"nan at step 2 of \d+ \(train_index {sample}\)"):
        replay.run()
    later = [step for step in trajectory.digest_step.tolist() if step > replay.bad]
    per_epoch = replay.training.epoch_ends[0]
    assert replay.done == (3 if at_once else min(later[0], -(-3 // per_epoch) * per_epoch))


class Breaks(Spoilt):
    """The step after that loss cannot be taken at all."""

    bad = 0

    def step(self, step, batch, rows):
        if step == self.bad + 1:
            raise RuntimeError("what came of it")
        return super().step(step, batch, rows)


def test_a_loss_that_waits_to_be_looked_at_is_named_before_what_came_of_it(tmp_path):
    recipe = Small()
    trajectory = recorded(recipe, tmp_path)
    replay = Breaks(Training(recipe, DOUBLE), trajectory, TRACKED, FastRows)
    replay.at_once = False
    with pytest.raises(NonFiniteLoss, match="nan at step 0"):
        replay.run()
    assert replay.done == 1


def test_losses_are_not_looked_at_between_digests_on_an_accelerator(tmp_path, monkeypatch):
    recipe = Small()
    trajectory = recorded(recipe, tmp_path)
    replay = Replay(Training(recipe, DOUBLE), trajectory, TRACKED, FastRows)
    looks, finite = [], torch.isfinite

    def counted(tensor):
        looks.append(len(tensor))
        return finite(tensor)

    monkeypatch.setattr(torch, "isfinite", counted)
    replay.at_once = False
    replay.run()
    assert sum(looks) == replay.training.steps
    ends = replay.training.epoch_ends
    assert len(looks) == len({*ends, *trajectory.digest_step.tolist()} - {0})


@pytest.mark.parametrize("every", [1, 5])
def test_the_adjoint_is_held_against_the_last_digest_of_an_epoch(every, tmp_path):
    recipe = Small()
    trajectory = recorded(recipe, tmp_path, every)
    wrong = replace(trajectory, epoch_digest=[*trajectory.epoch_digest[:-1], "0" * 64])
    targets = np.ones((1, len(trajectory.checkpoint(0).weights)))
    with pytest.raises(ReplayDiverged, match="weights and buffers after epoch"):
        Adjoint(Training(recipe, COUPLED), wrong, TRACKED, targets).run()
