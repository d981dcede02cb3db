from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.pipeline import events, placement, raysetup
from hydra_pipe.pipeline.dispatch import Dispatch
from hydra_pipe.pipeline.executors import RayExecutor, make_executor
from hydra_pipe.pipeline.placement import Demand, Node
from hydra_pipe.pipeline.serial import SerialExecutor
from hydra_pipe.pipeline.spec import RunSpec
from hydra_pipe.pipeline.wave import worker_target
from hydra_pipe.storage.errors import (
    ClusterTooSmall,
    NonFiniteLoss,
    RecipeError,
    ResourceError,
    SpecError,
    WorkerLost,
)

from tests.faults import Count, FaultPlan, Faulty, OddError, Unloadable, units

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


class Recorder:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.events: list[events.Event] = []

    def __call__(self, event: events.Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if type(event) is kind]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def count(tmp_path: Path) -> Count:
    return Count(directory=str(tmp_path))


def totals(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {name: values["total"] for name, values in results.items()}


EXPECTED = {f"unit-{n}": 10 + n for n in range(8)}


# -- serial ------------------------------------------------------------------------------------


def test_serial_runs_in_order_and_reports(count: Count, recorder: Recorder) -> None:
    executor = make_executor(RunSpec(executor="serial"))
    results = executor.run("test", units(3), count, recorder)
    assert list(results) == ["unit-0", "unit-1", "unit-2"]
    assert totals(results) == {"unit-0": 10, "unit-1": 11, "unit-2": 12}
    assert [event.unit for event in recorder.of(events.UnitFinished)] == list(results)
    assert recorder.of(events.UnitProgress)[-1] == events.UnitProgress(
        stage="test", unit="unit-2", done=4, total=4
    )
    assert executor.slots == executor.capacity()["slots"] == 1
    assert executor.capacity()["memory_per_worker"] > 0


def test_serial_progress_is_thinned_by_the_clock(tmp_path: Path, recorder: Recorder) -> None:
    executor = SerialExecutor(clock=lambda: 0.0)
    executor.run("test", units(1), Count(directory=str(tmp_path), steps=50, pause=0), recorder)
    assert [event.done for event in recorder.of(events.UnitProgress)] == [1, 50]


@pytest.mark.parametrize(
    ("action", "kind", "text"),
    [("raise:mine", ValueError, "mine"), ("hydra:nan", NonFiniteLoss, "nan"), ("odd", OddError, "one")],
)
def test_serial_lets_errors_through(
    count: Count, tmp_path: Path, action: str, kind: type[Exception], text: str
) -> None:
    plan = FaultPlan(directory=str(tmp_path), script={"unit-1": [action]})
    with pytest.raises(kind, match=text) as caught:
        SerialExecutor().run("test", units(3), Faulty(plan=plan, handler=count), events.null)
    assert type(caught.value) is kind
    assert plan.attempts("unit-1") == 1
    assert plan.attempts("unit-2") == 0


def test_a_killed_serial_run_goes_on_where_it_stood(tmp_path: Path) -> None:
    script = {"unit-1": ["kill@2", "kill-after"], "unit-2": ["kill"]}
    program = f"""
        from tests.faults import *
        from hydra_pipe.pipeline.serial import SerialExecutor
        from hydra_pipe.pipeline.events import null
        plan = FaultPlan(directory={str(tmp_path)!r}, script={script!r})
        handler = Faulty(plan=plan, handler=Count(directory={str(tmp_path)!r}))
        todo = [u for u in units(3) if not Path({str(tmp_path)!r}, u.name + ".done").exists()]
        SerialExecutor().run("test", todo, handler, null)
    """
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        command = [sys.executable, "-c", textwrap.dedent(program)]
        codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
    # The second attempt of unit-1 had committed before it was killed: it is not done a third time.
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, -signal.SIGKILL, 0]
    plan = FaultPlan(directory=str(tmp_path))
    assert [plan.attempts(f"unit-{n}") for n in range(3)] == [1, 2, 2]


