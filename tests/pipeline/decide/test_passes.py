"""Passes over the tracked samples: what they find, once, whatever was killed in between and wherever they are done."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.pipeline.decide import passes as module
from hydra_pipe.pipeline.decide.passes import Passes
from hydra_pipe.pipeline.drive.stages import Runner, void_outdated
from hydra_pipe.pipeline.executors.events import null
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.pipeline.executors.serial import SerialExecutor
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.pipeline.vocabulary import TRAINING_OUTPUTS, own_gradients_stage
from hydra_pipe.storage.errors import IncompleteStage
from hydra_pipe.workers.training.outputs import TrainingOutputs
from hydra_pipe.workers.training.own_gradients import OwnGradients
from hydra_pipe.workers.training.training import Compute, Training

from hydra_pipe import open_run
from tests.end_to_end.support import Heard, serial
from tests.faults import FaultPlan, spoiled
from tests.odd_recipes import Weighted
from tests.recipes import BatchNormed, Images

NORMS, INFLUENCE = own_gradients_stage("norms"), own_gradients_stage("self-influence-hydra")
HERE = {"executor": "serial", "device": "cpu"}


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A run of BatchNormed with some samples tracked, and nothing passed yet."""
    place = tmp_path_factory.mktemp("passes") / "r"
    serial(place, BatchNormed(), track="3:43")
    return place


@pytest.fixture
def place(right, tmp_path, monkeypatch):
    """A copy, and units of a few samples."""
    monkeypatch.setattr(module, "OUTPUT_ROWS", 16)
    monkeypatch.setattr(module, "GRADIENT_ROWS", 16)
    return shutil.copytree(right, tmp_path / "r")


def asked(place, heard=None, recipe=None, **given):
    passes = Passes(open_run(str(place)), recipe or BatchNormed(), heard or Heard(), {**HERE, **given})
    outputs, norms, (index, product) = passes.outputs(), passes.norms(), passes.self_influence("hydra")
    passes.close()
    return {
        "train_index": outputs.train_index,
        "label": outputs.label,
        "loss": outputs.loss,
        "prediction": outputs.prediction,
        "output": outputs.output,
        "feature": outputs.feature,
        "absolute": norms.absolute,
        "square": norms.square,
        "index": index,
        "product": product,
    }


def assert_same(found, right):
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in right.items()
    }


def test_outputs_are_those_of_the_trained_model_in_eval_mode(place):
    found = asked(place)
    run, recipe = open_run(str(place)), BatchNormed()
    training = Training(recipe, Compute(device="cpu"))
    last = run.trajectory().checkpoint(-1)
    training.load_weights(last.weights, last.buffers)
    model = training.model.eval()
    inputs, labels = recipe.train_dataset().tensors
    index = np.arange(3, 43)
    assert found["train_index"].tolist() == index.tolist() == found["index"].tolist()
    with torch.no_grad():
        output = model(inputs[index])
        loss = recipe.losses(model, [inputs[index], labels[index]])
    assert np.allclose(found["output"], output, atol=1e-5)
    assert np.allclose(found["loss"], loss, atol=1e-5)
    assert found["label"].tolist() == labels[index].tolist()
    assert found["prediction"].tolist() == output.argmax(1).tolist()
    layer = Passes(run).outputs().layer
    linear = dict(model.named_modules())[layer.name]
    assert (layer.features, layer.outputs, layer.plain) == (linear.in_features, linear.out_features, True)
    with torch.no_grad():
        assert np.allclose(linear(torch.from_numpy(found["feature"])), output, atol=1e-5)


def test_a_pass_is_done_once_and_then_needs_no_recipe(place):
    heard = Heard()
    first = asked(place, heard)
    assert [unit for stage, unit in heard.done if stage == NORMS] == [f"rows-0000{k}" for k in range(3)]
    assert {stage for stage, _ in heard.done} == {TRAINING_OUTPUTS, NORMS, INFLUENCE}
    again = Passes(open_run(str(place)), None, given={"executor": "ray"})
    assert again.norms().square.tobytes() == first["square"].tobytes()
    assert again.outputs().feature.tobytes() == first["feature"].tobytes()
    assert again.self_influence("hydra")[1].tobytes() == first["product"].tobytes()
    states = {state["stage"]: state["state"] for state in status(open_run(str(place)))["stages"]}
    assert [states[stage] for stage in (TRAINING_OUTPUTS, NORMS, INFLUENCE)] == ["complete"] * 3
    assert verify(open_run(str(place))).ok


