"""The record of a lightning.Trainer's own training: the same bits when replayed, rows that are the dataset's."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys

import cloudpickle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("lightning")
import lightning
import torchmetrics
from hydra_pipe.storage.errors import InputError
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
)

from hydra_pipe import LightningCallback, explain, open_run, recording, run
from tests.tiny_lightning import (
    ALL,
    CLIPPED,
    N,
    Net,
    Still,
    last_weights,
    loader,
    net,
    record_of,
    some,
    trained,
    trainer,
    weights_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Watching(Callback):
    """What the optimizer had at each step, and which inputs each batch held."""

    def __init__(self):
        self.rates, self.inputs = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.inputs.append(batch[0])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Dropout, validation in mid-epoch, clipping, accumulation with an uneven last step, a schedule of steps."""
    folder, watching = tmp_path_factory.mktemp("lightning"), Watching()
    hydra = LightningCallback(out=folder / "run", losses=Net.losses, check=4)
    model = net()
    made = trainer(callbacks=[hydra, watching], val_check_interval=2, **CLIPPED)
    made.fit(model, loader(), DataLoader(some(3, 2), 2))
    return folder, model, hydra, watching


def test_the_record_is_of_the_training(recorded):
    folder, model, hydra, watching = recorded
    record = record_of(folder)
    assert np.array_equal(last_weights(folder), weights_of(model))
    assert record.updates.tolist() == [False, True, False, True, True] * 2
    assert list(record.epoch_ends) == [5, 10]
    assert (record.clip_factor < 1).any()
    assert record.learning_rate[record.updates, 0].tolist() == watching.rates
    assert watching.rates[0] == 4 * watching.rates[-1]
    data = some(N, 1).tensors[0]
    for rows, inputs in zip(record.batches, watching.inputs, strict=True):
        assert torch.equal(data[rows[rows >= 0]], inputs)
    assert not np.array_equal(record.batches[:5], record.batches[5:])
    assert hydra.notes == []


def test_the_record_is_replayed_and_its_samples_explained(recorded):
    folder, _model, hydra, _watching = recorded
    done = run(hydra.spec(mode="adjoint", hessian="exact", executor="serial"))
    top = done.top(test=1, k=3).to_pylist()
    assert len({row["train_index"] for row in top}) == 3
    found = explain(done, hydra.recipe, test=1, k=2)
    assert top[0]["train_index"] in {one.index for one in found.samples}
    assert found.subject.predicted is not None
    assert open_run(str(folder / "run")).trajectory().epoch_ends


def test_a_loop_by_hand_has_the_same_contributions(recorded, tmp_path):
    """The same batches, settings and draws, through `recording`."""
    folder, _model, hydra, _watching = recorded
    record, model = record_of(folder), net()
    optimizer = model.configure_optimizers()["optimizer"]
    with recording(
        model, optimizer, out=tmp_path / "run", recipe=hydra.recipe, accumulate=2, clip_grad_norm=0.5
    ) as rec:
        for k, rows in enumerate(record.batches):
            for group in optimizer.param_groups:
                group["lr"] = float(record.learning_rate[k, 0])
            inputs, targets = some(N, 1)[rows[rows >= 0]]
            rec.batch(rows[rows >= 0])
            rec.step(rows[rows >= 0], F.cross_entropy(model(inputs), targets, reduction="none"))
            if k in (4, 9):
                rec.end_epoch()
    both = []
    for place in (folder / "run", tmp_path / "run"):
        spec = hydra.spec(mode="adjoint", hessian="exact", executor="serial")
        spec = dataclasses.replace(spec, out=str(place))
        rows = (
            run(spec)
            .contributions()
            .to_table()
            .sort_by([("test_index", "ascending"), ("train_index", "ascending")])
        )
        both.append(rows["contribution"].to_numpy())
    assert np.abs(both[0]).max() > 0
    assert np.array_equal(*both)


def test_the_trainer_alone_comes_to_the_same_weights(tmp_path):
    """Without dropout, whose draws are keyed by the batch here, the record changes no bit."""
    alone, beside = net(Still), net(Still)
    trainer(**CLIPPED).fit(alone, loader())
    trained(tmp_path, beside, **CLIPPED)
    assert np.array_equal(weights_of(alone), weights_of(beside))


