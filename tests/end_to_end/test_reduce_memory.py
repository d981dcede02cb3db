"""``--reduce-memory`` and free disk: where work fits, and nothing of what comes out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.pipeline.executors.base import Unit
from hydra_pipe.pipeline.reading.unit_values import UnitValues
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.pipeline.units.work import commit_unit
from hydra_pipe.storage import space
from hydra_pipe.storage.errors import StorageFull
from hydra_pipe.storage.rundir import RunDirectory

from tests.end_to_end.support import Heard, assert_same_bits, numbers, serial
from tests.recipes import Small

LEAST = 8 * 4 * 53
"""Eight rows of the model: many small tiles."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("tiles") / "run"
    assert serial(place, Small(), reduce_memory=LEAST).info["stages"]["hydra/reduce"]["units"] > 2
    return place


def test_a_run_goes_on_with_another_reduce_memory_and_the_same_bits(finished, tmp_path):
    right = numbers(finished)
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    units = sorted((out / "manifests/hydra/reduce").glob("*.json"))
    units[1].unlink()
    heard = Heard()
    run(RunSpec(recipe=Small(), out=str(out), executor="serial", device="cpu", shards=1), observer=heard)
    assert [unit for stage, unit in heard.done if stage == "hydra/reduce"] == [units[1].stem]
    assert_same_bits(numbers(out), right)
    for unit in units:
        unit.unlink()
    serial(out, Small(), reduce_memory=1 << 28, shards=1)
    assert_same_bits(numbers(out), right)


def test_less_disk_than_the_plan_says_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("hydra_pipe.pipeline.drive.drive.free_bytes", lambda uri: 100)
    monkeypatch.setattr("hydra_pipe.storage.space.free_bytes", lambda uri: 100)
    with pytest.raises(
        StorageFull, match=r"needs up to [\d,]+ bytes at .*, 100 are free; free some space"
    ) as caught:
        serial(tmp_path / "run", Small())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_written_already_is_not_needed_again(finished, tmp_path, monkeypatch):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    # Small stores are larger than their numbers: nothing is left to write.
    monkeypatch.setattr("hydra_pipe.pipeline.drive.drive.free_bytes", lambda uri: 1)
    monkeypatch.setattr("hydra_pipe.storage.space.free_bytes", lambda uri: 1)
    serial(out, Small(), shards=1)


def test_every_unit_looks_for_its_room_before_it_begins(tmp_path, monkeypatch):
    run_directory = RunDirectory(tmp_path / "run")
    begun = []

    def work(run: RunDirectory) -> tuple[list[str], UnitValues]:
        begun.append(run.uri)
        return [], UnitValues()

    unit = Unit(stage="hydra/replay", name="shard-00000", disk_bytes=1 << 20)
    monkeypatch.setattr("hydra_pipe.storage.space.free_bytes", lambda uri: (1 << 20) - 1)
    with pytest.raises(StorageFull, match=r"hydra/replay shard-00000: it needs up to 1,048,576 bytes"):
        commit_unit(run_directory.uri, unit, work)
    assert begun == []
    monkeypatch.undo()
    assert space.free_bytes(str(tmp_path / "not" / "there")) > 0
    assert space.free_bytes("memory://x") is None
