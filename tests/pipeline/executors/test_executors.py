from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.pipeline.executors import events, ray_stage
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.storage.errors import (
    ClusterTooSmall,
    NonFiniteLoss,
    RecipeError,
    ResourceError,
    WorkerLost,
)
from hydra_pipe.workers.actor import versions

from tests.faults import Count, FaultPlan, Faulty, Recorder, SlowToLoad, Unloadable, totals, units

ROOT = Path(__file__).resolve().parents[3]
EXPECTED = {f"unit-{n}": 10 + n for n in range(8)}
KILLED = "its process was killed or crashed (the system may have run out of memory)"


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def count(tmp_path: Path) -> Count:
    return Count(directory=str(tmp_path))


@pytest.fixture
def executor(ray_cluster: str) -> Iterator[RayExecutor]:
    made = RayExecutor(ray_cluster, workers=2, start_timeout=60, tick=0.05)
    yield made
    made.close()


def gone(pids: set[int], seconds: float = 300.0) -> bool:
    """Tell whether all processes have ended, waiting for it however busy the machine is."""
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
    assert capacity.cpus == 4
    assert capacity.slots == executor.slots == 2
    assert capacity.memory_per_worker > 0
    assert executor.capacity(start=False) == capacity


@pytest.mark.ray
def test_progress_arrives_while_a_unit_works(
    executor: RayExecutor, tmp_path: Path, recorder: Recorder
) -> None:
    """The unit ends once two reports of it have come, and so never unless they come while it works."""
    enough = tmp_path / "enough"

    def heard(event: events.Event) -> None:
        recorder(event)
        if len(recorder.of(events.UnitProgress)) == 2:
            enough.touch()

    endless = Count(directory=str(tmp_path), steps=10_000, pause=0.05, until=str(enough))
    executor.run("test", units(1), endless, heard)
    seen = [event.done for event in recorder.of(events.UnitProgress)]
    assert len(seen) >= 2
    assert seen == sorted(seen)
    assert seen[-1] < 10_000


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
    # Ray learns an exit code from the worker's last words; where the closed connection is seen first, it knows none.
    told = ("its process ended with exit code 3", KILLED)
    assert all(event.reason in (told if event.unit == "unit-3" else told[1:]) for event in retried), retried
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
    with pytest.raises(ClusterTooSmall, match="--gpus-per-actor") as gpus:
        executor.run("test", units(1), count, events.null, gpus=1)
    with pytest.raises(ClusterTooSmall, match="--cpus-per-actor") as cpus:
        executor.run("test", units(1), count, events.null, cpus=5)
    assert not any("came up in" in str(caught.value) for caught in (gpus, cpus))  # nothing was waited for
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
def test_loading_may_take_longer_than_starting(
    executor: RayExecutor, count: Count, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor.run("test", units(1), count, events.null)
    monkeypatch.setattr(executor, "_start_timeout", 0.5)
    monkeypatch.setattr(ray_stage, "STALLED_SECONDS", 1.0)
    executor.run("test", units(2), SlowToLoad(handler=count), recorder)
    assert any("has been loading the recipe" in note.message for note in recorder.of(events.Note))


@pytest.mark.ray
def test_more_workers_than_fit_queue_with_a_note(ray_cluster: str, count: Count, recorder: Recorder) -> None:
    executor = RayExecutor(ray_cluster, workers=50, cpus=2)
    executor.run("test", units(5), count, recorder)
    executor.close()
    assert len(count.pids()) <= 2
    assert recorder.of(events.Note)[0].message == "50 workers asked, the cluster holds 2 at a time"


@pytest.mark.ray
def test_an_interrupt_leaves_no_worker(executor: RayExecutor, tmp_path: Path) -> None:
    handler = Count(directory=str(tmp_path), steps=100_000, pause=0.05)  # hours, unless it is ended
    sent: list[int] = []

    def interrupt(event: events.Event) -> None:
        if isinstance(event, events.UnitProgress) and not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell used &
    try:
        with pytest.raises(KeyboardInterrupt):
            executor.run("test", units(3), handler, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert handler.pids()
    assert gone(handler.pids())


@pytest.mark.ray
def test_addresses_that_do_not_answer_are_named(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"connected to Ray at .*, not 127.0.0.1:9"):
        RayExecutor("127.0.0.1:9").capacity()
    program = (
        "from hydra_pipe.pipeline.executors.ray import RayExecutor\n"
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
        from hydra_pipe.pipeline.executors.ray import RayExecutor
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


@pytest.mark.ray
def test_a_worker_of_other_versions_is_refused_before_it_loads_anything(
    executor: RayExecutor, count: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {**versions(), "torch": "1.0.0", "python": "3.8", "unheard-of": "1"}
    monkeypatch.setattr("hydra_pipe.workers.actor.versions", lambda: there)  # of this process: the driver
    text = (
        r"the worker on \S+ has python [\d.]+, torch [\d.]+, the driver python 3.8, torch 1.0.0: .*every node"
    )
    with pytest.raises(ResourceError, match=text) as caught:
        executor.run("test", units(1), Unloadable(), events.null)
    assert "\n" not in str(caught.value)
    assert not count.pids()
