"""The growth of exact tangents: what autograd through the training says, and what float32 makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import NonFiniteTangents
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.reference.growth import Growth, check_finite
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests import oracle
from tests.recipes import BatchNormed, Nesterov, Small, TwoGroups

EXACT = Compute(dtype="float64", device="cpu", batch_norm="coupled")
SINGLE = Compute(dtype="float32", device="cpu", batch_norm="coupled")


class Wild(Small):
    """The tanh network past the edge of stability: losses stay finite, tangents grow 10,000 times."""

    epochs = 8

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)


class Waves(Small):
    """Losses within -1 and 1, whatever the weights: their derivatives grow a hundredfold a step."""

    epochs = 6

    def model(self):
        return torch.nn.Linear(6, 3)

    def losses(self, model, batch):
        return torch.sin(model(batch[0]).sum(1))

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=1000.0)


def recorded(recipe, tmp_path, compute):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri).run()
    return open_trajectory(uri)


@pytest.mark.parametrize("kind", [Small, Nesterov, TwoGroups, BatchNormed], ids=lambda k: k.__name__)
def test_growth_is_that_of_autograd_through_training(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, EXACT)
    probe = Growth(Training(recipe, EXACT), trajectory, np.array([17, 3]))
    direction = probe.change.flat().numpy()
    assert np.linalg.norm(direction) == pytest.approx(1)
    found = probe.run()
    unrolled = oracle.unrolled(recipe, trajectory, [found["train_index"]])
    jacobian = unrolled.from_start() if kind is not BatchNormed else None
    if jacobian is None:  # many weights: along a few directions
        some = np.random.default_rng(1).standard_normal((5, len(direction)))
        rows = [
            torch.cat(
                [
                    part.reshape(-1)
                    for part in torch.autograd.grad(
                        unrolled.weights, list(unrolled.start), torch.from_numpy(v), retain_graph=True
                    )
                ]
            ).numpy()
            for v in some
        ]
        assert np.allclose(some @ probe.change.flat().numpy(), np.stack(rows) @ direction, rtol=1e-9)
    else:
        some = np.eye(len(direction))
        assert found["growth"] == pytest.approx(np.linalg.norm(jacobian @ direction), rel=1e-9)
    assert found["train_index"] in (17, 3)
    assert found["deviation"] is None
    assert found["peak"] >= max(1.0, found["growth"])
    own = unrolled.along(some)[:, 0]
    assert np.linalg.norm(some @ probe.sample.flat().numpy() - own) < 1e-9 * np.linalg.norm(own)


def test_the_sample_is_the_tracked_one_that_is_visited_first(tmp_path):
    trajectory = recorded(Small(), tmp_path, EXACT)
    order = trajectory.batches.reshape(-1).tolist()
    tracked = np.arange(10, 20)
    probe = Growth(Training(Small(), EXACT), trajectory, tracked)
    assert probe.tracked.tolist() == [min(tracked.tolist(), key=order.index)]


def test_what_float32_loses_is_measured(tmp_path):
    tame = Growth(Training(Small(), SINGLE), recorded(Small(), tmp_path / "a", SINGLE), np.arange(9)).run()
    wild = Growth(Training(Wild(), SINGLE), recorded(Wild(), tmp_path / "b", SINGLE), np.arange(9)).run()
    assert tame["rounding"] < 1e-5 < tame["limit"] < wild["rounding"]
    assert wild["peak"] > 1e4
    # Rounding errors grow as the tangents do: relative to them they stay small.
    assert 0 < tame["deviation"] < 1e-5
    assert 0 < wild["deviation"] < 1e-3


def test_rounding_is_about_how_far_trainings_in_two_dtypes_end_apart(tmp_path):
    class Medium(Wild):
        def optimizer(self, model):
            return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    single = recorded(Medium(), tmp_path / "a", SINGLE)
    double = recorded(Medium(), tmp_path / "b", EXACT)
    apart = np.linalg.norm(single.checkpoint(-1).weights - double.checkpoint(-1).weights)
    found = Growth(Training(Medium(), SINGLE), single, np.arange(9)).run()
    assert 0.05 < apart / found["rounding"] < 20


def test_overflow_names_the_step(tmp_path):
    trajectory = recorded(Waves(), tmp_path, SINGLE)
    assert np.isfinite(trajectory.loss).all()
    with pytest.raises(
        NonFiniteTangents, match=r"in float32 after step \d+ of 36 .*a lower learning rate or fewer"
    ):
        Growth(Training(Waves(), SINGLE), trajectory, np.arange(45)).run()


def test_values_are_passed_on_or_explained(tmp_path):
    tame, wild = (recorded(kind(), tmp_path / kind.__name__, SINGLE) for kind in (Small, Waves))
    shared = {"what": "rows of m", "compute": SINGLE, "tracked": np.arange(45)}
    good, bad = np.ones((2, 2)), np.array([[1.0, np.nan]])
    assert check_finite(good, recipe=Small(), trajectory=tame, exact=True, **shared) is good
    with pytest.raises(NonFiniteTangents, match=r"after step \d+ of 36"):
        check_finite(bad, recipe=Waves(), trajectory=wild, exact=True, **shared)
    for exact in (True, False):  # nothing to be seen step by step: said without one
        with pytest.raises(NonFiniteTangents, match="rows of m are not finite in float32, though every loss"):
            check_finite(bad, recipe=Small(), trajectory=tame, exact=exact, **shared)
