"""``--init FILE``: a run from given weights is another run, and its file stays the one it began with."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import InputError, SpecError, SpecMismatch

from tests.end_to_end.support import assert_same_bits, cli, numbers, serial
from tests.recipes import TwoGroups
from tests.workers.training.test_initial import Adaptive, starting, trained

RECIPE = "tests.recipes:TwoGroups"


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: tensor.clone() for name, tensor in TwoGroups().model().state_dict().items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with files of weights, and a run that started from one; by the command line."""
    folder = tmp_path_factory.mktemp("initial")
    torch.save(weights(1), folder / "base.pt")
    safetensors.torch.save_file(weights(1), folder / "base.safetensors")
    safetensors.torch.save_file(weights(2), folder / "other.safetensors")
    found = cli("run", RECIPE, "--init", folder / "base.safetensors", "--out", folder / "run", *SERIAL)
    assert found.exit_code == 0, found.output
    return folder


SERIAL = ("--executor", "serial", "--device", "cpu", "--dtype", "float64", "--quiet")


def test_training_starts_from_the_file_and_everything_else_is_as_ever(place):
    opened = open_run(str(place / "run"))
    first, given = opened.trajectory().checkpoint(0), weights(1)
    for entry in opened.trajectory().parameters:
        here = first.weights[entry.start : entry.start + given[entry.name].numel()]
        assert np.array_equal(here, given[entry.name].double().reshape(-1).numpy())
    checked = verify(opened)
    assert checked.ok, checked.problems
    assert checked.conservation["ok"]
    assert opened.info["identity"]["init"].startswith("base.safetensors sha256:")


def test_the_same_weights_from_the_other_kind_of_file_have_the_same_bits(place, tmp_path):
    serial(tmp_path / "run", TwoGroups(), init=str(place / "base.pt"), dtype="float64", shards=2)
    assert_same_bits(numbers(tmp_path / "run", shard=False), numbers(place / "run", shard=False))


def test_another_file_is_another_run_and_is_named(place):
    for words, message in (
        (("--init", place / "other.safetensors"), 'init: stored "base.safetensors sha256'),
        ((), "asked nothing"),
    ):
        found = cli("run", RECIPE, *words, "--out", place / "run", *SERIAL)
        assert found.exit_code == 1
        assert message in found.output
        assert "holds a run of another specification" in found.output
        assert found.output.count("\n") == 1


def test_what_goes_on_with_the_run_finds_the_file_or_says_which_it_misses(place, tmp_path):
    shutil.copytree(place, tmp_path / "moved")
    out = tmp_path / "moved" / "run"
    noted = json.loads((out / "run.json").read_text())
    file = tmp_path / "moved" / "elsewhere" / "base.safetensors"
    noted["spec"]["init"] = str(file)
    del noted["document_sha256"]
    (out / "run.json").write_text(json.dumps(noted))
    with pytest.raises(SpecError, match=r"init .*elsewhere/base.safetensors: no such file"):
        attribute(str(out), {"gradient-dot": {}}, RECIPE)
    file.parent.mkdir()
    shutil.copy(place / "other.safetensors", file)
    with pytest.raises(SpecMismatch, match="init: stored"):
        attribute(str(out), {"gradient-dot": {}}, RECIPE)
    shutil.copy(place / "base.safetensors", file)
    assert "gradient-dot" in attribute(str(out), {"gradient-dot": {}}, RECIPE).methods()
    file.unlink()
    beside = {"influence-cg": {"damping": 2.0}}
    assert "influence-cg" in attribute(str(out), beside, RECIPE, init=place / "base.safetensors").methods()


def test_wrong_files_are_refused_in_one_line(place, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    (tmp_path / "torn.pt").write_bytes((place / "base.pt").read_bytes()[:200])
    for file, message in (
        (tmp_path / "none.pt", "no such file"),
        (place / "run", "must be a file of weights"),
        (tmp_path / "a.pt", "tensors are missing, first '0.weight'"),
        (tmp_path / "torn.pt", "cannot be read"),
    ):
        found = cli("run", RECIPE, "--init", file, "--out", tmp_path / "run", *SERIAL)
        assert (found.exit_code, found.output.count("\n")) == (1, 1), found.output
        assert message in found.output
        assert not (tmp_path / "run").exists()


@pytest.mark.ray
def test_workers_on_ray_start_from_the_same_file_and_check_it(place, tmp_path, warm_ray):
    file = tmp_path / "base.safetensors"
    shutil.copy(place / "base.safetensors", file)
    fields = {"recipe": TwoGroups(), "init": str(file), "dtype": "float64", "device": "cpu", "shards": 2}
    spec = RunSpec(**fields, out=str(tmp_path / "run"), executor="ray", address=warm_ray)
    run(spec, stages=("record",))
    shutil.copy(place / "other.safetensors", file)
    with pytest.raises(InputError, match="init: stored"):
        run(spec)
    shutil.copy(place / "base.safetensors", file)
    run(spec)
    assert_same_bits(numbers(tmp_path / "run", shard=False), numbers(place / "run", shard=False))


def test_adam_from_given_moments_adds_up_to_what_training_did_beyond_them(tmp_path):
    finished = serial(tmp_path / "run", starting(Adaptive, *trained(Adaptive)), dtype="float64", test="2")
    checked = verify(finished)
    assert checked.ok, checked.problems
    assert checked.conservation["ok"]
