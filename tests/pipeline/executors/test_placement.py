from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hydra_pipe.pipeline.executors import events, placement, raysetup
from hydra_pipe.pipeline.executors.dispatch import Dispatch
from hydra_pipe.pipeline.executors.placement import Demand, Node
from hydra_pipe.pipeline.executors.ray_stage import worker_target
from hydra_pipe.storage.errors import (
    ClusterTooSmall,
    SpecError,
    WorkerLost,
)

from tests.faults import Recorder, units

GIB = 1 << 30


def test_slots_are_counted_node_by_node() -> None:
    small, large = Node(cpus=3, gpus=0, memory=8 * GIB), Node(cpus=16, gpus=1, memory=64 * GIB)
    assert placement.slots([small, small], Demand(cpus=2, gpus=0)) == 2  # not 6 // 2
    assert placement.slots([small, large], Demand(cpus=1, gpus=0.1)) == 10
    assert placement.memory_per_worker([small, large], Demand(cpus=1, gpus=0)) == 8 * GIB // 3
    assert placement.memory_per_worker([small], Demand(cpus=4, gpus=0)) == 0


def test_infeasible_demands_say_what_is_there_and_what_to_do() -> None:
    nodes = [Node(cpus=4, gpus=0, memory=GIB)] * 2
    with pytest.raises(ClusterTooSmall, match=r"1 CPU and 1 GPU.*8 CPU and 0 GPU.*--gpus-per-actor"):
        placement.check_feasible(nodes, Demand(cpus=1, gpus=1))
    with pytest.raises(ClusterTooSmall, match=r"6 CPU.*largest 4 CPU.*--cpus-per-actor"):
        placement.check_feasible(nodes, Demand(cpus=6, gpus=0))
    with pytest.raises(ClusterTooSmall, match=r"0 node"):
        placement.check_feasible([], Demand(cpus=1, gpus=0))


def test_dispatch_counts_attempts_and_retries_first() -> None:
    recorder = Recorder()
    now = 0.0
    dispatch = Dispatch("test", units(3), recorder, max_attempts=2, clock=lambda: now)
    lost, other = dispatch.start(), dispatch.start()
    dispatch.progress("unit-0", 1, 4)
    dispatch.progress("unit-0", 1, 4)
    dispatch.lose(lost, "killed")
    assert dispatch.start() is lost
    dispatch.progress("unit-0", 1, 4)
    now = 2.5
    dispatch.finish(other, {"x": 1})
    assert recorder.of(events.UnitFinished)[0].seconds == 2.5
    assert [event.attempt for event in recorder.of(events.UnitStarted)] == [1, 1, 2]
    assert len(recorder.of(events.UnitProgress)) == 2  # news only, and again after a retry
    with pytest.raises(WorkerLost, match=r"test unit-0.*2 time.*limit is 2.*last: killed again"):
        dispatch.lose(lost, "killed again")


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert raysetup.asked_address(None) == "10.0.0.1:6379"
    assert raysetup.asked_address("local") == "local"
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(SpecError, match=r"RAY_ADDRESS http.*host:port"):
        raysetup.asked_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert raysetup.asked_address(None) is None


def test_only_named_node_types_mean_an_autoscaler() -> None:
    plain = {"active_nodes": {"node_" + "c5" * 28: 1}, "idle_nodes": None}
    assert not raysetup.grows(None)
    assert not raysetup.grows(json.dumps({"autoscaler_report": plain}).encode())
    named = {"active_nodes": {"headgroup": 1}}
    assert raysetup.grows(json.dumps({"autoscaler_report": named}).encode())


def test_a_growing_cluster_is_asked_for_twice_what_it_has() -> None:
    clock = iter(range(0, 1000, 10)).__next__
    held = iter([0, 1, 4, 4])
    target = worker_target(held.__next__, workers=None, grows=True, units=6, clock=clock)
    assert [target(), target(), target()] == [1, 2, 6]
    held = iter([4, 4])
    assert worker_target(held.__next__, workers=3, grows=False, units=6, clock=clock)() == 3
    assert worker_target(held.__next__, workers=None, grows=False, units=6, clock=clock)() == 4


def test_session_directories_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(long))
    made = raysetup.session_directory()
    assert made is not None
    assert made.startswith("/tmp/hp-")
    os.rmdir(made)
    monkeypatch.setenv("RAY_TMPDIR", "/somewhere")
    assert raysetup.session_directory() is None


@pytest.mark.parametrize(
    ("detail", "said"),
    [
        ("Worker exits with an exit code 3. exit code 3", "its process ended with exit code 3"),
        (
            "Worker unexpectedly exits with a connection error code 2. End of file.",
            "its process was killed or crashed",
        ),
        ("The node was terminated expectedly.", "its node died"),
        ("killed by the memory monitor", "out of memory"),
        (
            "A node running low on memory.\nMemory on it was 6.87GB used / 23.54GB limit",
            "out of memory: Ray killed it because its node ran low (6.87GB of 23.54GB used)",
        ),
        ("first line\n\x1b[36mlast words\x1b[0m\n", "RuntimeError: last words"),
    ],
)
def test_why_a_worker_died_is_one_line(detail: str, said: str) -> None:
    assert raysetup.reason(RuntimeError(detail)).startswith(said)
    assert "\n" not in raysetup.reason(RuntimeError(detail))