class PerEpoch(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class OnPlateau(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, threshold=10.0, factor=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "loss"}


class Warm(Net):
    """A warm-up in optimizer_step, and hooks that look on."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + self.trainer.global_step)
        optimizer.step(closure=optimizer_closure)

    def on_before_zero_grad(self, optimizer):
        self.seen = max(float(p.abs().max()) for p in self.parameters())

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "batch": batch_idx}


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        (PerEpoch, [0.1] * 3 + [0.05] * 3 + [0.025] * 3),
        (OnPlateau, [0.1] * 3 + [0.01] * 3 + [0.001] * 3),
        (Warm, [0.01 * k for k in range(1, 10)]),
    ],
)
def test_settings_follow_whoever_moves_them(tmp_path, kind, rates):
    trained(tmp_path, net(kind), max_epochs=3, **CLIPPED)
    record = record_of(tmp_path)
    assert record.learning_rate[record.updates, 0].tolist() == pytest.approx(rates)


class Full(Net):
    """Batch statistics, a metric, a frozen part, hyperparameters, a schedule that asks for the number of steps."""

    def __init__(self, width=6):
        super().__init__()
        self.save_hyperparameters()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def configure_model(self):
        wide = nn.Linear(5, self.hparams.width).requires_grad_(False)
        self.layers = nn.Sequential(wide, nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.log("accuracy", self.accuracy(scores, batch[1]))
        return F.cross_entropy(scores, batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return loader(generator=None)

    def val_dataloader(self):
        return DataLoader(some(3, 2), 2)


def test_a_module_and_data_as_people_have_them(tmp_path):
    """Checkpoints are saved meanwhile, and a tuner tries learning rates before."""
    model, hydra = net(Full), LightningCallback(losses=Net.losses, out=tmp_path / "run", check=ALL)
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path / "saved"}
    trainer(callbacks=[finder, hydra], **saving, **CLIPPED).fit(model, datamodule=Data())
    record = record_of(tmp_path)
    assert record.updates.tolist() == [False, True, False, True, True] * 2
    assert record.beta1[record.updates, 0].min() < 0.9
    trained_weights = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    assert np.array_equal(last_weights(tmp_path), torch.cat(trained_weights).numpy())
    assert len(run(hydra.spec(mode="adjoint", executor="serial")).top(test=0, k=2)) == 2


class Stops(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 2


@pytest.mark.parametrize(
    ("given", "updates", "left"),
    [
        ({"max_steps": 2, "max_epochs": -1}, [0, 1, 0, 1], 0),
        ({"limit_train_batches": 3}, [0, 1, 1] * 2, 0),
        ({"overfit_batches": 2}, [0, 1] * 2, 0),
        ({"fast_dev_run": True}, [1], 0),
        ({"callbacks": [Stops()]}, [0, 1], 1),
        (
            {"callbacks": [EarlyStopping("loss", min_delta=9.0, patience=1)], "max_epochs": 9},
            [0, 1, 0, 1, 1] * 2,
            0,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_trainings_that_end_otherwise(tmp_path, given, updates, left):
    hydra = trained(tmp_path, net(), accumulate_grad_batches=2, **given)
    record = record_of(tmp_path)
    assert record.updates.tolist() == [bool(k) for k in updates] if 0 in updates else record.updates is None
    assert len(hydra.notes) == bool(left)


def test_a_training_that_goes_on_from_a_checkpoint(tmp_path):
    """The record is of the steps since, with the optimizer's state and the schedule's."""
    made = trainer(max_epochs=1)
    made.fit(net(), loader())
    made.save_checkpoint(tmp_path / "one.ckpt")
    model, hydra = (
        net(),
        LightningCallback(losses=F.cross_entropy, out=tmp_path / "run", test_dataset=some(3, 2)),
    )
    trainer(callbacks=[hydra]).fit(model, loader(), ckpt_path=tmp_path / "one.ckpt")
    record = record_of(tmp_path)
    assert record.learning_rate[:, 0].tolist() == pytest.approx(
        [0.03 / 4, 0.03 / 8, 0.03 / 8, 0.03 / 16, 0.03 / 16]
    )
    assert np.array_equal(last_weights(tmp_path), weights_of(model))


def test_a_schedule_of_accumulation(tmp_path):
    trained(tmp_path, net(), callbacks=[GradientAccumulationScheduler({0: 1, 1: 4})])
    assert record_of(tmp_path).updates.tolist() == [True] * 5 + [False, False, False, True, True]


@pytest.mark.parametrize(("precision", "hessian"), [("64-true", "gauss-newton"), ("bf16-mixed", "none")])
def test_precisions(tmp_path, precision, hessian):
    model = net()
    hydra = trained(tmp_path, model, precision=precision, **CLIPPED)
    assert np.array_equal(last_weights(tmp_path), weights_of(model))
    assert hydra.recipe.precision == precision
    done = run(hydra.spec(executor="serial", mode="adjoint", hessian=hessian))
    assert len(done.top(test=0, k=2)) == 2


def test_the_recipe_goes_to_other_processes(recorded):
    """With a module that hangs on a Trainer, which stays behind."""
    _folder, model, hydra, _watching = recorded
    assert model._trainer is not None
    other, batch = cloudpickle.loads(cloudpickle.dumps(hydra.recipe)), some(3, 2)[:]
    assert other.model()._trainer is None
    assert torch.equal(*(one.losses(one.model().eval(), batch) for one in (hydra.recipe, other)))


class Noisy(Dataset):
    """Noise drawn when an item is fetched."""

    def __init__(self):
        self.data = some(N, 1)

    def __len__(self):
        return N

    def __getitem__(self, k):
        return self.data[k][0] + torch.randn(5), self.data[k][1]


def test_augmentation_in_processes_of_a_loader_is_replayed(tmp_path):
    model = net()
    trained(tmp_path, model, DataLoader(Noisy(), 6, shuffle=True, num_workers=2, persistent_workers=True))
    assert np.array_equal(last_weights(tmp_path), weights_of(model))


def test_the_trainer_has_its_own_methods_back(tmp_path):
    hydra = LightningCallback(losses=Net.losses, out=tmp_path / "run", test_dataset=some(3, 2))
    made = trainer(callbacks=[hydra])
    before = [set(vars(one)) for one in (made.strategy, made.strategy.precision_plugin, made._data_connector)]
    made.fit(net(), loader())
    after = [set(vars(one)) for one in (made.strategy, made.strategy.precision_plugin, made._data_connector)]
    assert after == before
    made.validate(
        net(), DataLoader(some(3, 2)), verbose=False
    )  # the callback is still there and does nothing


def test_without_lightning_it_is_said_what_to_install(monkeypatch):
    from hydra_pipe.pipeline.drive import lightning_trainer

    place = importlib.util.spec_from_file_location(
        "hydra_pipe.pipeline.drive.again", lightning_trainer.__file__
    )
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'hydra-pipe\[lightning\]'"):
        place.loader.exec_module(importlib.util.module_from_spec(place))


def test_a_callback_records_one_training(recorded):
    _folder, _model, hydra, _watching = recorded
    with pytest.raises(InputError, match="make a new LightningCallback"):
        trainer(callbacks=[hydra]).fit(net(), loader())
