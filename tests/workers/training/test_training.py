"""The loop that record and replay share: restarts at checkpoints, workers, evaluation without a trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import DoesNotFit, NonFiniteLoss, RecipeError, ReplayDiverged
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.data.schedule import schedule_of
from hydra_pipe.workers.determinism import restored_process
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.optimizer_state import OptimizerState
from hydra_pipe.workers.training.record import Recorder, checkpoint_steps
from hydra_pipe.workers.training.training import Compute, Training

from tests.recipes import Augmented, BatchNormed, Images, OneCycle, Plateau, Small, TwoGroups

CPU = Compute(device="cpu")


def recorded(recipe, tmp_path, compute=CPU, every=None):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri, every).run()
    return open_trajectory(uri)


def test_batch_order_is_a_permutation_of_each_epoch():
    def order(**changes):
        recipe = Small()
        vars(recipe).update(changes)
        return schedule_of(recipe, 45).batches

    found = order()
    assert found.shape == (18, 8)
    assert found.dtype == np.int32
    for epoch in range(3):
        members = found[epoch * 6 : epoch * 6 + 6]
        assert sorted(members[members >= 0]) == list(range(45))
        assert (members[-1] >= 0).sum() == 5
    assert not np.array_equal(found[:6], found[6:12])
    assert not np.array_equal(found, order(seed=2))
    assert np.array_equal(found[:6], order(epochs=1))


@pytest.mark.parametrize(
    "kind", [Images, BatchNormed, OneCycle, TwoGroups, Augmented], ids=lambda k: k.__name__
)
def test_training_goes_on_from_any_checkpoint_with_the_same_bits(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, every=4)
    settings = {name: getattr(trajectory, name) for name in Training(recipe, CPU).family.settings}
    for k in (1, 2):
        start = trajectory.checkpoint(k)
        stop = trajectory.checkpoint(k + 1)
        training = Training(recipe, CPU)
        training.load_weights(start.weights, start.buffers)
        training.load_optimizer(OptimizerState.of(start))
        for step, batch in zip(
            range(start.step, stop.step), training.loader(start.step, stop.step), strict=True
        ):
            training.apply_settings(settings, step)
            assert float(training.step(step, batch)) == trajectory.loss[step]
        assert np.array_equal(training.weights().numpy(), stop.weights)


def test_loader_processes_change_nothing(tmp_path):
    class Parallel(Augmented):
        num_workers = 2

    alone = recorded(Augmented(), tmp_path / "a")
    parallel = recorded(Parallel(), tmp_path / "b")
    assert alone.epoch_digest == parallel.epoch_digest
    assert np.array_equal(alone.loss, parallel.loss)


def test_settings_are_those_in_use_at_each_step(tmp_path):
    trajectory = recorded(OneCycle(), tmp_path)
    assert trajectory.learning_rate[0, 0] == pytest.approx(0.3 / 25)
    assert len(np.unique(trajectory.learning_rate)) == 18
    assert trajectory.momentum[:, 0].min() < 0.86 < trajectory.momentum[:, 0].max()
    groups = recorded(TwoGroups(), tmp_path / "g")
    assert groups.learning_rate[0].tolist() == [0.1, 0.2]
    assert groups.weight_decay[0].tolist() == [0.05, 0.0]
    assert {e.name: e.group for e in groups.parameters}["4.weight"] == -1


def test_plateau_watches_training_plus_validation_loss(tmp_path):
    trajectory = recorded(Plateau(), tmp_path)
    rates = trajectory.learning_rate[::6, 0]
    total = trajectory.epochs["train_loss"] + trajectory.epochs["validation_loss"]
    best, rate, expected = np.inf, 0.1, []
    for value in total:
        expected.append(rate)
        if value < best * (1 - 0.5):
            best = value
        else:
            rate *= 0.5
    assert rates.tolist() == pytest.approx(expected)
    assert np.isnan(trajectory.epochs["test_accuracy"]).sum() == 0


def test_checkpoints_are_bounded_in_number_and_bytes():
    assert checkpoint_steps(10, 100, 4, None)[0] == 0
    assert checkpoint_steps(10_000, 100, 4, None)[-1] == 10_000
    assert len(checkpoint_steps(10_000, 100, 4, None)) <= 21
    assert checkpoint_steps(10_000, 10**9, 4, None) == [0, 10_000]
    assert checkpoint_steps(10, 100, 4, 4) == [0, 4, 8, 10]


class Explodes(Small):
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=1e20)

    def losses(self, model, batch):
        return model(batch[0]).pow(2).sum(1)


def test_a_loss_that_explodes_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"batch loss is (nan|inf) at step \d+ of 18 \(train_index \d+"):
        recorded(Explodes(), tmp_path)
    assert list(tmp_path.iterdir()) == []


class Shifted(Small):
    """The same recipe with other data: what a replay must notice."""

    def train_dataset(self):
        dataset = super().train_dataset()
        dataset.tensors[0][3] += 1
        return dataset


class Reweighted(Small):
    def model(self):
        model = super().model()
        with torch.no_grad():
            model[0].weight[0, 0] += 1e-6
        return model


def test_a_replay_that_leaves_the_record_is_stopped(tmp_path):
    trajectory = recorded(Small(), tmp_path)
    with pytest.raises(
        ReplayDiverged, match=r"step (\d+): weights after \d+ steps have crc32 [0-9a-f]{8}, recorded"
    ):
        Replay(Training(Shifted(), CPU), trajectory, np.arange(3), FastRows).run()
    with pytest.raises(ReplayDiverged, match=r"diverged at step 0: .*did the recipe or its data change"):
        Replay(Training(Reweighted(), CPU), trajectory, np.arange(3), FastRows)
    other = Small()
    other.seed = 4
    with pytest.raises(ReplayDiverged, match="batch order differs"):
        Replay(Training(other, CPU), trajectory, np.arange(3), FastRows)


@pytest.mark.parametrize(
    ("raised", "named", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nmore"),
            DoesNotFit,
            "step 0 does not fit .* smaller batch",
        ),
        (
            RuntimeError("foo_backward_cuda does not have a deterministic implementation, but you set"),
            RecipeError,
            "foo_backward_cuda has no deterministic form on cpu",
        ),
    ],
)
def test_errors_of_the_device_get_a_name(raised, named, message, tmp_path):
    class Fails(Small):
        def losses(self, model, batch):
            raise raised

    with pytest.raises(named, match=message):
        recorded(Fails(), tmp_path)


class Unused(Small):
    def model(self):
        model = super().model()
        model.register_parameter("spare", torch.nn.Parameter(torch.zeros(2)))
        return model


def test_a_parameter_without_gradient_is_left_alone_and_noted(tmp_path):
    record = recorded(Unused(), tmp_path)
    assert record.parameters[0].name == "spare"
    assert not record.active[:, 0].any()
    assert record.active[:, 1:].all()
    assert not record.checkpoint(-1).weights[:2].any()


def test_losses_that_no_optimised_parameter_reaches_are_refused(tmp_path):
    class Apart(Unused):
        def optimizer(self, model):
            return torch.optim.SGD([model.spare], lr=0.1)

    with pytest.raises(
        RecipeError, match="no parameter that is optimised got a gradient at step 0; use the model"
    ):
        recorded(Apart(), tmp_path)


def test_the_callers_process_comes_back_as_it_was():
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    with restored_process():
        Training(Small(), Compute(device="cpu", threads=threads + 1))
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
