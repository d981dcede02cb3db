"""The runner of stages: what is committed is skipped, what is void is forgotten before the work, notes are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hydra_pipe.pipeline.drive.stages import Needed, Runner, Stage, run_stage, run_stages, void
from hydra_pipe.pipeline.executors.base import Report, Unit
from hydra_pipe.pipeline.executors.serial import SerialExecutor
from hydra_pipe.pipeline.reading.run_info import read_info
from hydra_pipe.storage.documents import dump
from hydra_pipe.storage.errors import IncompleteStage
from hydra_pipe.storage.files import write_bytes
from hydra_pipe.storage.rundir import RunDirectory


class Commits:
    """A handler that commits nothing but its name, and may fail."""

    def __init__(self, uri: str, failing: str | None = None) -> None:
        self.uri, self.failing = uri, failing

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        if unit.name == self.failing:
            raise KeyboardInterrupt
        RunDirectory(self.uri).commit(unit.stage, unit.name, [], {"rows": 1})
        return {"rows": 1}


@pytest.fixture
def runner(tmp_path) -> tuple[Runner, list[Any]]:
    directory = RunDirectory(str(tmp_path / "r"))
    directory.update(lambda _: {"methods": {"m": {"state": "complete"}, "other": {"state": "complete"}}})
    heard: list[Any] = []
    return Runner(directory=directory, executor=SerialExecutor(), observer=heard.append), heard


def stage(runner: Runner, names: str, failing: str | None = None, **more: Any) -> Stage:
    return Stage(
        name="m/work",
        units=[Unit(stage="m/work", name=name) for name in names.split()],
        handler=lambda: Commits(runner.directory.uri, failing),
        total=3,
        label="row",
        **more,
    )


def test_only_what_is_missing_is_done_and_noted(runner):
    one, heard = runner
    assert run_stage(one, stage(one, "a b")) == ["a", "b"]
    assert run_stage(one, stage(one, "a b c")) == ["c"]
    assert run_stage(one, stage(one, "a b c")) == []
    noted = read_info(one.directory).stages["m/work"]
    assert noted.units == 4  # the closing one counts
    assert noted.seconds is not None
    assert sum(type(event).__name__ == "UnitSkipped" for event in heard) == 5


def test_a_handler_is_made_where_there_is_something_to_do(runner):
    one, _ = runner
    run_stage(one, stage(one, "a"))

    def never() -> Commits:
        raise AssertionError("nothing is to be done")

    assert run_stage(one, replace(stage(one, "a"), handler=never)) == []


def test_what_a_stage_needs_is_asked_before_anything_is_made(runner):
    one, _ = runner
    needs = [Needed(stage="record", unit="trajectory", command="record")]
    with pytest.raises(
        IncompleteStage, match="stage record has not finished trajectory; run `hydra-pipe record`"
    ):
        run_stage(one, stage(one, "a", needs=needs))
    assert "m/work" not in read_info(one.directory).stages


def of_an_earlier_version(one: Runner, name: str) -> None:
    """Commit a unit whose manifest does not say what it was made from."""
    made = one.directory.commit(name, "x", [], {})
    data = dump(replace(made, inputs=None).document(), seal=True)
    write_bytes(one.directory.manifest_path(name, "x"), data)


def test_what_says_its_inputs_is_void_only_where_they_are_others(runner):
    one, _ = runner
    run_stage(one, stage(one, "a"))
    reading = one.directory.ledger.remember()
    one.directory.ledger.use(one.directory.manifests("m/work"))
    one.directory.commit("m/later", "x", [], {}, reading)
    one.directory.drop("m/work")
    run_stage(one, stage(one, "a", voids=["m/later"]))
    assert one.directory.units("m/later") == ["x"]
    one.directory.commit("m/work", "a", [], {"rows": 2})
    one.directory.drop("m/work", "b")
    run_stage(one, stage(one, "a b"))
    assert one.directory.units("m/later") == []


def test_what_is_void_is_forgotten_before_the_work(runner):
    """Killed in the work, nothing of an earlier version is left that was made from what was to be replaced."""
    one, _ = runner
    for name in ("m/later", "other/later"):
        of_an_earlier_version(one, name)
    with pytest.raises(KeyboardInterrupt):
        run_stage(one, stage(one, "a b", failing="a", voids=["m/later", "m/none"]))
    assert one.directory.stages() == ["other/later"]
    states = {name: entry.state for name, entry in read_info(one.directory).methods.items()}
    assert states == {"m": "partial", "other": "complete"}


def test_nothing_is_void_where_nothing_is_done(runner):
    one, _ = runner
    run_stage(one, stage(one, "a"))
    one.directory.commit("m/later", "x", [], {})
    run_stage(one, stage(one, "a", voids=["m/later"]))
    assert one.directory.units("m/later") == ["x"]
    void(one, [])
    assert one.directory.units("m/later") == ["x"]


def test_notes_of_another_command_stay(runner):
    one, _ = runner

    class Meanwhile(Commits):
        def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
            info = one.directory.read()
            one.directory.update(
                lambda _: {**info, "methods": {**info["methods"], "new": {"state": "partial"}}}
            )
            return super().__call__(unit, report)

    run_stage(one, replace(stage(one, "a"), handler=lambda: Meanwhile(one.directory.uri)))
    assert "new" in read_info(one.directory).methods


def test_a_later_stage_is_made_from_what_an_earlier_one_did(runner):
    one, _ = runner
    seen = []

    def stages():
        seen.append((yield stage(one, "a b")))
        names = " ".join(f"{name}{name}" for name in one.directory.units("m/work"))
        seen.append((yield stage(one, names, kept=2)))

    run_stages(one, stages())
    assert seen == [["a", "b"], ["aa", "bb"]]
    assert read_info(one.directory).stages["m/work"].units == 5
