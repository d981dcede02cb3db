"""Trainings of a lightning.Trainer that no replay can follow are refused by name, and leave no record."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

pytest.importorskip("lightning")

from hydra_pipe.storage.errors import InputError, RecipeError

from hydra_pipe import LightningCallback
from tests.tiny_lightning import CLIPPED, N, Net, loader, net, record_of, some, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Regression(Net):
    """Five values a sample and batches of 7: a 35th is not a fifth of a seventh in float32."""

    def off(self, batch):
        scores = self(batch[0])
        return torch.cat([scores, scores[:, :2]], 1) - batch[0]

    def training_step(self, batch, batch_idx):
        return self.off(batch).square().mean()

    def losses(self, batch):
        return self.off(batch).square().mean(1)


class RegressionOfSamples(Regression):
    def training_step(self, batch, batch_idx):
        return self.losses(batch).mean()


def test_another_order_of_the_same_sum_is_said_to_be_that(tmp_path):
    with pytest.raises(RecipeError, match=r"by rounding alone .* mean of losses with reduction='none'"):
        trained(tmp_path, net(Regression), loader(batch_size=7), losses=Regression.losses)
    trained(tmp_path, net(RegressionOfSamples), loader(batch_size=7), losses=Regression.losses)
    assert len(record_of(tmp_path).batches) == 6


class OtherLoss(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * self.layers[0].weight.square().sum()


class ChangesGradients(Net):
    def on_after_backward(self):
        self.layers[0].weight.grad.mul_(0.5)


class ChangesWeights(Net):
    def on_before_optimizer_step(self, optimizer):
        with torch.no_grad():
            self.layers[3].weight.clamp_(-0.1, 0.1)


class ChangesLastWeights(Net):
    def on_train_epoch_end(self):
        if self.current_epoch == 1:
            torch.nn.init.zeros_(self.layers[0].weight)


class NoLoss(Net):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


class SkipsEpoch(Net):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (OtherLoss, "are not the loop's"),
        (ChangesGradients, r"the gradient of 'layers\.0\.weight' was changed after backward\(\) of batch"),
        (ChangesWeights, r"weights 'layers\.3\.weight' were changed before the step of batch"),
        (ChangesLastWeights, r"weights 'layers\.0\.weight' were changed after the last step"),
        (NoLoss, r"training_step\(\) returned None for batch 3"),
        (SkipsEpoch, "1 batches before batch 3 made no step of the optimizer"),
    ],
)
def test_a_training_that_no_replay_can_follow_leaves_no_record(tmp_path, kind, told):
    with pytest.raises(RecipeError, match=told):
        trained(tmp_path, net(kind), **CLIPPED)
    assert not (tmp_path / "run" / "trajectory.zarr").exists()


class Stream(IterableDataset):
    def __iter__(self):
        yield from some(N, 1)


class Batched(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, k):
        return some(N, 1)[4 * k : 4 * k + 4]


@pytest.mark.parametrize(
    ("loaded", "told"),
    [
        (lambda: DataLoader(Stream(), 4), "reads a Stream, which has no rows"),
        (lambda: DataLoader(Batched(), batch_size=None), "has batch_size=None"),
        (lambda: [some(N, 1)], "is a TensorDataset, whose batches are of rows that are not known"),
        (lambda: [loader()], "is a list, of which no single dataset's rows are known"),
        (lambda: [loader(), loader()], "is a list, of which no single dataset's rows are known"),
    ],
)
def test_loaders_whose_rows_are_not_known_are_refused(tmp_path, loaded, told):
    with pytest.raises(RecipeError, match=told):
        trained(tmp_path, net(), loaded())


def test_test_samples_must_be_said(tmp_path):
    with pytest.raises(RecipeError, match=r"say LightningCallback\(test_dataset="):
        trained(tmp_path, net(), test_dataset=None)


def test_before_the_training_there_is_no_recipe(tmp_path):
    with pytest.raises(InputError, match="nothing was recorded yet"):
        LightningCallback(losses=Net.losses, out=tmp_path / "run").spec()
