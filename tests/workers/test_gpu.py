"""The same on a GPU: run with ``make test-gpu`` where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.replay import buffers
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests import oracle
from tests.recipes import BatchNormed, Images, Long, Sequences, Small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = Compute(device="cuda", dtype="float64")


def replayed(recipe, tmp_path, tracked, compute=CUDA):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri).run()
    trajectory = open_trajectory(uri)
    replay = Replay(Training(recipe, compute), trajectory, np.asarray(tracked), FastRows)
    return replay.run().numpy(0, len(tracked)).copy(), trajectory, replay


@pytest.mark.parametrize("kind", [Small, Long, Sequences, BatchNormed], ids=lambda k: k.__name__)
def test_equals_dense_algorithm_1(kind, tmp_path):
    class NoDropout(kind):  # masks of a GPU are other masks
        def model(self):
            model = super().model()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            return model

    recipe = NoDropout()
    rows, trajectory, _ = replayed(recipe, tmp_path, [0, 4, 9, 43])
    right = oracle.dense(recipe, trajectory, [0, 4, 9, 43])
    assert oracle.relative_error(rows, right.hypergradient) < 1e-10


@pytest.mark.parametrize("kind", [Small, Images, Long], ids=lambda k: k.__name__)
def test_any_subset_gives_the_same_bits(kind, tmp_path):
    compute = Compute(device="cuda")
    whole, trajectory, _ = replayed(kind(), tmp_path, list(range(44)), compute)
    for tracked in ([7], [0, 1, 2], list(range(5, 40))):
        again = Replay(Training(kind(), compute), trajectory, np.asarray(tracked), FastRows).run()
        assert np.array_equal(again.numpy(0, len(tracked)), whole[tracked])


@pytest.mark.parametrize("kind", [Small, Images, Long, BatchNormed], ids=lambda k: k.__name__)
def test_steps_by_cuda_graphs_have_the_same_bits(kind, tmp_path):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(kind(), Compute(device="cuda")), uri).run()
    trajectory, found = open_trajectory(uri), {}
    for how in ("auto", "off"):
        compute = Compute(device="cuda", graphs=how)
        replay = Replay(Training(kind(), compute), trajectory, np.arange(0, 44, 3), FastRows).run()
        found[how] = replay.numpy(0, 15).copy()
        told = replay.told()["ways"]
        assert "why_not" not in told
        assert (told.get("captured_steps", 0) > 0) == (how == "auto")
    assert np.array_equal(found["auto"], found["off"])


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed], ids=lambda k: k.__name__)
def test_a_step_waits_for_nothing(kind, tmp_path):
    compute = Compute(device="cuda", graphs="off")
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(kind(), compute), uri).run()
    replay = Replay(Training(kind(), compute), open_trajectory(uri), np.arange(44), FastRows)
    batches = list(replay.training.loader(0, 4))
    for step, batch in enumerate(batches):
        replay.training.apply_settings(replay._settings, step)
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            replay.step(step, batch, replay.rows(step))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_buffers_that_do_not_fit_go_to_pinned_host_memory(tmp_path, monkeypatch):
    on_device, _, replay = replayed(Images(), tmp_path / "a", [1, 2, 30])
    assert replay.sink.buffers.dense.is_cuda
    monkeypatch.setattr(buffers, "DEVICE_SHARE", 0.0)
    on_host, _, replay = replayed(Images(), tmp_path / "b", [1, 2, 30])
    assert replay.sink.buffers.dense.is_pinned()
    assert np.allclose(on_host, on_device, rtol=1e-12, atol=1e-14)
