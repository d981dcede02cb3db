"""What a step of the replay dispatches: few operators, nothing that makes the host wait for a device."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hydra_pipe.workers.persample import engine, rules
from hydra_pipe.workers.replay.base import Placed, Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.training import Compute, Training

from benchmarks.operators import Operators, count_steps
from tests.recipes import BatchNormed, Images, Small
from tests.workers.replay.test_hypergradients import recorded, replayed

CPU = Compute(device="cpu")


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed], ids=lambda k: k.__name__)
def test_a_step_reads_nothing_back_and_brings_nothing_to_the_device(kind, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, CPU)
    training = Training(recipe, CPU)
    replay = Replay(training, trajectory, np.arange(0, 44, 2), FastRows)
    replay.at_once = False
    batches = list(training.loader(0, 3))

    def step(k):
        training.apply_settings(replay._settings, k)
        replay.step(k, batches[k], replay.rows(k))

    step(0)
    assert not count_steps(step, 1, 3).reads
    replay.close()


def test_reads_are_counted():
    values = torch.arange(4.0)
    for read in (
        lambda: values.sum().item(),
        lambda: bool(values.any()),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: torch.tensor(3.0),
        lambda: torch.from_numpy(np.ones(2)),
    ):
        assert count_steps(lambda _k, read=read: read(), 0, 1).reads


def test_settings_are_put_in_where_they_change(tmp_path):
    recipe = Images()
    trajectory = recorded(recipe, tmp_path, CPU)
    training = Training(recipe, CPU)
    settings = {name: getattr(trajectory, name).copy() for name in training.family.settings}
    settings["learning_rate"][2:] *= 0.5
    with mock.patch.object(type(training.family), "apply", autospec=True) as apply:
        calls = []
        for step in range(4):
            training.apply_settings(settings, step)
            calls.append(apply.call_count)
    assert calls == [1, 1, 2, 2]


@pytest.mark.parametrize("kind", [Images, BatchNormed], ids=lambda k: k.__name__)
def test_devices_whose_batches_are_worked_on_whole_give_the_same_rows(kind, tmp_path, monkeypatch):
    """As on an accelerator: all rows of a batch, convolutions by windows, tracked rows picked at the end."""
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, CPU)
    tracked = [0, 1, 5, 17, 18, 40]
    here, _ = replayed(recipe, trajectory, CPU, tracked)
    plain = engine.PerSampleGradients.__init__

    def accelerated(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self._accelerated = self._at_once = True

    monkeypatch.setattr(engine.PerSampleGradients, "__init__", accelerated)
    monkeypatch.setattr(rules, "GROUPED", frozenset())
    there, _ = replayed(recipe, trajectory, CPU, tracked)
    assert np.abs(here - there).max() <= 1e-4 * np.abs(here).max()
    part, _ = replayed(recipe, trajectory, CPU, [17, 40])
    assert np.array_equal(part, there[[3, 5]])
    monkeypatch.setattr(engine, "MOST_BYTES", {"cpu": 0})  # no room: tiles of one size
    tiled, _ = replayed(recipe, trajectory, CPU, tracked)
    assert np.abs(tiled - here).max() <= 1e-4 * np.abs(here).max()


def test_positions_are_those_of_each_batch(monkeypatch):
    monkeypatch.setattr("hydra_pipe.workers.replay.base.PLACED", 2)
    batches = np.array([[3, 0, 1], [2, 3, -1], [1, 0, 2], [0, 0, -1]], dtype=np.int32)
    placed = Placed(batches, np.array([1, -1, -1, 0]), torch.device("cpu"))
    found = {step: [part.tolist() for part in placed.at(step)] for step in (0, 1, 2, 3, 1)}
    assert found[0] == [[0, 1], [0, 1], [0, 1]]
    assert found[1] == [[1], [0], [0]]
    assert found[2] == [[1], [1], [1]]
    assert found[3] == [[0, 1], [1, 1], [1, 1]]


def test_operators_leave_out_views_and_allocations():
    with Operators() as found:
        values = torch.empty(4, 2)
        values.view(8).fill_(1.0)
    assert found.kernels == {"fill_": 1}