def test_what_was_broken_off_is_resumed_with_the_same_bits(place, tmp_path, monkeypatch):
    right = asked(shutil.copytree(place, tmp_path / "right"))
    plan = FaultPlan(directory=str(tmp_path), script={"rows-00001": ["raise:gone", "ok", "raise:gone", "ok"]})
    with monkeypatch.context() as patch:
        patch.setattr(SerialExecutor, "run", spoiled(SerialExecutor.run, plan))
        with pytest.raises(ValueError, match="gone"):
            asked(place)
        found = verify(open_run(str(place)))
        assert found.ok, found.problems
        assert any(note.startswith(f"{TRAINING_OUTPUTS}: 1 of 3") for note in found.notes)
        with pytest.raises(ValueError, match="gone"):  # after the outputs, in the norms
            asked(place)
        found = asked(place)
    assert_same(found, right)
    # outputs twice, norms twice, products once
    assert [plan.attempts(f"rows-0000{k}") for k in range(3)] == [3, 5, 3]
    assert verify(open_run(str(place))).ok


@pytest.mark.ray
def test_killed_workers_of_ray_change_no_bit(warm_ray, place, tmp_path, monkeypatch):
    right = asked(shutil.copytree(place, tmp_path / "right"))
    plan = FaultPlan(directory=str(tmp_path), script={"rows-00002": ["kill", "kill-after"]})
    monkeypatch.setattr(RayExecutor, "run", spoiled(RayExecutor.run, plan))
    assert_same(asked(place, executor="ray", address=warm_ray, workers=2), right)
    assert plan.attempts("rows-00002") >= 4
    assert verify(open_run(str(place))).ok


def test_other_hypergradients_make_their_products_void(place):
    asked(place)
    directory = open_run(str(place)).directory
    chunk = next(
        file.path
        for m in directory.manifests("hydra/replay")
        for file in m.files
        if "/hypergradient/c/" in file.path
    )
    (place / chunk).write_bytes(b"x")
    serial(place, BatchNormed(), track="3:43")
    assert len(directory.units(INFLUENCE)) == 4, "made again with the same bits they are no others"
    one = directory.manifests("hydra/replay")[1]
    directory.commit(one.stage, one.unit, [file.path for file in one.files], {**one.values, "steps": 0})
    void_outdated(Runner(directory=directory, executor=SerialExecutor(), observer=null))
    assert directory.units(INFLUENCE) == ["index"]
    assert len(directory.units(NORMS)) == 4
    heard = Heard()
    asked(place, heard)
    assert {stage for stage, _ in heard.done} == {INFLUENCE}


def test_without_a_record_nothing_is_passed(tmp_path):
    serial(tmp_path / "r", Images(), test=2, track=4, epochs=1)
    directory = open_run(str(tmp_path / "r")).directory
    directory.drop("record")
    with pytest.raises(IncompleteStage, match="stage record is missing"):
        Passes(open_run(str(tmp_path / "r")), Images(), given=HERE).outputs()


def test_samples_that_see_each_other_are_passed_one_by_one(tmp_path):
    run = serial(tmp_path / "r", Weighted(), epochs=1)
    trajectory, index = run.trajectory(), np.arange(5)
    passed = TrainingOutputs(Training(Weighted(), Compute(device="cpu")), trajectory)
    gradients = OwnGradients(Training(Weighted(), Compute(device="cpu")), trajectory)
    assert (passed.size, gradients.size) == (1, 1)
    alone = np.concatenate([passed.rows(index[k : k + 1]).loss for k in range(5)])
    assert np.array_equal(passed.rows(index).loss, alone)
