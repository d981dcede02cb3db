"""A unit that does not move is spoken of; one that takes too long is given up."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.cli.progress import LogListener
from hydra_pipe.pipeline.executors import events
from hydra_pipe.pipeline.executors.base import Report, Unit
from hydra_pipe.pipeline.executors.dispatch import Dispatch
from hydra_pipe.pipeline.executors.ray import RayExecutor, make_executor
from hydra_pipe.pipeline.executors.serial import SerialExecutor
from hydra_pipe.pipeline.executors.stalls import Stalls, listened
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.errors import SpecError, WorkerLost

from tests.faults import Count, Recorder, units


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_word_every_minute_without_progress(capsys: pytest.CaptureFixture[str]) -> None:
    clock, heard = Clock(), Recorder()
    stalls = Stalls("hydra/replay", heard, clock=clock, timeout=None)
    stalls.begin("shard-0")
    stalls.begin("shard-1")
    for now in (59, 60, 61, 119, 120):
        clock.now = now
        stalls.moved("shard-1")
        stalls.say()
    assert [(e.unit, e.seconds) for e in heard.of(events.UnitStalled)] == [("shard-0", 60), ("shard-0", 120)]
    stalls.moved("shard-0")
    stalls.end("shard-1")
    clock.now = 179
    stalls.say()
    assert len(heard.events) == 2
    assert stalls.overdue("shard-0") is None
    LogListener(clock)(heard.events[1])
    assert (
        capsys.readouterr().err
        == "hydra/replay: shard-0 has made no progress for 2 min 00 s; --unit-timeout would give it up\n"
    )


def test_the_serial_executor_speaks_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_pipe.pipeline.executors.stalls.STALLED_SECONDS", 0.05)
    heard = Recorder()
    stalls = Stalls("s", heard, clock=time.monotonic, timeout=None)
    with listened(stalls, every=0.01):
        stalls.begin("u")
        deadline = time.monotonic() + 20
        while not heard.events and time.monotonic() < deadline:
            time.sleep(0.01)
    assert heard.of(events.UnitStalled)


def test_a_unit_that_takes_too_long_is_queued_again_and_then_named() -> None:
    clock, heard = Clock(), Recorder()
    dispatch = Dispatch("test", units(1), heard, max_attempts=2, clock=clock, timeout=10)
    unit = dispatch.start()
    clock.now = 10
    assert dispatch.stalls.overdue(unit.name) is None
    clock.now = 11
    why = dispatch.stalls.overdue(unit.name)
    assert why == "it took longer than 10 s (--unit-timeout)"
    dispatch.lose(unit, why)
    assert [event.reason for event in heard.of(events.UnitRetried)] == [why]
    assert dispatch.stalls.overdue(dispatch.start().name) is None  # each attempt has its own time
    with pytest.raises(WorkerLost, match=r"unit-0.* 2 time.*longer than 10 s \(--unit-timeout\)"):
        dispatch.lose(unit, why)


def test_serial_ends_at_the_next_report(tmp_path: Path) -> None:
    clock = Clock()

    def slow(unit: Unit, report: Report) -> dict[str, Any]:
        for step in range(10):
            clock.now += 4
            report(step + 1, 10)
        return {}

    SerialExecutor(clock=clock).run("test", units(2), slow, events.null)
    SerialExecutor(clock=clock, unit_timeout=40).run("test", units(2), slow, events.null)
    with pytest.raises(WorkerLost, match=r"test unit-0: it took longer than 39 s \(--unit-timeout\)"):
        SerialExecutor(clock=clock, unit_timeout=39).run("test", units(2), slow, events.null)


def test_serial_ends_a_unit_that_hangs() -> None:
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the tests' own limit has it
    waiting = signal.setitimer(signal.ITIMER_REAL, 0)

    def hangs(unit: Unit, report: Report) -> dict[str, Any]:
        time.sleep(60)
        return {}

    try:
        executor = make_executor(RunSpec(executor="serial", unit_timeout=1))
        begun = time.monotonic()
        with pytest.raises(WorkerLost, match=r"unit-0: it took longer than 1.0 s"):
            executor.run("test", units(1), hangs, events.null)
        assert time.monotonic() - begun < 30
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *waiting)


def test_the_limit_is_checked() -> None:
    with pytest.raises(SpecError, match="unit_timeout"):
        RunSpec(unit_timeout=0.5)
    assert RunSpec().unit_timeout is None


@pytest.mark.ray
def test_ray_gives_a_hung_worker_up(ray_cluster: str, tmp_path: Path) -> None:
    heard = Recorder()
    executor = RayExecutor(ray_cluster, workers=1, max_attempts=2, unit_timeout=3, tick=0.05)
    hangs = Count(directory=str(tmp_path), steps=1, pause=600)
    try:
        with pytest.raises(WorkerLost, match=r"unit-0.* 2 time.*longer than 3 s"):
            executor.run("test", units(1), hangs, heard)
    finally:
        executor.close()
    assert [event.attempt for event in heard.of(events.UnitRetried)] == [2]
    assert len(hangs.pids()) == 2  # killed, and another one
