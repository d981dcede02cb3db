"""Per-sample gradients of odd trainings against the oracle, and what the engine says of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import ConservationBroken, DoesNotFit, RecipeError
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.persample import trials
from hydra_pipe.workers.persample.engine import PerSampleGradients
from hydra_pipe.workers.recursion.conservation import RowSums, check_sums, law_of
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.test_gradients import TestGradients
from hydra_pipe.workers.training.training import Compute, Training
from hydra_pipe.workers.training.trials import tried_ways
from torch import nn

from hydra_pipe import RunSpec, run
from tests import oracle
from tests.odd_recipes import SIMPLE, Adapters, Mining, Odd, RareDrop, RareRow, Stateful, Weighted
from tests.recipes import BatchNormed, Small

DOUBLE = Compute(dtype="float64", device="cpu")


def recorded(recipe, tmp_path, compute=DOUBLE):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri).run()
    return open_trajectory(uri)


def replayed(recipe, trajectory, tracked, compute=DOUBLE):
    replay = Replay(Training(recipe, compute), trajectory, np.asarray(tracked), FastRows)
    rows = replay.run().numpy(0, len(tracked)).copy()
    replay.close()
    return rows, replay


@pytest.fixture(scope="module", params=SIMPLE, ids=lambda k: k.__name__)
def followed(request, tmp_path_factory):
    """A recipe, its record, and the rows of all its samples."""
    recipe = request.param()
    trajectory = recorded(recipe, tmp_path_factory.mktemp("followed"))
    return recipe, trajectory, replayed(recipe, trajectory, list(range(recipe.count)))[0]


def test_rows_are_those_of_each_sample_in_its_batch(followed):
    recipe, trajectory, rows = followed
    right = oracle.dense(recipe, trajectory, list(range(recipe.count)))
    assert oracle.relative_error(rows, right.hypergradient) < oracle.DENSE_FLOAT64
    for entry in trajectory.parameters:  # none is right on average alone
        span = slice(entry.start, entry.start + int(np.prod(entry.shape)))
        part = right.hypergradient[:, span]
        assert np.abs(part).max() > 0, entry.name
        assert np.abs(rows[:, span] - part).max() <= 1e-11 * np.abs(part).max(), entry.name


def test_a_subset_has_the_same_bits(followed):
    recipe, trajectory, rows = followed
    some = [1, 7, 22]
    few, _ = replayed(recipe, trajectory, some)
    assert few.tobytes() == rows[some].tobytes()


@pytest.mark.parametrize("kind", ["spectral", "instance", "center"])
def test_batch_norm_beside_a_state_is_traced_coupled(kind, tmp_path):
    recipe = Stateful(kind)
    training = Training(recipe, DOUBLE)
    assert not training.holds_statistics
    trajectory = recorded(recipe, tmp_path)
    everyone = list(range(recipe.count))
    right = oracle.dense(recipe, trajectory, everyone, batch_norm="coupled")
    rows, _ = replayed(recipe, trajectory, everyone)
    assert oracle.relative_error(rows, right.hypergradient) < 1e-11


def test_batch_norm_alone_still_holds_its_statistics():
    training = Training(BatchNormed(), DOUBLE)
    before = {name: b.clone() for name, b in training.model.named_buffers()}
    assert training.holds_statistics
    assert all(torch.equal(before[name], b) for name, b in training.model.named_buffers())


def test_always_vjp_is_the_same_to_rounding(tmp_path):
    recipe = Small()
    trajectory = recorded(recipe, tmp_path)
    rows, _ = replayed(recipe, trajectory, [0, 5, 44])
    slow, replay = replayed(
        recipe, trajectory, [0, 5, 44], Compute(dtype="float64", device="cpu", per_sample="vjp")
    )
    assert set(replay.sink.engine.strategies) == {"vjp"}
    assert oracle.relative_error(slow, rows) < 1e-13


def test_what_is_zero_at_first_is_tried_later(tmp_path):
    recipe = Adapters()
    names = [entry.name for entry in Training(recipe, DOUBLE).layout.entries]
    first = tried_ways(Training(recipe, DOUBLE))
    assert {names[i] for i in first.untried} >= {"0.A", "2.A"}
    later = tried_ways(Training(recipe, DOUBLE), recorded(recipe, tmp_path))
    assert not later.untried
    assert later.trials > first.trials


def test_random_losses_and_losses_that_see_each_other_are_known(tmp_path):
    assert tried_ways(Training(RareDrop(), DOUBLE)).random
    for kind in (Mining, Weighted):
        ways = tried_ways(Training(kind(), DOUBLE))
        assert ways.coupled
        assert "func" not in ways.strategies
    assert tried_ways(Training(Small(), DOUBLE)).coupled is False


def test_a_sample_whose_loss_is_another_alone_is_traced_in_its_batch(tmp_path):
    """One sample makes the losses of its batch see each other, and no trial holds it: only the step can tell."""

    class Late(Odd):
        count = 128

        def train_dataset(self):
            data = super().train_dataset()
            data.tensors[0][13, 0] = 50.0
            return data

        def model(self):
            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.fc, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(6))

                def forward(self, x):
                    return self.fc(self.scale * torch.tanh(x))

            return Net()

        def losses(self, model, batch):
            found = super().losses(model, batch)
            seen = (batch[0][:, 0] > 40).any()
            return found * torch.where(seen, (found / found.mean()).detach(), 1.0)

    recipe = Late()
    Recorder(Training(recipe, DOUBLE), str(tmp_path / "trajectory.zarr"), 31).run()  # two trials
    trajectory = open_trajectory(str(tmp_path / "trajectory.zarr"))
    everyone = list(range(recipe.count))
    right = oracle.dense(recipe, trajectory, everyone)
    rows, replay = replayed(recipe, trajectory, everyone)
    assert "func" in replay.sink.engine.strategies
    assert replay.sink.engine.repaired == {"scale"}
    assert oracle.relative_error(rows, right.hypergradient) < oracle.DENSE_FLOAT64


def test_a_layer_that_sees_part_of_a_batch_later_is_traced_in_the_batch(tmp_path):
    class Later(Odd):
        epochs, shape = 4, (48,)

        def model(self):
            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.fc, self.out = nn.Linear(48, 48), nn.Linear(48, 3)
                    self.register_buffer("t", torch.zeros((), dtype=torch.long))

                def forward(self, x):
                    if self.training:
                        self.t += 1
                    if int(self.t) in (5, 6):
                        return self.out(torch.cat([torch.tanh(self.fc(x[:3])), torch.tanh(self.fc(x[3:]))]))
                    return self.out(torch.tanh(self.fc(x)))

            return Net()

    recipe = Later()
    Recorder(Training(recipe, DOUBLE), str(tmp_path / "trajectory.zarr"), 6).run()
    trajectory = open_trajectory(str(tmp_path / "trajectory.zarr"))
    everyone = list(range(recipe.count))
    right = oracle.dense(recipe, trajectory, everyone)
    rows, replay = replayed(recipe, trajectory, everyone)
    assert replay.sink.engine.factored  # and still right where a step does not give factors
    assert replay.sink.engine.repaired == {"fc.weight", "fc.bias"}
    assert oracle.relative_error(rows, right.hypergradient) < oracle.DENSE_FLOAT64


def test_a_backward_pass_that_does_not_scale_is_refused():
    class Clipped(Odd):
        def losses(self, model, batch):
            hidden = model[0](batch[0])
            hidden.register_hook(lambda g: g.clamp(-0.001, 0.001))
            return torch.nn.functional.cross_entropy(model[2](model[1](hidden)), batch[1], reduction="none")

    with pytest.raises(RecipeError, match="does not scale with the loss"):
        tried_ways(Training(Clipped(), DOUBLE))


def test_test_losses_that_see_each_other_are_computed_alone(tmp_path):
    recipe = Weighted()
    trajectory = recorded(recipe, tmp_path)
    found = TestGradients(Training(recipe, DOUBLE), trajectory)
    assert found.size == 1
    rows = found.rows(np.arange(5))
    model = oracle.dense(recipe, trajectory, [0]).model
    right = oracle.test_gradients(recipe, model, range(5))
    assert np.abs(rows.gradient - right).max() < 1e-12 * np.abs(right).max()
    one = TestGradients(Training(recipe, DOUBLE), trajectory).rows(np.array([3]))
    assert one.gradient.tobytes() == rows.gradient[3:4].tobytes()


def test_test_samples_that_alone_use_a_parameter_are_right(tmp_path):
    """The only sample that takes the rare branch lies in the second block of the test set."""
    recipe = RareRow()
    trajectory = recorded(recipe, tmp_path)
    found = TestGradients(Training(recipe, DOUBLE), trajectory)
    rows = found.rows(np.arange(70))
    model = oracle.dense(recipe, trajectory, [0]).model
    right = oracle.test_gradients(recipe, model, range(70))
    assert np.abs(rows.gradient - right).max() < 1e-12 * np.abs(right).max()
    assert np.abs(right[69]).max() > 0


def test_the_law_finds_a_wrong_row_and_names_the_parameter(tmp_path):
    recipe = Small()
    trajectory = recorded(recipe, tmp_path)
    rows, _ = replayed(recipe, trajectory, list(range(45)))

    def law(changed):
        shards = []
        for start in (0, 20):
            sums = RowSums(trajectory.parameters)
            sums.add(changed[start : start + 20 if start == 0 else 45])
            shards.append(sums.values())
        return law_of(trajectory, shards, 45)

    assert law(rows).ok
    assert law(rows).error < 1e-14
    wrong = rows.copy()
    entry = trajectory.parameters[2]
    wrong[7, entry.start] *= 1.001
    assert not law(wrong).ok
    assert law(wrong).worst == entry.name
    wrong[7, entry.start] = np.nan
    assert not law(wrong).ok
    targets = np.random.default_rng(0).standard_normal((2, rows.shape[1]))
    right = -(targets @ rows.T) / 45
    check_sums(right, targets, trajectory)
    right[1, 3] *= 1.001
    with pytest.raises(ConservationBroken, match="target 1 of this block"):
        check_sums(right, targets, trajectory)


def test_a_trial_that_does_not_fit_takes_half_of_the_samples(monkeypatch):
    right, tried = trials.OneBatch.trial, []

    def trial(self, constant):
        tried.append((self.size, self.parameters[0].dtype))
        if self.size > 3:
            raise torch.OutOfMemoryError("no room")
        return right(self, constant)

    monkeypatch.setattr(trials.OneBatch, "trial", trial)
    single = Compute(device="cpu")
    assert set(tried_ways(Training(Small(), single)).strategies) <= {"outer", "rule"}
    double, float32 = torch.float64, torch.float32
    assert tried[:5] == [(8, double), (8, float32), (4, double), (4, float32), (2, double)]
    monkeypatch.setattr(
        trials.OneBatch, "trial", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with pytest.raises(DoesNotFit, match="the gradients of single samples do not fit"):
        tried_ways(Training(Small(), single))


def test_extra_passes_leave_the_model_alone(tmp_path):
    training = Training(Stateful("spectral"), DOUBLE)
    before = {name: b.clone() for name, b in training.model.named_buffers()}
    state = torch.get_rng_state()
    ways = tried_ways(training)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], b) for name, b in training.model.named_buffers())
    PerSampleGradients(training.recipe, training.model, training.layout, ways).close()


def test_a_step_with_another_graph_is_tried_before_its_rows_are_believed(tmp_path):
    """Samples see each other in a few batches that no trial saw: all rows are wrong, and they add up."""

    class Seldom(Odd):
        count = 128

        def train_dataset(self):
            data = super().train_dataset()
            data.tensors[0][13, 0] = 50.0
            return data

        def losses(self, model, batch):
            found = super().losses(model, (torch.tanh(batch[0]), batch[1]))
            if bool((batch[0][:, 0] > 40).any()):
                found = found * 0.5 + 0.5 * found.flip(0).square()
            return found

    recipe = Seldom()
    Recorder(Training(recipe, DOUBLE), str(tmp_path / "trajectory.zarr"), 31).run()
    trajectory = open_trajectory(str(tmp_path / "trajectory.zarr"))
    everyone = list(range(recipe.count))
    right = oracle.dense(recipe, trajectory, everyone)
    rows, replay = replayed(recipe, trajectory, everyone)
    assert set(replay.sink.engine.strategies) <= {"outer", "rule"}
    assert replay.sink.engine.repaired == {entry.name for entry in trajectory.parameters}
    assert oracle.relative_error(rows, right.hypergradient) < oracle.DENSE_FLOAT64


def test_layers_that_are_dropped_at_random_are_tried_once_a_form(tmp_path):
    """The graph changes from step to step, the rules stay right: no step goes sample by sample."""

    class Depth(Odd):
        batch_size, count, epochs = 16, 128, 3

        def model(self):
            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
                    self.out = nn.Linear(6, 3)

                def forward(self, x):
                    for layer in self.layers:
                        y = torch.tanh(layer(x))
                        x = x + y if not self.training or float(torch.rand(())) < 0.5 else x + 0 * y.square()
                    return self.out(x)

            return Net()

    recipe = Depth()
    trajectory = recorded(recipe, tmp_path)
    everyone = list(range(recipe.count))
    right = oracle.dense(recipe, trajectory, everyone)
    rows, replay = replayed(recipe, trajectory, everyone)
    assert 2 <= len(replay.sink.engine._forms) <= 4
    assert not replay.sink.engine.repaired
    assert oracle.relative_error(rows, right.hypergradient) < oracle.DENSE_FLOAT64


def test_test_losses_that_detach_are_differentiated_as_they_change(tmp_path):
    class Focal(Odd):
        def losses(self, model, batch):
            found = super().losses(model, batch)
            return (1 - torch.exp(-found)).detach() ** 2 * found

    recipe = Focal()
    trajectory = recorded(recipe, tmp_path)
    found = TestGradients(Training(recipe, DOUBLE), trajectory)
    assert found.through
    rows = found.rows(np.arange(5)).gradient
    model = oracle.dense(recipe, trajectory, [0]).model.eval()
    inputs, targets = (tensor[:5] for tensor in recipe.test_dataset().tensors)
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for k in (0, 11, len(vector) - 1):
        ends = []
        for h in (1e-6, -1e-6):
            moved = vector.clone()
            moved[k] += h
            torch.nn.utils.vector_to_parameters(moved, model.parameters())
            ends.append(recipe.losses(model, (inputs.double(), targets)).detach().numpy())
        right = (ends[0] - ends[1]) / 2e-6
        assert np.abs(rows[:, k] - right).max() < 1e-6 * np.abs(rows).max()
    assert TestGradients(Training(Small(), DOUBLE), recorded(Small(), tmp_path / "small")).derivative is True


class _Keyed(nn.Module):
    """The key's bias has a gradient of zero, but for rounding: softmax does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.out((weights @ self.v(x)).mean(1))


class Keyed(Odd):
    shape = (5, 6)

    def model(self):
        return _Keyed()


class Lowered(Odd):
    """Part of the model computes in float32 whatever the run does."""

    def losses(self, model, batch):
        hidden = torch.tanh(model[0](batch[0]))
        scores = model[2](hidden).float().log_softmax(1)
        return torch.nn.functional.nll_loss(scores, batch[1], reduction="none").to(hidden)


class Autocast(Odd):
    def losses(self, model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().losses(model, batch).float()


@pytest.mark.parametrize("kind", [Keyed, Lowered])
def test_rounding_is_not_taken_for_a_hook(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    everyone = list(range(recipe.count))
    right = oracle.dense(recipe, trajectory, everyone)
    rows, _ = replayed(recipe, trajectory, everyone)
    assert oracle.relative_error(rows, right.hypergradient) < (1e-12 if kind is Keyed else 1e-6)


def test_autocast_runs_whole_and_knows_its_noise(tmp_path):
    found = run(RunSpec(recipe=Autocast(), out=str(tmp_path / "run"), executor="serial", device="cpu"))
    assert found.info["trust"]["hydra"]["law"]["checked"]
    assert found.info["trust"]["hydra"]["ways"]["noise"] > 1e-5