def test_serial_needs_no_ray() -> None:
    program = (
        "import sys; from hydra_pipe.pipeline.executors import make_executor; "
        "from hydra_pipe.pipeline.spec import RunSpec; make_executor(RunSpec(executor='serial')).capacity(); "
        "make_executor(RunSpec()); assert 'ray' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# -- arithmetic --------------------------------------------------------------------------------


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


def test_dispatch_counts_attempts_and_retries_first(recorder: Recorder) -> None:
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


# -- Ray ---------------------------------------------------------------------------------------


@pytest.fixture
def executor(ray_cluster: str) -> Iterator[RayExecutor]:
    made = RayExecutor(ray_cluster, workers=2, start_timeout=60, tick=0.05)
    yield made
    made.close()


def gone(pids: set[int], seconds: float = 10.0) -> bool:
    """Tell whether all processes have ended, waiting for it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.ray
def test_waves_reuse_workers_and_close_ends_them(
    executor: RayExecutor, count: Count, recorder: Recorder
) -> None:
    results = executor.run("test", units(8), count, recorder)
    assert list(results) == list(EXPECTED)
    assert totals(results) == EXPECTED
    again = executor.run("next", units(2), count, recorder)
    assert len(count.pids()) <= 2
    assert {values["pid"] for values in again.values()} <= count.pids()
    # torch's thread settings belong to a thread: a worker must use one for everything.
    assert len({(values["pid"], values["thread"]) for values in results.values()}) <= 2
    assert {values["gpus"] for values in results.values()} == {""}
    assert len({values["omp"] for values in results.values()}) == 1
    assert len(recorder.of(events.UnitFinished)) == 10
    executor.close()
    assert gone(count.pids())


@pytest.mark.ray
def test_capacity(executor: RayExecutor) -> None:
    capacity = executor.capacity()
    assert capacity["cpus"] == 4
    assert capacity["slots"] == executor.slots == 2
    assert capacity["memory_per_worker"] > 0
    assert executor.capacity(start=False) == capacity


@pytest.mark.ray
def test_progress_arrives_while_a_unit_works(
    executor: RayExecutor, tmp_path: Path, recorder: Recorder
) -> None:
    executor.run("test", units(1), Count(directory=str(tmp_path), steps=20, pause=0.1), recorder)
    seen = [event.done for event in recorder.of(events.UnitProgress)]
    assert len(seen) >= 2
    assert seen == sorted(seen)


@pytest.mark.ray
def test_killed_workers_are_replaced(executor: RayExecutor, tmp_path: Path, recorder: Recorder) -> None:
    draw = random.Random(7)
    script = {
        "unit-0": ["kill"],
        "unit-2": ["kill@2", "kill-after"],
        "unit-3": ["exit:3"],
        "unit-5": [f"kill>{draw.uniform(0, 0.2):.3f}"],
        "unit-7": [f"kill>{draw.uniform(0, 0.2):.3f}"],
    }
    plan = FaultPlan(directory=str(tmp_path), script=script)
    handler = Faulty(plan=plan, handler=Count(directory=str(tmp_path), pause=0.06))
    assert totals(executor.run("test", units(8), handler, recorder)) == EXPECTED
    attempts = {name: plan.attempts(name) for name in EXPECTED}
    assert attempts == {name: 1 + len(script.get(name, ())) for name in EXPECTED}
    retried = recorder.of(events.UnitRetried)
    assert len(retried) == 6
    assert any("exit code 3" in event.reason for event in retried)
    assert any("killed or crashed" in event.reason for event in retried)
    assert all("\n" not in event.reason for event in retried)


@pytest.mark.ray
def test_attempts_are_capped(ray_cluster: str, count: Count, tmp_path: Path) -> None:
    plan = FaultPlan(directory=str(tmp_path), script={"unit-1": ["kill"] * 9})
    executor = RayExecutor(ray_cluster, workers=2, max_attempts=2)
    with pytest.raises(WorkerLost, match=r"test unit-1.*2 time.*limit is 2.*memory") as caught:
        executor.run("test", units(3), Faulty(plan=plan, handler=count), events.null)
    assert "\n" not in str(caught.value)
    assert plan.attempts("unit-1") == 2
    assert gone(count.pids())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("action", "kind", "text"),
    [
        ("raise:mine", ValueError, "mine"),
        ("hydra:loss is nan", NonFiniteLoss, "loss is nan"),
        ("odd", RuntimeError, "OddError: one and two"),
    ],
)
def test_user_errors_keep_their_type_and_are_not_retried(
    executor: RayExecutor, count: Count, tmp_path: Path, action: str, kind: type[Exception], text: str
) -> None:
    plan = FaultPlan(directory=str(tmp_path), script={"unit-0": [action] * 3})
    with pytest.raises(kind, match=text) as caught:
        executor.run("test", units(3), Faulty(plan=plan, handler=count), events.null)
    assert type(caught.value) is kind
    assert "faults.py" in str(caught.value.__cause__)  # where it happened is kept for --debug
    assert plan.attempts("unit-0") == 1


@pytest.mark.ray
def test_a_handler_that_cannot_travel_is_the_recipes_fault(executor: RayExecutor) -> None:
    with pytest.raises(RecipeError, match=r"no_such_module_anywhere.*every node"):
        executor.run("test", units(1), Unloadable(), events.null)
    lock = threading.Lock()
    with pytest.raises(RecipeError, match="cannot be sent"):
        executor.run("test", units(1), lambda unit, report: {"x": lock.locked()}, events.null)


@pytest.mark.ray
def test_infeasible_demands_are_refused_at_once(executor: RayExecutor, count: Count) -> None:
    executor.capacity()
    began = time.monotonic()
    with pytest.raises(ClusterTooSmall, match="--gpus-per-actor"):
        executor.run("test", units(1), count, events.null, gpus=1)
    with pytest.raises(ClusterTooSmall, match="--cpus-per-actor"):
        executor.run("test", units(1), count, events.null, cpus=5)
    assert time.monotonic() - began < 2
    assert not count.pids()


@pytest.mark.ray
def test_a_full_cluster_is_waited_for_only_so_long(ray_cluster: str, count: Count) -> None:
    import ray

    remote: Any = ray.remote
    holder = remote(num_cpus=4)(type("Holder", (), {"ready": lambda self: True})).remote()
    try:
        ray.get(holder.ready.remote())
        with pytest.raises(ClusterTooSmall, match=r"no worker came up in 1 s.*free are 0 of 4 CPU"):
            RayExecutor(ray_cluster, start_timeout=1).run("test", units(1), count, events.null)
    finally:
        ray.kill(holder)


@pytest.mark.ray
def test_more_workers_than_fit_queue_with_a_note(ray_cluster: str, count: Count, recorder: Recorder) -> None:
    executor = RayExecutor(ray_cluster, workers=50, cpus=2)
    executor.run("test", units(5), count, recorder)
    executor.close()
    assert len(count.pids()) <= 2
    assert recorder.of(events.Note)[0].message == "50 workers asked, the cluster holds 2 at a time"


@pytest.mark.ray
def test_an_interrupt_leaves_no_worker(executor: RayExecutor, tmp_path: Path) -> None:
    handler = Count(directory=str(tmp_path), steps=1000, pause=0.05)

    def interrupt(event: events.Event) -> None:
        if isinstance(event, events.UnitProgress):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        executor.run("test", units(3), handler, interrupt)
    assert handler.pids()
    assert gone(handler.pids())


@pytest.mark.ray
def test_addresses_that_do_not_answer_are_named(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"connected to Ray at .*, not 127.0.0.1:9"):
        RayExecutor("127.0.0.1:9").capacity()
    program = (
        "from hydra_pipe.pipeline.executors import RayExecutor\n"
        "try: RayExecutor().capacity()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("ResourceError no Ray cluster answers at 127.0.0.1:9; check --address")


@pytest.mark.ray
def test_a_driver_of_its_own_keeps_standard_output_clean(ray_cluster: str, tmp_path: Path) -> None:
    program = f"""
        from tests.faults import *
        from hydra_pipe.pipeline.executors import RayExecutor
        plan = FaultPlan(directory={str(tmp_path)!r}, script={{"unit-0": ["kill"]}})
        executor = RayExecutor({ray_cluster!r}, workers=1, max_attempts=2)
        handler = Faulty(plan=plan, handler=Count(directory={str(tmp_path)!r}))
        print(len(executor.run("test", units(2), handler, lambda event: None)))
        executor.close()
    """
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout == "2\n"
    assert said.stderr == ""
