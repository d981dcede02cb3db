"""Estimators on records of Adam: the preconditioner of each checkpoint against a plain formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import EstimatorError

from tests.recipes import Small
from tests.workers.estimators.test_estimators import TESTED, TRACKED, Case, worst


class AdamW(Small):
    """One input is always 0, so that some coordinates never have a second moment."""

    def train_dataset(self):
        found = super().train_dataset()
        found.tensors[0][:, 2] = 0.0
        return found

    def optimizer(self, model):
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}]
        groups += [{"params": [p for p in model.parameters() if p.ndim < 2], "lr": 0.01}]
        return torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)


@pytest.fixture(scope="module")
def adam(tmp_path_factory):
    return Case(AdamW(), tmp_path_factory.mktemp("adam"), every=6)


def plain(case, k):
    """D of a checkpoint by its formula; 0 where v is 0."""
    kept = case.trajectory.checkpoint(k)
    assert (kept.count == kept.step).all()
    second = kept.second_moment
    return np.where(second > 0, 1 / (np.sqrt(second / (1 - 0.98**kept.step)) + 1e-6), 0.0)


def gradients(case, k):
    return case.gradients("test", TESTED, k), case.gradients("train", TRACKED, k)


def test_gradient_dot(adam):
    right = 0
    for k in (-1, -2):
        test, train = gradients(adam, k)
        right = right + (test * plain(adam, k)) @ train.T / adam.n_train / 2
    assert (plain(adam, -1) == 0).sum() == 5
    assert worst(adam.find("gradient-dot", ensemble=2, preconditioned=True).values, right) < 1e-12
    assert worst(adam.find("gradient-dot", ensemble=2).values, right) > 1e-2


def test_tracin(adam):
    groups = np.array([entry.group for entry in adam.trajectory.parameters])
    sizes = [int(np.prod(entry.shape)) for entry in adam.trajectory.parameters]
    right, before = 0, 0
    for k, step in enumerate(adam.trajectory.checkpoint_steps.tolist()):
        if step:
            test, train = gradients(adam, k)
            rate = np.repeat(adam.trajectory.learning_rate[before:step].sum(0)[groups], sizes) / adam.n_train
            right = right + (test * plain(adam, k) * rate) @ train.T
        before = step
    assert worst(adam.find("tracin", preconditioned=True).values, right) < 1e-12
    assert worst(adam.find("tracin").values, right) > 1e-2


def test_less(adam):
    right, count = 0, 0
    for k, step in enumerate(adam.trajectory.checkpoint_steps.tolist()):
        if step:
            test, train = gradients(adam, k)
            turned = train * plain(adam, k)
            lengths = np.linalg.norm(test, axis=1)[:, None] * np.linalg.norm(turned, axis=1)
            right, count = right + test @ turned.T / lengths, count + 1  # the rate is constant
    found = adam.find("less")
    assert found.notes["checkpoints"] == count == 3
    assert worst(found.values, right / count) < 1e-12
    assert np.abs(found.values).max() <= 1.0
    last = gradients(adam, -1)
    turned = last[1] * plain(adam, -1)
    lengths = np.linalg.norm(last[0], axis=1)[:, None] * np.linalg.norm(turned, axis=1)
    assert worst(adam.find("less", checkpoints=1).values, last[0] @ turned.T / lengths) < 1e-12


@pytest.mark.parametrize(
    ("name", "options"),
    [("less", {}), ("tracin", {"preconditioned": True}), ("gradient-dot", {"preconditioned": True})],
)
def test_a_record_of_sgd_has_no_preconditioner(name, options, tmp_path):
    with pytest.raises(EstimatorError, match="record is of SGD, whose steps have no preconditioner"):
        Case(Small(), tmp_path).find(name, **options)


def test_sgd_influence_is_of_sgd(adam):
    with pytest.raises(EstimatorError, match="the record is of AdamW; use run --hessian exact"):
        adam.find("sgd-influence")


def test_sgd_influence_follows_clipping(tmp_path):
    """Without momentum it is the exact adjoint, clipping included."""
    from hydra_pipe.workers.replay.adjoint import Adjoint
    from hydra_pipe.workers.training.training import Compute, Training

    class Clipped(Small):
        clip_grad_norm = 0.5

        def optimizer(self, model):
            return torch.optim.SGD(model.parameters(), lr=0.1)

    case = Case(Clipped(), tmp_path)
    assert (case.trajectory.clip_factor < 1).any()
    coupled = Compute(dtype="float64", device="cpu", batch_norm="coupled")
    targets = case.targets()
    right = Adjoint(Training(case.recipe, coupled), case.trajectory, TRACKED, targets.gradient).run()
    assert np.array_equal(case.find("sgd-influence").values, right.contributions())
