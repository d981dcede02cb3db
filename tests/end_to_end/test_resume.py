"""Killed, interrupted, starved, damaged: the same command again ends with the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec

from tests.conftest import ROOT
from tests.end_to_end.nursery import OPTIONS, PAUSED, Nursery
from tests.end_to_end.slow_recipes import Paused, Wide
from tests.end_to_end.support import Heard, assert_same_bits, cli, files, manifests, numbers, serial
from tests.faults import FaultPlan, spoiled
from tests.recipes import Images, Small
from tests.small_disk import fill, mounted


@pytest.fixture(scope="module")
def right(tmp_path_factory: Any) -> dict[str, Any]:
    """An undisturbed run of ``Paused``, whose pauses change nothing."""
    out = tmp_path_factory.mktemp("right") / "run"
    serial(out, Paused(), shards=4)
    return numbers(out)


def again(out: Path, heard: Heard, **fields: Any) -> None:
    """Run what the fixtures ran once more at ``out``."""
    asked = {"recipe": Small(), "executor": "serial", "device": "cpu", "shards": 4, **fields}
    run(RunSpec(out=str(out), **asked), observer=heard)


# ---------------------------------------------------------------------- workers that die


@pytest.mark.ray
def test_killed_workers_change_no_bit(warm_ray, tmp_path, monkeypatch):
    serial(tmp_path / "right", Images(), shards=3)
    (tmp_path / "faults").mkdir()
    steps = [random.randint(1, 12) for _ in range(2)]
    plan = FaultPlan(
        directory=str(tmp_path / "faults"),
        script={
            "trajectory": [f"kill@{steps[0]}"],  # while training
            "shard-00000": [f"kill@{steps[1]}"],  # while replaying
            "shard-00002": ["kill-after"],  # committed, and nobody heard of it
        },
    )
    monkeypatch.setattr(RayExecutor, "run", spoiled(RayExecutor.run, plan))
    fields = {"executor": "ray", "address": warm_ray, "workers": 2, "shards": 3}
    serial(tmp_path / "run", Images(), **fields)
    assert [plan.attempts(name) for name in plan.script] == [2, 2, 2], steps
    assert_same_bits(numbers(tmp_path / "run"), numbers(tmp_path / "right"))
    serial(tmp_path / "run", Images(), **fields)  # finds all done, and tidies up
    assert plan.attempts("trajectory") == 2
    assert not list((tmp_path / "run").rglob("*.partial*"))
    assert cli("verify", tmp_path / "run", "--quiet").exit_code == 0


# ---------------------------------------------------------------------- a driver that dies


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


def test_a_driver_killed_again_and_again_ends_with_the_same_bits(nursery, right, tmp_path):
    """One run directory, killed at random times until it happens to get through."""
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    out = tmp_path / "run"
    # Every unit takes a third of a second, and so does the survey before it: no attempt gets far.
    words = ["run", PAUSED[0], "--set", "pause=0.02", *OPTIONS, "--out", str(out)]
    killed, before = 0, manifests(out)
    for _ in range(8):
        code = nursery.drive(words, after=chance.uniform(0.1, 0.8))
        assert code in (-signal.SIGKILL, 0), seed
        found = manifests(out)
        # What was committed stays as it was, unread by nobody and not done again.
        assert {name: found[name] for name in before} == before, seed
        before = found
        killed += code != 0
        if code == 0:
            break
    else:
        assert nursery.drive(words) == 0
    assert killed >= 2, "too quick to be killed: make the pauses longer"
    assert_same_bits(numbers(out), right)
    assert not list(out.rglob("*.partial*"))
    assert cli("verify", out, "--quiet").exit_code == 0


@pytest.mark.parametrize(
    "waits_for",
    [
        "record/trajectory.json",
        "hydra/replay/shard-00001.json",
        pytest.param("run.json", marks=pytest.mark.slow),
        pytest.param("test-gradients/index.json", marks=pytest.mark.slow),
    ],
)
def test_a_driver_killed_in_each_stage(waits_for, nursery, right, tmp_path):
    """Killed just after the first sight of a file: in record, test gradients, replay; then resumed."""
    sight = waits_for if waits_for == "run.json" else f"manifests/{waits_for}"
    out, code = nursery.stopped(tmp_path, sight, after=0.03, number=signal.SIGKILL)
    assert code == -signal.SIGKILL
    before = manifests(out)
    heard = Heard()
    again(out, heard, recipe=PAUSED[0], recipe_args={"pause": 0.004})
    after = manifests(out)
    assert {name: after[name] for name in before} == before
    skipped = {f"{stage}/{unit}.json" for stage, unit in heard.skipped}
    assert {name for name in before if "index" not in name and "interclass" not in name} == skipped
    assert not {f"{stage}/{unit}.json" for stage, unit in heard.done} & set(before)
    assert_same_bits(numbers(out), right)


def test_a_driver_killed_in_reduce(nursery, tmp_path, right):
    """Reduce is quick: kill it as soon as its first Parquet file is under way."""
    out = tmp_path / "run"
    serial(out, PAUSED[0], recipe_args={"pause": 0.004}, shards=4)
    # As if the driver had died between replay and the end of reduce.
    for name in ("rows-00000.json", "interclass.json"):
        (out / "manifests" / "hydra" / "reduce" / name).unlink()
    (out / ".part-x.parquet.0123.partial").write_bytes(b"half")
    shutil.rmtree(out / "samples")
    part = next((out / "contributions" / "method=hydra").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    words = ["run", *PAUSED, *OPTIONS, "--out", str(out)]
    part.unlink()
    assert nursery.drive(words, seen=part, after=0) in (-signal.SIGKILL, 0)
    again(out, Heard(), recipe=PAUSED[0], recipe_args={"pause": 0.004})
    assert_same_bits(numbers(out), right)
    assert not list(out.rglob("*.partial*"))


@pytest.mark.parametrize("sight", ["run.json", "manifests/hydra/replay/shard-00000.json"])
def test_an_interrupt_ends_with_130_and_resumes(sight, nursery, right, tmp_path):
    out, code = nursery.stopped(tmp_path, sight, after=0.02, number=signal.SIGINT)
    assert code == 130
    again(out, Heard(), recipe=PAUSED[0], recipe_args={"pause": 0.004})
    assert not list(out.rglob("*.partial*"))
    assert_same_bits(numbers(out), right)


def test_the_installed_command_killed_and_run_again(right, tmp_path):
    """The real thing once: own process group, SIGKILL, the same command line again."""
    code = "from hydra_pipe.cli import main; main()"
    slow = (PAUSED[0], "--set", "pause=0.02")  # after the first shard it still takes a second
    command = [sys.executable, "-c", code, "run", *slow, *OPTIONS, "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "manifests" / "hydra" / "replay" / "shard-00000.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert cli("status", tmp_path / "run").exit_code == 0
    assert cli("top", tmp_path / "run").exit_code == 1
    assert cli(*command[3:]).exit_code == 0
    assert_same_bits(numbers(tmp_path / "run"), right)


# ---------------------------------------------------------------------- damage


DAMAGED = {
    "hypergradients": ("hypergradients/method=hydra.zarr/hypergradient/c/5/0", ("hydra/replay",)),
    "hypergradient metadata": ("hypergradients/method=hydra.zarr/zarr.json", ("hydra/replay",)),
    "hypergradient array metadata": (
        "hypergradients/method=hydra.zarr/hypergradient/zarr.json",
        ("hydra/replay",),
    ),
    "tracked indices": ("hypergradients/method=hydra.zarr/train_index/c/0", ("hydra/replay",)),
    "test gradients": ("test_gradients.zarr/gradient/c/1/0", ("test-gradients",)),
    "test gradient metadata": ("test_gradients.zarr/zarr.json", ("test-gradients",)),
    "test losses": ("test_gradients.zarr/loss/c/1", ("test-gradients",)),
    "test indices": ("test_gradients.zarr/test_index/c/0", ("test-gradients",)),
    "contributions": ("contributions/method=hydra/part-00000-00000.parquet", ("hydra/reduce",)),
    "samples": ("samples/method=hydra/part-00000.parquet", ("hydra/reduce",)),
    "interclass": ("interclass/method=hydra/part-00000.parquet", ("hydra/reduce",)),
    "the record": ("trajectory.zarr/batches/c/0/0", None),
    "record metadata": ("trajectory.zarr/zarr.json", None),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("whole") / "run"
    serial(out, Small(), shards=4)
    return out


@pytest.fixture(scope="module")
def wholes(whole: Path) -> dict[str, Any]:
    """The numbers of ``whole``."""
    return numbers(whole)


# A file that is gone is found in one way whatever it holds: one of each stage.
GONE = ("hypergradients", "test gradient metadata", "contributions", "record metadata")


@pytest.mark.parametrize(
    ("what", "how"), [*((what, "flipped") for what in DAMAGED), *((what, "missing") for what in GONE)]
)
def test_damage_is_noticed_and_only_that_done_again(what, how, whole, wholes, tmp_path):
    (name, stages), out = DAMAGED[what], tmp_path / "run"
    shutil.copytree(whole, out)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 0x10
    (out / name).write_bytes(data) if how == "flipped" else (out / name).unlink()
    assert cli("verify", out, "--quiet").exit_code == 1
    before, heard = manifests(out), Heard()
    again(out, heard)
    assert_same_bits(numbers(out), wholes)
    assert cli("verify", out, "--quiet").exit_code == 0
    if stages is None:
        return  # everything follows from the record
    assert {stage for stage, _ in heard.done} <= set(stages)
    after = manifests(out)
    changed = {path for path in before if before[path] != after[path]}
    assert changed
    assert all(path.startswith(stages) for path in changed)
    if name.endswith("c/5/0"):
        assert [unit for _, unit in heard.done] == ["shard-00001"]
        assert len(heard.skipped) == 1 + 1 + 3 + 1


def test_a_damaged_manifest_is_no_reason_to_give_up(whole, wholes, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    target = out / "manifests" / "hydra" / "replay" / "shard-00002.json"
    target.write_bytes(target.read_bytes()[:-40])
    heard = Heard()
    again(out, heard)
    assert heard.done == [("hydra/replay", "shard-00002")]
    assert_same_bits(numbers(out), wholes)


def test_running_again_does_nothing(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {name: (out / name).read_bytes() for name in files(out) if name != "run.json"}
    heard = Heard()
    again(out, heard)
    assert heard.done == []
    assert len(heard.skipped) == 1 + 1 + 4 + 1
    assert {name: (out / name).read_bytes() for name in files(out) if name != "run.json"} == before


# ---------------------------------------------------------------------- another specification


def test_another_spec_is_refused_by_name_and_overwrite_replaces(tmp_path):
    out = tmp_path / "run"
    words = ("run", "tests.recipes:Small", *OPTIONS, "--shards", "1", "--out", out)
    assert cli(*words, "--epochs", "1").exit_code == 0
    before = {name: (out / name).read_bytes() for name in files(out)}
    refused = cli(*words, "--epochs", "2", "--dtype", "float64", "--test", "3")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    for part in ("epochs: stored 1, asked 2", 'dtype: stored "float32"', "test: stored", "--overwrite"):
        assert part in refused.stderr
    assert "seed" not in refused.stderr
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    (out / "notes.txt").write_text("mine")
    replaced = cli(*words, "--epochs", "2", "--overwrite")
    assert replaced.exit_code == 0, replaced.stderr
    serial(tmp_path / "right", "tests.recipes:Small", epochs=2)
    assert_same_bits(numbers(out), numbers(tmp_path / "right"))
    assert (out / "notes.txt").read_text() == "mine"


def test_placement_may_change_and_the_cut_stays(tmp_path):
    out = tmp_path / "run"
    words = ("tests.recipes:Small", "--executor", "serial", "--device", "cpu", "--quiet", "--out", out)
    assert cli("record", *words).exit_code == 0
    assert cli("run", *words, "--max-attempts", "7", "--workers", "2").exit_code == 0


def test_overwrite_of_the_same_spec_resumes(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before, heard = manifests(out), Heard()
    spec = RunSpec(recipe=Small(), out=str(out), executor="serial", device="cpu", shards=4, overwrite=True)
    run(spec, observer=heard)
    assert heard.done == []
    assert manifests(out) == before


def test_a_changed_index_file_is_another_spec(tmp_path):
    listed, out = tmp_path / "track.txt", tmp_path / "run"
    listed.write_text("1\n5\n")
    words = ("run", "tests.recipes:Small", *OPTIONS, "--shards", "1", "--out", out, "--track", listed)
    assert cli(*words).exit_code == 0
    listed.write_text("# the same\n5\n\n1\n")
    assert cli(*words).exit_code == 0
    listed.write_text("1\n6\n")
    refused = cli(*words)
    assert refused.exit_code == 1
    assert "tracked: stored" in refused.stderr
    assert numbers(out)["train_index"].tolist() == [1, 5]


def test_stages_one_by_one_are_the_run(wholes, tmp_path):
    out = tmp_path / "run"
    words = ("tests.recipes:Small", *OPTIONS, "--out", out)
    early = cli("reduce", *words)
    assert early.exit_code == 1
    assert "hydra-pipe record" in early.stderr
    for command in ("record", "replay", "reduce"):
        done = cli(command, *words)
        assert done.exit_code == 0, done.stderr
    assert_same_bits(numbers(out), wholes)


# ---------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    try:
        with mounted(tmp_path / "disk", "4m") as place:
            yield place
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_disk_that_fills_up_during_replay(small_disk, tmp_path):
    out = small_disk / "run"
    words = ("tests.end_to_end.slow_recipes:Wide", *OPTIONS, "--out", out)
    assert cli("record", *words).exit_code == 0
    assert cli("run", "tests.recipes:Small", "--executor", "serial", "--out", out).exit_code == 1
    filler = fill(small_disk, 200 << 10)
    failed = cli("run", *words)
    assert failed.exit_code == 1, failed.output
    assert failed.stderr.startswith("error: no space left ")
    assert "run the same command again" in failed.stderr
    assert failed.stderr.count("\n") == 1
    before = manifests(out)
    done = [name for name in before if name.startswith("hydra/replay/shard")]
    assert len(done) < 4
    filler.unlink()
    assert cli("run", *words).exit_code == 0
    after = manifests(out)
    assert {name: after[name] for name in before} == before
    serial(tmp_path / "right", Wide(), shards=4)
    assert_same_bits(numbers(out), numbers(tmp_path / "right"))
    assert not list(out.rglob("*.partial*"))


@pytest.mark.parametrize("leave", [0, 12 << 10, 120 << 10, 400 << 10, 600 << 10])
def test_a_disk_that_is_full_anywhere(leave, small_disk, wholes):
    """From nothing at all to nearly enough: one line, and a run that goes on when there is space."""
    out = small_disk / "run"
    words = ("run", "tests.recipes:Small", *OPTIONS, "--out", out)
    filler = fill(small_disk, leave)
    failed = cli(*words)
    if failed.exit_code:
        assert failed.exit_code == 1
        assert failed.stderr.startswith("error: no space left"), failed.stderr
        assert failed.stderr.count("\n") == 1
    else:
        assert leave > 500 << 10
    filler.unlink()
    again = cli(*words)
    assert again.exit_code == 0, again.stderr
    assert_same_bits(numbers(out), wholes)
