"""Two commands in one run, and commands that are ended from outside: nothing is lost, and each says what became of it."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.storage import layout

from hydra_pipe import open_run
from tests.end_to_end.support import assert_same_bits, cli, numbers, serial
from tests.two_drivers import Drivers, wait_for

RECIPE = ("tests.end_to_end.slow_recipes:Paused", "--set", "pause=0.004")
PLACED = ("--executor", "serial", "--device", "cpu", "--quiet")
RUN = ("run", *RECIPE, *PLACED, "--shards", "4", "--out")


@pytest.fixture(scope="module")
def drivers() -> Iterator[Drivers]:
    with Drivers() as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Path:
    """An undisturbed run of ``Paused``, whose pauses change nothing."""
    out: Path = tmp_path_factory.mktemp("right") / "run"
    serial(out, RECIPE[0], recipe_args={"pause": 0.004}, shards=4)
    return out


@pytest.fixture(scope="module")
def right(whole: Path) -> dict[str, Any]:
    """What it computed."""
    return numbers(whole)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / layout.LOG).read_text().splitlines()]


def assert_tidy(out: Path) -> None:
    assert not (out / layout.LOCK).exists()
    assert not (out / layout.STOP_ASKED).exists()
    assert not list(out.rglob("*.partial*"))


def test_of_two_at_once_one_works_and_the_other_is_told(drivers, right, tmp_path):
    out = tmp_path / "run"
    ends = sorted(drivers.pair((*RUN, out), (*RUN, out)))
    assert [code for code, _ in ends] in ([0, 1], [0, 0]), ends
    for code, said in ends:
        assert "unexpected" not in said
        if code:
            assert said.count("\n") == 1
            assert "is in use by hydra-pipe run on " in said
    assert_same_bits(numbers(out), right)
    assert_tidy(out)


@pytest.mark.slow
def test_two_that_wait_come_one_after_the_other(drivers, right, tmp_path):
    out = tmp_path / "run"
    ends = drivers.pair((*RUN, out, "--wait"), (*RUN, out, "--wait"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_bits(numbers(out), right)
    lines = log_of(out)
    turns = [line["event"] for line in lines if line["event"] in ("Begun", "Ended")]
    assert turns == ["Begun", "Ended"] * 2, "never two at a time"
    assert [line["by"] for line in lines if line["event"] == "Ended"] == [None, None]
    assert sum(line["event"] == "UnitFinished" for line in lines) == 7, "each unit is done once"
    assert_tidy(out)


def test_two_commands_that_add_methods_lose_none(drivers, whole, right, tmp_path):
    """They wrote ``run.json`` back as each had read it: one's method was gone."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    ekfac = (*RUN, out, "--hessian", "ekfac", "--wait")
    added = ("attribute", out, RECIPE[0], "--method", "tracin", "--executor", "serial", "--quiet", "--wait")
    ends = drivers.pair(ekfac, added)
    assert [code for code, _ in ends] == [0, 0], ends
    found = open_run(out)
    assert set(found.methods()) == {"hydra", "hydra-ekfac", "tracin"}
    assert {name: entry.state for name, entry in found.noted.methods.items()} == dict.fromkeys(
        ("hydra", "hydra-ekfac", "tracin"), "complete"
    )
    assert_same_bits({name: value for name, value in numbers(out).items() if name in right}, right)
    assert_tidy(out)


def test_a_run_that_appeared_meanwhile_is_not_replaced(drivers, right, tmp_path):
    """It looked, saw nothing, and deleted what another had made since: the look is made under the lock."""
    out = tmp_path / "run"
    first = drivers.start((*RUN, out))
    wait_for(out / layout.LOCK, first)
    second = drivers.start((*RUN, out, "--seed", "9", "--wait"))
    assert (first.wait(), second.wait()) == (0, 1)
    assert "holds a run of another specification (seed: stored null, asked 9" in second.said()
    assert_same_bits(numbers(out), right)
    assert_tidy(out)


def test_killed_terminated_and_stopped_it_goes_on_at_once(drivers, right, tmp_path):
    out = tmp_path / "run"
    words = ("run", RECIPE[0], "--set", "pause=0.02", *PLACED, "--shards", "4", "--out", out)

    killed = drivers.start(words)
    wait_for(out / "manifests" / "record" / "trajectory.json", killed)
    killed.signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert (out / layout.LOCK).exists()

    terminated = drivers.start([word for word in words if word != "--quiet"])
    wait_for(out / "manifests" / "hydra" / "replay" / "shard-00000.json", terminated)
    terminated.signal(signal.SIGTERM)
    assert terminated.wait() == 143, terminated.said()
    said = terminated.said()
    assert f"took {out} over from hydra-pipe run on " in said
    assert "that process has ended" in said
    assert said.endswith("terminated (SIGTERM); the same command continues where this one stopped\n")
    assert not (out / layout.LOCK).exists()
    assert log_of(out)[-1]["by"] == "Terminated"

    stopped = drivers.start(words, BEAT_SECONDS=0.1, LOOK_SECONDS=0.02)
    writer = in_replay(out)
    assert writer["command"] == "hydra-pipe run"
    assert writer["pid"] == stopped.pid
    assert writer["standing"]["units"] == 4
    shown = cli("status", out).stdout
    assert f"process {stopped.pid}" in shown
    assert "to do what is missing" not in shown
    done = cli("stop", out)
    assert done.exit_code == 0, done.stderr
    assert "has ended; the same command continues" in done.stdout
    assert stopped.wait() == 130
    assert "stopped as `hydra-pipe stop` asked" in stopped.said()
    assert "of hydra/replay are left" in stopped.said()
    events = log_of(out)
    assert events[-1]["by"] == "RunStopped"
    last = events[max(k for k, line in enumerate(events) if line["event"] == "Begun") :]
    begun = sum(line["event"] == "UnitStarted" for line in last)
    assert begun == sum(line["event"] == "UnitFinished" for line in last), "what was in work was finished"
    assert cli("stop", out).stdout == f"nobody writes to {out}\n"

    assert drivers.start(words).wait() == 0
    assert_same_bits(numbers(out), right)
    assert_tidy(out)
    assert cli("verify", out, "--quiet").exit_code == 0


def in_replay(out: Path) -> dict[str, Any]:
    """Return who writes to a run, once that is at the replay."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        writer: dict[str, Any] | None = status(open_run(out))["writer"]
        if writer and writer["standing"] and writer["standing"]["stage"] == "hydra/replay":
            return writer
        time.sleep(0.02)
    raise AssertionError("it never came to the replay")


@pytest.mark.slow
def test_a_suspended_one_finds_its_run_taken_over(drivers, right, tmp_path):
    out = tmp_path / "run"
    quick = {"BEAT_SECONDS": 0.2, "STALE_SECONDS": 3.0, "LOOK_SECONDS": 0.05}
    first = drivers.start((*RUN, out), **quick)
    wait_for(out / "manifests" / "record" / "trajectory.json", first)
    first.signal(signal.SIGSTOP)
    second = drivers.start([word for word in (*RUN, out, "--wait") if word != "--quiet"], **quick)
    assert second.wait() == 0, second.said()
    assert "it gave no sign of life for 3 s" in second.said()
    first.signal(signal.SIGCONT)
    assert first.wait() == 1
    assert "is not this command's any more" in first.said()
    assert_same_bits(numbers(out), right)
    assert_tidy(out)
