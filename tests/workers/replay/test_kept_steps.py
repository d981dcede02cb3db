"""The adjoint where the record kept the weights of every step: read, not trained again, and the same bits."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import ReplayDiverged
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.replay import adjoint
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training
from torch.utils.data import TensorDataset

from tests.recipes import BatchNormed, Images, Sequences, Small, TwoGroups

SINGLE = Compute(dtype="float32", device="cpu", batch_norm="coupled")


class Accumulated(Small):
    """Two batches make a step."""

    accumulate = 2


class Rounded(Small):
    """Trains under autocast."""

    def losses(self, model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return super().losses(model, batch).float()


class Changed(Small):
    """The same recipe, but for the label of one sample."""

    def train_dataset(self):
        held = super().train_dataset()
        labels = held.tensors[1].clone()
        labels[17] = (labels[17] + 1) % 3
        return TensorDataset(held.tensors[0], labels)


def recorded(recipe, place, every):
    uri = str(place / f"every-{every}.zarr")
    Recorder(Training(recipe, SINGLE), uri, every).run()
    return open_trajectory(uri)


def carried(recipe, trajectory, *, count=2, share=1.0):
    """Return the contributions, and how many steps were taken for them."""
    vectors = np.random.default_rng(0).standard_normal((count, len(trajectory.checkpoint(0).weights)))
    training = Training(recipe, SINGLE)
    with mock.patch.object(training, "step", wraps=training.step) as steps:
        back = Adjoint(training, trajectory, np.arange(44), vectors.astype(np.float32), share=share).run()
    return back.contributions(), steps.call_count


@pytest.mark.parametrize("count", [1, 3, 11])
@pytest.mark.parametrize("kind", [Small, Images, BatchNormed, Sequences, TwoGroups], ids=lambda k: k.__name__)
def test_the_same_bits_without_a_step(kind, count, tmp_path, monkeypatch):
    monkeypatch.setattr(adjoint, "READ_STEPS", 4)
    trained, steps = carried(kind(), recorded(kind(), tmp_path, 5), count=count)
    assert steps > 0
    read, steps = carried(kind(), recorded(kind(), tmp_path, 1), count=count)
    assert steps == 0
    assert np.array_equal(read, trained)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_same_bits_of_gauss_newton_and_mixtures(share, tmp_path):
    trained, _ = carried(Images(), recorded(Images(), tmp_path, 5), share=share)
    read, steps = carried(Images(), recorded(Images(), tmp_path, 1), share=share)
    assert steps == 0
    assert np.array_equal(read, trained)


@pytest.mark.parametrize("kind", [Accumulated, Rounded], ids=lambda k: k.__name__)
def test_what_needs_the_step_takes_it(kind, tmp_path):
    trained, _ = carried(kind(), recorded(kind(), tmp_path, 5))
    again, steps = carried(kind(), recorded(kind(), tmp_path, 1))
    assert steps > 0
    assert np.array_equal(again, trained)


def test_other_data_show_in_the_losses(tmp_path):
    trajectory = recorded(Small(), tmp_path, 1)
    with pytest.raises(ReplayDiverged, match=r"step \d+: the loss of step \d+ is .*, recorded "):
        carried(Changed(), trajectory)


def test_digests_are_compared_all_the_same(tmp_path):
    trajectory = recorded(Small(), tmp_path, 1)
    trajectory.digest[1] ^= 1
    with pytest.raises(ReplayDiverged, match=f"weights after {trajectory.digest_step[1]} steps have crc32"):
        carried(Small(), trajectory)


def test_weights_that_were_not_kept_are_not_made_up(tmp_path):
    trajectory = recorded(Small(), tmp_path, 5)
    assert trajectory.weights(5, 6).shape == (1, len(trajectory.checkpoint(0).weights))
    with pytest.raises(IndexError, match="from step 5 to 6 were kept"):
        trajectory.weights(5, 7)
