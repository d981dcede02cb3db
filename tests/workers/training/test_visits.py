"""The record keeps what a loop of one's own finds at every sample's visit, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.storage import visits as stored
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.determinism import derived_seed, seed_everything
from hydra_pipe.workers.training import visits as kept
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests.recipes import BatchNormed, Images, Small

CPU = Compute(device="cpu")
DOUBLE = Compute(device="cpu", dtype="float64")


class Guessing(Small):
    """Says itself how it predicts."""

    def predictions(self, model, batch):
        return batch[1]


class Listed(Small):
    """The model returns a tuple."""

    def model(self):
        return _Listed()

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0])[0], batch[1], reduction="none")


class _Listed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(6, 3)

    def forward(self, x):
        return (self.inner(x),)


class MoreLabels(Small):
    """Two labels lie outside of the outputs, though the loss takes them modulo 3."""

    def train_dataset(self):
        data = super().train_dataset()
        data.tensors[1][[4, 9]] = torch.tensor([3, 7])
        return data

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1] % 3, reduction="none")


def recorded(recipe, place, compute=CPU, **settings):
    uri = str(place / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri, **settings).run()
    return open_trajectory(uri)


def brute_force(recipe, compute, trajectory):
    """Train again; before each step ask the model in train mode, with that step's dropout, sample by sample."""
    training = Training(recipe, compute)
    epochs, n = recipe.epochs, training.n_train
    loss, margin = (np.full((epochs, n), np.nan) for _ in range(2))
    other = np.full((epochs, n), -1)
    probability = np.zeros((n, recipe.classes))
    settings = {name: getattr(trajectory, name) for name in training.family.settings}
    for step, batch in enumerate(training.loader()):
        training.apply_settings(settings, step)
        seed_everything(derived_seed(recipe.seed, "step", step))
        with torch.no_grad():
            outputs = training.model(batch[0]).double().numpy()
        epoch = step // training.epoch_ends[0]
        for i, output, y in zip(trajectory.batches[step], outputs, batch[1].tolist(), strict=False):
            ranked = [k for k in np.argsort(-output) if k != y]
            share = np.exp(output - output.max()) / np.exp(output - output.max()).sum()
            loss[epoch, i], margin[epoch, i] = -np.log(share[y]), output[y] - output[ranked[0]]
            other[epoch, i] = ranked[0]
            probability[i] += share / epochs
        training.step(step, batch)
    return loss, margin, other, probability


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed], ids=lambda k: k.__name__)
def test_visits_are_what_a_loop_of_ones_own_finds(kind, tmp_path):
    for compute, close in ((CPU, 2e-6), (DOUBLE, 2e-7)):
        trajectory = recorded(kind(), tmp_path / compute.dtype, compute)
        found = trajectory.visits()
        loss, margin, other, probability = brute_force(kind(), compute, trajectory)
        np.testing.assert_allclose(found.loss, loss, rtol=close, atol=close)
        np.testing.assert_allclose(found.margin, margin, rtol=close, atol=close)
        np.testing.assert_array_equal(found.other, other)
        np.testing.assert_allclose(found.probability, probability, atol=close)
        assert [a.dtype.name for a in (found.loss, found.margin, found.other, found.probability)] == [
            "float32",
            "float32",
            "int16",
            "float32",
        ]
        assert found.loss_dtype == compute.dtype


@pytest.mark.parametrize("kind", [Images, BatchNormed], ids=lambda k: k.__name__)
def test_without_visits_everything_else_has_the_same_bits(kind, tmp_path):
    on, off = (recorded(kind(), tmp_path / str(kept), visits=kept) for kept in (True, False))
    assert off.visits() is None
    assert on.epoch_digest == off.epoch_digest
    assert np.array_equal(on.digest, off.digest)
    assert np.array_equal(on.loss, off.loss)
    assert {n: v.tolist() for n, v in on.epochs.items() if "validation" not in n} == {
        n: v.tolist() for n, v in off.epochs.items() if "validation" not in n
    }


@pytest.mark.parametrize("kind", [Guessing, Listed], ids=lambda k: k.__name__)
def test_where_outputs_are_no_classes_losses_alone_are_kept(kind, tmp_path):
    found = recorded(kind(), tmp_path).visits()
    assert (found.margin, found.other, found.probability) == (None, None, None)
    assert np.isfinite(found.loss).all()
    assert found.loss.shape == (3, 45)


def test_a_label_outside_of_the_outputs_has_no_margin(tmp_path):
    found = recorded(MoreLabels(), tmp_path).visits()
    unknown = np.isin(np.arange(45), [4, 9])
    assert np.array_equal(np.isnan(found.margin), np.tile(unknown, (3, 1)))
    assert np.array_equal(found.other == -1, np.isnan(found.margin))
    np.testing.assert_allclose(found.probability.sum(1), 1, atol=1e-6)


def test_probabilities_above_their_size_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "PROBABILITY_BYTES", 45 * 3 * 4 - 1)
    found = recorded(Small(), tmp_path).visits()
    assert found.probability is None
    assert found.margin is not None


def test_blocks_and_chunks_change_nothing(tmp_path, monkeypatch):
    whole = recorded(Small(), tmp_path / "a").visits()
    monkeypatch.setattr(kept, "WAITING_BYTES", 300)  # looked at every few steps
    monkeypatch.setattr(stored, "_CHUNK_BYTES", 2 * 45 * 4)  # two epochs a chunk, of three
    monkeypatch.setattr(stored, "_CHUNK_COLUMNS", 20)
    cut = recorded(Small(), tmp_path / "b")
    for name in stored.FORMS:
        assert np.array_equal(getattr(whole, name), getattr(cut.visits(), name)), name
    assert len(list((tmp_path / "b" / "trajectory.zarr" / "visits" / "loss" / "c").rglob("*"))) == 2 + 2 * 3


def test_an_interrupted_record_leaves_no_visits_and_the_next_has_all(tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, _total):
        if done == 9:
            raise Stopped

    uri = str(tmp_path / "trajectory.zarr")
    with pytest.raises(Stopped):
        Recorder(Training(Small(), CPU), uri).run(stop)
    assert list(tmp_path.iterdir()) == []
    again = recorded(Small(), tmp_path)
    straight = recorded(Small(), tmp_path / "straight")
    for name in stored.FORMS:
        assert np.array_equal(getattr(again.visits(), name), getattr(straight.visits(), name))


def test_visits_of_a_remote_store():
    uri = "memory://visits/trajectory.zarr"
    Recorder(Training(Small(), CPU), uri).run()
    assert open_trajectory(uri).visits().margin.shape == (3, 45)


def test_bytes_are_counted_with_and_without_classes():
    assert kept.visit_bytes(20, 1000, 10) == 20 * 1000 * 10 + 1000 * 10 * 4
    assert kept.visit_bytes(20, 1000, 0) == 20 * 1000 * 4
    assert kept.visit_bytes(2, 1_000_000, 1000) == 2 * 1_000_000 * 10  # no probabilities: above 256 MiB
    assert kept.held_bytes(20, 1000, 10) > 1000 * 10 * 4
