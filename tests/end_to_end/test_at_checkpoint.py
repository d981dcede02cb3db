"""``attribute --at-checkpoint``: a model that was trained elsewhere, attributed from its weights alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.run import attribute_checkpoint, run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import SpecError

from tests.end_to_end.support import cli
from tests.recipes import BatchNormed, Small

RECIPE = "tests.end_to_end.test_at_checkpoint:Elsewhere"
SERIAL = ("--executor", "serial", "--device", "cpu", "--dtype", "float64", "--quiet")
DAMPED = ("--option", "influence-cg.damping=20.0")


class Elsewhere(BatchNormed):
    """Trained by an optimiser that no replay could follow; nothing here depends on it."""

    def optimizer(self, model):
        return torch.optim.Adagrad(model.parameters(), lr=0.1, weight_decay=0.03)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recorded run of the same recipe with SGD, its trained weights in a file, and a run at that checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    fields = {"dtype": "float64", "executor": "serial", "device": "cpu", "visits": "off"}
    asked = RunSpec(recipe=BatchNormed(), out=str(folder / "trained"), **fields)
    recorded = run(asked, stages=("record", "test-gradients"))
    model, last = BatchNormed().model().double(), recorded.trajectory().checkpoint(-1)
    start, state = 0, model.state_dict()
    for entry in recorded.trajectory().parameters:
        count = int(np.prod(entry.shape))
        state[entry.name] = torch.from_numpy(last.weights[start : start + count]).reshape(entry.shape).clone()
        start += count
    for name, buffer in zip(
        [n for n, _ in model.named_buffers()], _unpacked(model, last.buffers), strict=True
    ):
        state[name] = buffer
    torch.save(state, folder / "trained.pt")
    words = (
        "--method",
        "gradient-dot",
        "--method",
        "influence-cg",
        *DAMPED,
        "--out",
        folder / "run",
        *SERIAL,
    )
    found = cli("attribute", RECIPE, "--at-checkpoint", folder / "trained.pt", *words)
    assert found.exit_code == 0, found.output
    return folder


def _unpacked(model, packed):
    start = 0
    for buffer in model.buffers():
        stop = start + buffer.numel() * buffer.element_size()
        yield torch.frombuffer(bytearray(packed[start:stop]), dtype=buffer.dtype).view(buffer.shape).clone()
        start = stop


def table(uri, method):
    found = (
        open_run(str(uri))
        .contributions(method)
        .to_table()
        .sort_by([("test_index", "ascending"), ("train_index", "ascending")])
    )
    return found["contribution"].to_numpy()


def test_the_scores_are_those_of_the_recorded_run_of_that_model(place):
    attribute(str(place / "trained"), {"gradient-dot": {}}, BatchNormed())
    right, found = table(place / "trained", "gradient-dot"), table(place / "run", "gradient-dot")
    assert np.abs(found - right).max() <= 1e-6 * np.abs(right).max()
    opened = open_run(str(place / "run"))
    assert np.array_equal(
        opened.trajectory().checkpoint(-1).weights,
        open_run(str(place / "trained")).trajectory().checkpoint(-1).weights,
    )


def test_readers_and_verify_take_it_for_a_run_of_no_steps(place):
    opened = open_run(str(place / "run"))
    trajectory = opened.trajectory()
    assert (len(trajectory.loss), trajectory.checkpoint_steps.tolist()) == (0, [0])
    assert set(opened.methods()) >= {"gradient-dot", "influence-cg"}
    assert opened.info["identity"]["at_checkpoint"].startswith("trained.pt sha256:")
    checked = verify(opened)
    assert checked.ok, checked.problems
    status = json.loads(cli("status", place / "run", "--format", "json").output)
    assert status["state"] == "complete"
    assert cli("top", place / "run").exit_code == 0


def test_outlier_gradients_are_found_and_what_looks_at_training_is_refused_by_name(place):
    found = cli(
        "detect",
        place / "run",
        RECIPE,
        "--by",
        "outlier-gradient",
        "--executor",
        "serial",
        "--format",
        "json",
    )
    assert found.exit_code == 0, found.output
    for by, what in (
        ("loss", "the visits"),
        ("self-tracin", "self-tracin"),
        ("self-influence", "the hypergradients"),
    ):
        found = cli("detect", place / "run", RECIPE, "--by", by, "--executor", "serial")
        assert found.exit_code == 1
        assert f"is a run at a checkpoint, without the training that {what}" in found.output


@pytest.mark.parametrize("method", ["hydra", "hydra-exact", "hydra-ekfac", "tracin", "sgd-influence"])
def test_methods_that_follow_training_are_refused_by_name(place, tmp_path, method):
    file = place / "trained.pt"
    found = cli(
        "attribute", RECIPE, "--at-checkpoint", file, "--method", method, "--out", tmp_path / "run", *SERIAL
    )
    assert (found.exit_code, found.output.count("\n")) == (1, 1)
    assert f"method {method} follows the recorded training" in found.output
    assert "use one of influence-cg" in found.output
    assert not (tmp_path / "run").exists()


def test_commands_that_train_again_are_refused(place):
    for words in (("evaluate",), ("verify", "--deep"), ("compare", "--every", "1")):
        found = cli(words[0], place / "run", RECIPE, *words[1:])
        assert found.exit_code == 1, found.output
        assert "is a run at a checkpoint (trained.pt), without a training" in found.output
    found = cli("replay", RECIPE, "--out", place / "run")
    assert "without a training that replay could follow" in found.output
    found = cli("run", RECIPE, "--at-checkpoint", place / "trained.pt", "--out", place / "run", *SERIAL)
    assert "method hydra follows the recorded training" in found.output
    with pytest.raises(SpecError, match="method tracin follows"):
        attribute(str(place / "run"), {"tracin": {}}, RECIPE)


def test_what_means_nothing_without_training_is_refused(place, tmp_path):
    file = str(place / "trained.pt")
    for fields, message in (
        ({"epochs": 3}, "epochs 3: with at_checkpoint nothing is trained"),
        ({"seeds": 2}, "seeds 2"),
        ({"init": file}, "init "),
        ({"visits": "on"}, "visits 'on'"),
    ):
        with pytest.raises(SpecError, match=message):
            RunSpec(at_checkpoint=file, **fields)
    spec = RunSpec(recipe=Small(), out=str(tmp_path / "run"), executor="serial")
    with pytest.raises(SpecError, match="at_checkpoint is missing"):
        attribute_checkpoint(spec, {"gradient-dot": {}})
    for words, message in (
        ((RECIPE, "--at-checkpoint", file), "with --at-checkpoint the one word is RECIPE"),
        (("--dtype", "float64"), "--dtype: RUN has fixed it"),
    ):
        found = cli("attribute", place / "run", *words, "--method", "gradient-dot")
        assert found.exit_code == 2
        assert message in found.output


def test_it_resumes_and_another_file_is_another_run(place, tmp_path):
    words = ("--method", "gradient-dot", "--out", place / "run", *SERIAL)
    before = numbers_of(place / "run")
    assert cli("attribute", RECIPE, "--at-checkpoint", place / "trained.pt", *words).exit_code == 0
    assert numbers_of(place / "run") == before
    other = {k: v + 1 if v.is_floating_point() else v for k, v in torch.load(place / "trained.pt").items()}
    torch.save(other, tmp_path / "trained.pt")
    found = cli("attribute", RECIPE, "--at-checkpoint", tmp_path / "trained.pt", *words)
    assert found.exit_code == 1
    assert 'at_checkpoint: stored "trained.pt sha256' in found.output
    with pytest.raises(SpecError, match="method hydra follows the recorded training"):
        run(
            RunSpec(
                recipe=Elsewhere(),
                at_checkpoint=str(place / "trained.pt"),
                out=str(tmp_path / "x"),
                executor="serial",
            )
        )


def numbers_of(uri):
    return {path.name: path.stat().st_mtime_ns for path in (uri / "contributions").rglob("*.parquet")}
