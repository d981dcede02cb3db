"""The last unit of a stage, where it takes much longer than the others: shown, and begun a second time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra_pipe.cli.progress import LogListener
from hydra_pipe.pipeline.drive.writing import Fenced
from hydra_pipe.pipeline.executors import events, stragglers
from hydra_pipe.pipeline.executors.base import side_by_side
from hydra_pipe.pipeline.executors.dispatch import Dispatch
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.pipeline.units.curvature import CurvatureWork, DirectionsWork
from hydra_pipe.pipeline.units.record import CutWork, RecordWork
from hydra_pipe.pipeline.units.reduce import ReduceWork
from hydra_pipe.pipeline.units.replay import ReplayWork

from tests.faults import Count, FaultPlan, Faulty, Recorder, totals, units


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_is_a_straggler(capsys: pytest.CaptureFixture[str]) -> None:
    clock, heard = Clock(), Recorder()
    dispatch = Dispatch("test", units(4), heard, max_attempts=2, clock=clock)
    first, second, third = (dispatch.start() for _ in range(3))
    clock.now = 20
    dispatch.finish(first, {})
    clock.now = 24
    dispatch.finish(second, {})
    clock.now = 1000
    assert not dispatch.straggles(third)  # others wait: they are what the stage waits for
    last = dispatch.start()
    assert dispatch.straggles(third)
    assert not dispatch.straggles(last)
    clock.now = 1044
    assert not dispatch.straggles(last)  # twice the median of 20 and 24
    clock.now = 1044.1
    assert dispatch.straggles(last)
    assert dispatch.straggles(last)  # spoken of once
    seen = heard.of(events.UnitStraggles)
    assert [(event.unit, event.usual) for event in seen] == [("unit-2", 22), ("unit-3", 22)]
    dispatch.lose(last, "gone")
    assert not dispatch.straggles(last)
    assert dispatch.start() is last
    assert not dispatch.straggles(last)
    listener = LogListener(clock)
    listener(seen[0])
    listener(events.UnitBackedUp(stage="test", unit="unit-2"))
    assert capsys.readouterr().err == (
        "test: unit-2 takes long: 16 min 40 s so far, the others took about 22.0 s\n"
        "test: unit-2 is begun a second time on an idle worker; the first to finish counts\n"
    )


def test_short_units_and_a_stage_of_one_have_no_stragglers() -> None:
    clock = Clock()
    dispatch = Dispatch("test", units(2), events.null, max_attempts=2, clock=clock)
    first, second = dispatch.start(), dispatch.start()
    clock.now = 1000
    assert not dispatch.straggles(first)  # none is done: nobody knows what is usual
    clock.now = 1
    dispatch.finish(first, {})
    clock.now = stragglers.LEAST_SECONDS
    assert not dispatch.straggles(second)


def test_the_time_of_the_attempt_that_succeeded_and_the_progress_of_the_one_ahead() -> None:
    clock, heard = Clock(), Recorder()
    dispatch = Dispatch("test", units(1), heard, max_attempts=2, clock=clock)
    unit = dispatch.start()
    dispatch.progress(unit.name, 5, 10)
    clock.now = 100
    assert dispatch.may_back_up(unit)
    dispatch.back_up(unit)
    assert not dispatch.may_back_up(unit)
    for done in (1, 5, 6, 2):
        dispatch.progress(unit.name, done, 10)
    clock.now = 130
    dispatch.finish(unit, {}, second=True)
    assert [event.done for event in heard.of(events.UnitProgress)] == [5, 6]
    assert heard.of(events.UnitFinished)[0].seconds == 30


def test_units_that_clear_a_place_first_are_done_by_one_worker_only() -> None:
    alone = {RecordWork, CutWork, CurvatureWork, DirectionsWork}
    assert not any(work.side_by_side for work in alone)
    assert ReplayWork.side_by_side
    assert ReduceWork.side_by_side
    assert not side_by_side(lambda unit, report: {})
    for says in (True, False):  # nor does it get lost on the way to the workers
        assert side_by_side(Fenced(handler=Count(directory="", side_by_side=says), uri="", owner="")) is says


@pytest.fixture
def executor(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayExecutor]:
    monkeypatch.setattr(stragglers, "LEAST_SECONDS", 0.3)
    made = RayExecutor(ray_cluster, workers=2, start_timeout=60, tick=0.05)
    yield made
    made.close()


@pytest.mark.ray
@pytest.mark.parametrize("second", ["ok", "raise:mine", "kill"])
def test_the_last_unit_is_begun_a_second_time(executor: RayExecutor, tmp_path: Path, second: str) -> None:
    """The first attempt goes on only once the second has failed: so one of them is right, whichever it is."""
    go_on, heard = tmp_path / "go-on", Recorder()
    plan = FaultPlan(directory=str(tmp_path), script={"unit-0": [f"wait:{go_on}", second]})

    def listen(event: events.Event) -> None:
        heard(event)
        if isinstance(event, events.Note):
            go_on.touch()

    handler = Faulty(plan=plan, handler=Count(directory=str(tmp_path), side_by_side=True))
    results = executor.run("test", units(3), handler, listen)
    assert totals(results) == {"unit-0": 10, "unit-1": 11, "unit-2": 12}
    assert [event.unit for event in heard.of(events.UnitStraggles)] == ["unit-0"]
    assert [event.unit for event in heard.of(events.UnitBackedUp)] == ["unit-0"]
    assert plan.attempts("unit-0") == 2
    assert not heard.of(events.UnitRetried)
    assert [event.unit for event in heard.of(events.UnitFinished)].count("unit-0") == 1
    notes = [event.message for event in heard.of(events.Note)]
    slow = int((tmp_path / "unit-0.1.attempt").read_text())
    if second == "ok":
        assert not notes
        assert results["unit-0"]["pid"] != slow
        assert len(executor._pool) == 1  # the other worker was ended
    else:
        reason = "mine" if second == "raise:mine" else "its process was killed"
        assert [
            f"one of two attempts at unit-0 failed, the other goes on: {reason}" in note for note in notes
        ] == [True]
        assert results["unit-0"]["pid"] == slow
    assert totals(executor.run("next", units(2), handler, heard)) == {"unit-0": 10, "unit-1": 11}


@pytest.mark.ray
def test_a_unit_that_one_worker_alone_may_do_is_only_shown(executor: RayExecutor, tmp_path: Path) -> None:
    go_on, heard = tmp_path / "go-on", Recorder()
    plan = FaultPlan(directory=str(tmp_path), script={"unit-0": [f"wait:{go_on}"]})

    def listen(event: events.Event) -> None:
        heard(event)
        if isinstance(event, events.UnitStraggles):
            go_on.touch()

    handler = Faulty(plan=plan, handler=Count(directory=str(tmp_path)))
    executor.run("test", units(3), handler, listen)
    assert heard.of(events.UnitStraggles)
    assert not heard.of(events.UnitBackedUp)
    assert plan.attempts("unit-0") == 1
