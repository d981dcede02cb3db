"""What goes wrong in training itself, and machines that are not there: named, once, and nothing false left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.errors import ClusterTooSmall, NonFiniteLoss, RecipeError, ReplayDiverged

from tests.end_to_end.bad_recipes import NanLoss, Unpicklable
from tests.end_to_end.slow_recipes import FromFile
from tests.end_to_end.support import assert_same_bits, cli, manifests, numbers, serial
from tests.recipes import Small

GPU = torch.cuda.is_available()


def words(out: Path, data: Path) -> tuple[Any, ...]:
    recipe = "tests.end_to_end.slow_recipes:FromFile"
    return (recipe, "--set", f"path={data}", "--executor", "serial", "--device", "cpu", "--out", out, "-q")


def forget_what_it_was_made_from(out: Path) -> None:
    """Make a run one of an earlier version: only replaying then tells that its data are others."""
    info = json.loads((out / "run.json").read_text())
    del info["made_of"], info["document_sha256"]
    (out / "run.json").write_text(json.dumps(info))


def test_data_that_change_between_record_and_replay(tmp_path):
    data, out = tmp_path / "data.npy", tmp_path / "run"
    FromFile.write(data)
    assert cli("record", *words(out, data)).exit_code == 0
    inputs = np.load(data)
    inputs[7, 2] += 1e-3
    np.save(data, inputs)
    refused = cli("run", *words(out, data))
    assert refused.exit_code == 1
    assert "(training samples)" in refused.stderr
    forget_what_it_was_made_from(out)
    before = manifests(out)
    failed = cli("run", *words(out, data))
    assert failed.exit_code == 1
    assert failed.stderr.count("\n") == 1
    for part in (
        "replay diverged at step ",
        " have crc32 ",
        ", recorded ",
        "did the recipe or its data change",
    ):
        assert part in failed.stderr
    # Nothing false is committed: the record, and at most the test gradients, which lie outside training.
    after = manifests(out)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.startswith(("hydra/replay/shard", "hydra/reduce"))]
    assert cli("top", out).exit_code == 1
    # The data put right, the same command goes on.
    FromFile.write(data)
    assert cli("run", *words(out, data)).exit_code == 0
    serial(tmp_path / "right", Small())
    assert_same_bits(numbers(out, shard=False), numbers(tmp_path / "right", shard=False))


def test_a_divergence_says_what_differs_between_the_machines(tmp_path, monkeypatch):
    data, out = tmp_path / "data.npy", tmp_path / "run"
    FromFile.write(data)
    assert cli("record", *words(out, data)).exit_code == 0
    np.save(data, np.load(data) * 1.01)
    forget_what_it_was_made_from(out)
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(ReplayDiverged, match=r"torch: recorded '\d.*', here '9\.9'"):
        serial(out, "tests.end_to_end.slow_recipes:FromFile", recipe_args={"path": str(data)})


def test_a_loss_that_is_not_a_number(tmp_path):
    with pytest.raises(
        NonFiniteLoss, match=r"batch loss is nan at step \d+ of 18 \(train_index .*\)"
    ) as caught:
        serial(tmp_path / "run", NanLoss())
    assert "17" in str(caught.value).split("train_index")[1]
    assert "lower the learning rate or look at these samples" in str(caught.value)
    assert not (tmp_path / "run" / "trajectory.zarr").exists()
    assert manifests(tmp_path / "run") == {}
    assert not list((tmp_path / "run").rglob("*.partial*"))
    assert cli("status", tmp_path / "run").exit_code == 0


def test_a_loss_that_is_not_a_number_through_the_command_line(tmp_path):
    failed = cli(
        "run", "tests.end_to_end.bad_recipes:NanLoss", "--executor", "serial", "--out", tmp_path / "run", "-q"
    )
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: the batch loss is nan at step ")
    assert failed.stderr.count("\n") == 1


@pytest.mark.ray
@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_gpus_that_no_node_has(warm_ray, tmp_path):
    with pytest.raises(ClusterTooSmall, match=r"1 CPU and 1 GPU .*lower --gpus-per-actor") as caught:
        ray_run(warm_ray, tmp_path / "run", Small(), gpus_per_actor=1)
    assert "came up in" not in str(caught.value)  # at once: no worker was waited for
    assert manifests(tmp_path / "run") == {}
    # Placement is no part of the spec: the same run on CPUs goes on.
    assert ray_run(warm_ray, tmp_path / "run", Small()).methods() == ["hydra"]


@pytest.mark.ray
@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_failing_worker_reports_as_this_process_does(warm_ray, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"batch loss is nan at step \d+ of 18"):
        ray_run(warm_ray, tmp_path / "nan", NanLoss())
    assert not (tmp_path / "nan" / "trajectory.zarr").exists()
    with pytest.raises(RecipeError, match=r"cannot be sent to workers.*--executor serial"):
        ray_run(warm_ray, tmp_path / "handle", Unpicklable())


def ray_run(address: str, out: Path, recipe: Any, **fields: Any) -> Any:
    asked = {"executor": "ray", "address": address, "workers": 1, "shards": 1, "device": "cpu", **fields}
    return run(RunSpec(recipe=recipe, out=str(out), **asked))


def test_the_callers_recipe_stays_as_it_is(tmp_path):
    recipe = Small()
    serial(tmp_path / "run", recipe, epochs=1, batch_size=16, seed=9)
    assert (recipe.epochs, recipe.batch_size, recipe.seed) == (3, 8, 3)
    assert vars(recipe) == {}
