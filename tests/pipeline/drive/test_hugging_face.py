"""The record of a Trainer's own training: the same bits when replayed, rows that are the dataset's."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from hydra_pipe.storage.errors import HydraError, InputError, RecipeError
from transformers import Trainer

from hydra_pipe import HydraCallback, explain, open_run, run
from tests import tiny_text


def trainer_of(folder, *, model=tiny_text.gpt2_dropout, count=11, **given):
    torch.manual_seed(3)
    return Trainer(
        model=model(),
        args=tiny_text.arguments(folder, **given),
        train_dataset=tiny_text.sequences(count, 1),
        eval_dataset=tiny_text.sequences(3, 2),
        data_collator=tiny_text.padded,
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A Trainer's training with dropout, evaluation after each epoch and an uneven last step, recorded."""
    folder = tmp_path_factory.mktemp("trainer")
    trainer = trainer_of(folder, eval_strategy="epoch", logging_strategy="steps", logging_steps=1)
    hydra = HydraCallback(trainer, out=folder / "run", check=4)
    trainer.add_callback(hydra)
    trainer.train()
    return folder, trainer, hydra


def test_the_record_is_of_the_training(recorded):
    folder, trainer, hydra = recorded
    trajectory = open_run(str(folder / "run")).trajectory()
    final = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).numpy()
    assert np.array_equal(trajectory.checkpoint(len(trajectory.checkpoint_steps) - 1).weights, final)
    assert trajectory.updates.tolist() == [False, True, True] * 2
    assert list(trajectory.epoch_ends) == [3, 6]
    assert (trajectory.clip_factor < 1).any()
    # The rows are those of the Trainer's own sampler.
    for epoch in range(2):
        order = torch.randperm(11, generator=torch.Generator().manual_seed(42 + epoch)).tolist()
        rows = trajectory.batches[3 * epoch : 3 * epoch + 3].ravel()
        assert rows[rows >= 0].tolist() == order
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert trajectory.learning_rate[trajectory.updates, 0].tolist() == pytest.approx(logged)
    assert hydra.notes == []


def test_the_record_is_replayed_and_its_sequences_explained(recorded):
    folder, _trainer, hydra = recorded
    done = run(hydra.spec(mode="adjoint", hessian="exact", executor="serial"))
    top = done.top(test=1, k=3).to_pylist()
    assert len({row["train_index"] for row in top}) == 3
    found = explain(done, hydra.recipe, test=1, k=2)
    best = next(one for one in found.samples if one.index == top[0]["train_index"])
    item = tiny_text.sequences(11, 1)[top[0]["train_index"]]
    assert best.text == " ".join(map(str, item["input_ids"]))
    assert (folder / "run" / "run.json").exists()


def test_the_trainer_alone_comes_to_the_same_weights(tmp_path):
    """Without dropout, whose draws are keyed by the batch here, the record changes nothing but rounding."""
    weights = []
    for k in range(2):
        trainer = trainer_of(tmp_path, model=tiny_text.gpt2)
        if k:
            trainer.add_callback(HydraCallback(trainer, out=tmp_path / "run"))
        trainer.train()
        weights.append([p.detach() for n, p in trainer.model.named_parameters() if "c_attn.bias" not in n])
    far = max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))
    assert far < 2e-5


def test_a_training_that_breaks_off_leaves_no_record(tmp_path):
    trainer = trainer_of(tmp_path)
    hydra = HydraCallback(trainer, out=tmp_path / "run")
    trainer.add_callback(hydra)
    calls = []

    def broken(items):
        calls.append(len(items))
        if len(calls) > 12:
            raise OSError("the disk is gone")
        return tiny_text.padded(items)

    hydra.recipe._collator = broken
    with pytest.raises((OSError, HydraError), match="the disk is gone"):
        trainer.train()
    assert not (tmp_path / "run" / "trajectory.zarr").exists()
    with pytest.raises(InputError, match="make a new Trainer"):
        trainer.train()


def test_a_callback_that_was_not_added_is_missed(tmp_path):
    trainer = trainer_of(tmp_path)
    HydraCallback(trainer, out=tmp_path / "run")
    with pytest.raises(InputError, match="add_callback"):
        trainer.train()


@pytest.mark.parametrize("name", ["torch_compile", "load_best_model_at_end", "fp16"])
def test_what_a_record_cannot_follow_is_refused(tmp_path, name):
    trainer = trainer_of(tmp_path)
    setattr(trainer.args, name, True)
    with pytest.raises(RecipeError, match=rf"TrainingArguments\.{name}=True is not supported"):
        HydraCallback(trainer, out=tmp_path / "run")


def test_without_transformers_it_is_said_what_to_install(monkeypatch):
    from hydra_pipe.pipeline.drive import hugging_face

    place = importlib.util.spec_from_file_location("hydra_pipe.pipeline.drive.again", hugging_face.__file__)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'hydra-pipe\[hf\]'"):
        place.loader.exec_module(importlib.util.module_from_spec(place))
