"""The commands on a small finished run: what they print, in all formats, within 80 columns."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hydra_pipe.cli import main
from hydra_pipe.pipeline.executors import events
from hydra_pipe.pipeline.opened_run import Run, open_run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.errors import WorkerLost

from tests.builders import Built, M, N


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("runs") / "digits").build()


def call(*words: str, code: int = 0) -> Result:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, words, prog_name="hydra-pipe")
    assert result.exit_code == code, result.output
    return result


def fits(text: str) -> bool:
    """Whether all but the commands to copy stay within 80 columns."""
    return max(len(line) for line in text.splitlines() if not line.startswith("  ")) <= 80


# ---------------------------------------------------------------- reading commands


def test_top_as_a_table(built: Built) -> None:
    out = call("top", built.uri, "-k", "3").stdout
    assert out.splitlines()[0] == "3 most helpful training samples for the mean over the test samples (hydra)"
    assert len(out.splitlines()) == 6
    assert f"{built.exact.mean(1).max():+.3e}" in out
    assert fits(out)


def test_top_for_a_test_sample_in_csv_and_json(built: Built) -> None:
    words = ("top", built.uri, "--test", "5", "-k", "4", "--harmful", "--format")
    rows = list(csv.DictReader(io.StringIO(call(*words, "csv").stdout)))
    document = json.loads(call(*words, "json").stdout)
    assert [int(row["train_index"]) for row in rows] == [r["train_index"] for r in document["rows"]]
    assert (document["test_index"], document["harmful"], len(rows)) == (5, True, 4)
    assert "test sample 5, label 2 (hydra)" in call(*words, "table").stdout


def test_a_missing_label_is_a_dash(tmp_path: Path) -> None:
    built = Built(tmp_path / "r")
    built.train_label[:] = -1
    built.test_label[:] = -1
    out = call("top", built.build().uri, "--test", "1").stdout
    assert "-1" not in out.replace("e-1", "")
    assert "label" not in out.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test", "4"], "error: test sample 4 is not in"),
        (["-k", "0"], "error: k is 0"),
        (["--method", "tracin"], "has no method 'tracin'"),
    ],
)
def test_top_refuses_in_one_line(built: Built, words: list[str], message: str) -> None:
    result = call("top", built.uri, *words, code=1)
    assert message in result.stderr
    assert (result.stderr.count("\n"), result.stdout) == (1, "")


@pytest.mark.parametrize("command", ["top", "status", "verify"])
def test_no_run_is_one_line(tmp_path: Path, command: str) -> None:
    result = call(command, str(tmp_path / "none"), code=1)
    assert result.stderr.startswith("error: no run at ")
    assert result.stderr.count("\n") == 1


def test_status_in_all_formats(built: Built) -> None:
    out = call("status", built.uri).stdout
    assert "hydra (complete)" in out
    assert fits(out)
    document = json.loads(call("status", built.uri, "--format", "json").stdout)
    rows = list(csv.DictReader(io.StringIO(call("status", built.uri, "--format", "csv").stdout)))
    assert [row["stage"] for row in rows] == [row["stage"] for row in document["stages"]]
    assert document["resume"] is None


def test_status_of_a_part_shows_what_to_type(tmp_path: Path) -> None:
    part = Built(tmp_path / "r").build(upto="test-gradients")
    out = call("status", part.uri).stdout
    assert f"  hydra-pipe run --out {part.uri} --epochs 3 --shards 2" in out


def test_verify_in_all_formats(built: Built) -> None:
    result = call("verify", built.uri)
    assert "holds (error" in result.stdout
    assert fits(result.stdout)
    assert result.stderr == ""
    document = json.loads(call("verify", built.uri, "--format", "json").stdout)
    assert document["ok"]
    assert document["conservation"]["ok"]
    assert call("verify", built.uri, "--format", "csv").stdout == "kind,text\n"


def test_verify_ends_with_1_when_something_is_wrong(built: Built, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built.uri, tmp_path / "copy"))
    next(copy.glob("samples/method=hydra/*")).unlink()
    (copy / "contributions" / "method=hydra" / "part-9.parquet").write_bytes(b"x")
    out = call("verify", str(copy), code=1).stdout
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == ["problem", "problem"]
    assert "2 problems" in out
    rows = list(csv.DictReader(io.StringIO(call("verify", str(copy), "--format", "csv", code=1).stdout)))
    assert [row["kind"] for row in rows[:2]] == ["problem", "problem"]
    document = json.loads(call("verify", str(copy), "--format", "json", code=1).stdout)
    assert len(document["problems"]) == 2


@pytest.mark.parametrize("name", ["c.csv", "c.parquet"])
def test_export_says_what_it_wrote(built: Built, tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    assert f"wrote {target}: {N * M} rows" in call("export", built.uri, "--to", str(target)).stdout
    assert "--overwrite" in call("export", built.uri, "--to", str(target), code=1).stderr
    words = ("export", built.uri, "--to", str(target), "--overwrite", "--format")
    document = json.loads(call(*words, "json").stdout)
    assert (document["path"], document["rows"]) == (str(target), N * M)
    assert document["bytes"] == target.stat().st_size
    assert call(*words, "csv").stdout.splitlines()[0] == "path,format,method,rows,bytes"


# ---------------------------------------------------------------- commands that compute


class Driver:
    """Stands in for the driver: emits the events of a run and returns one that is there."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.calls: list[tuple[RunSpec, Any]] = []
        self.error: BaseException | None = None

    def __call__(self, spec: RunSpec, *, observer: Any, stages: Any) -> Run:
        self.calls.append((spec, stages))
        print("(raylet) chatter")
        observer(events.RunStarted(uri=self.uri, recipe="digits"))
        observer(events.StageStarted(stage="record", units=1, total=9))
        observer(events.UnitFinished(stage="record", unit="trajectory", seconds=1.0, values={}))
        observer(events.StageFinished(stage="record", seconds=1.0))
        if self.error is not None:
            raise self.error
        finished = open_run(self.uri)
        observer(events.RunFinished(summary={}))
        return finished


@pytest.fixture
def driver(built: Built, monkeypatch: pytest.MonkeyPatch) -> Driver:
    stand_in = Driver(built.uri)
    module = ModuleType("hydra_pipe.pipeline.run")
    module.run = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hydra_pipe.pipeline.run", module)
    return stand_in


def test_run_ends_with_a_summary(driver: Driver, built: Built) -> None:
    result = call("run", "--out", "o", "--shards", "2", "--set", "label_noise=0.1")
    spec, stages = driver.calls[0]
    assert (spec.recipe, spec.out, spec.shards, spec.recipe_args) == ("digits", "o", 2, {"label_noise": 0.1})
    assert stages is None
    assert result.stderr == "(raylet) chatter\nrecord: 1/1 run, 9 steps in 1.0 s\n"
    out = result.stdout
    for text in (
        "train 98.75%, test 91.00%",
        "612.0 MiB, planned were 700.0 MiB",
        "contributions/method=hydra",
        "most helpful training samples",
        "most harmful training samples",
        f"hydra-pipe top {built.uri} --test 1 --harmful",
        " -c 'import duckdb; ",
    ):
        assert text in out
    assert fits(out)


def test_json_is_one_document_written_last(driver: Driver, built: Built) -> None:
    out = call("run", "--format", "json").stdout
    document = json.loads(out)  # what else is printed on the way is on stderr
    assert document["run"] == built.uri
    assert len(document["helpful"]) == len(document["harmful"]) == 5


def test_quiet_leaves_stderr_to_what_others_print(driver: Driver) -> None:
    assert call("run", "--quiet").stderr == "(raylet) chatter\n"


def test_record_does_the_first_stage(driver: Driver) -> None:
    call("record", "mod:R", "--out", "o")
    assert driver.calls[0][0].recipe == "mod:R"
    assert driver.calls[0][1] == ("record",)


def test_record_says_what_does_not_matter_to_it(driver: Driver) -> None:
    given = ("record", "--out", "o", "--hessian", "ekfac", "--exact-rank", "2")
    assert "--exact-rank does not matter to record; give it to replay" in call(*given).stderr
    assert "does not matter" not in call(*given, "--quiet").stderr
    assert "does not matter" not in call("record", "--out", "o", "--epochs", "2").stderr


@pytest.mark.parametrize(
    ("command", "stages"), [("replay", ("test-gradients", "replay")), ("reduce", ("reduce",))]
)
def test_later_stages_go_on_with_the_run(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, command: str, stages: tuple[str, ...]
) -> None:
    asked: list[dict[str, Any]] = []

    def stage_spec(given: dict[str, Any], *, command: str) -> RunSpec:
        asked.append({**given, "command": command})
        return RunSpec()

    module = ModuleType("hydra_pipe.pipeline.plan.stored_spec")
    module.stage_spec = stage_spec  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hydra_pipe.pipeline.plan.stored_spec", module)
    call(command, "mod:R", "--out", "o", "--workers", "2")
    assert asked == [{"recipe": "mod:R", "out": "o", "workers": 2, "command": command}]
    assert driver.calls == [(RunSpec(), stages)]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (WorkerLost("shard-00001 died 3 times"), 1, "error: shard-00001 died 3 times"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues where this one stopped"),
        (ZeroDivisionError("bug"), 1, "unexpected error: ZeroDivisionError: bug; rerun with --debug"),
    ],
)
def test_a_failed_run_ends_in_one_line(driver: Driver, error: BaseException, code: int, line: str) -> None:
    driver.error = error
    assert call("run", code=code).stderr.splitlines()[-1] == line


def test_a_wrong_value_is_refused_before_anything_starts(driver: Driver) -> None:
    assert call("run", "--shards", "0", code=1).stderr.startswith("error: shards 0")
    assert driver.calls == []


def test_plan_in_all_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plan:
        def as_dict(self) -> dict[str, Any]:
            return {
                "run": {"training samples": 1437, "steps": 460},
                "shards": [{"name": "shard-00000", "start": 0, "stop": 1437, "bytes": 29 << 20}],
                "memory": {"replay worker": 500 << 20},
                "disk": {"total": 37 << 20},
                "time": {"total": 3.5},
            }

    module = ModuleType("hydra_pipe.pipeline.plan.plan")
    module.make_plan = lambda spec: Plan()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hydra_pipe.pipeline.plan.plan", module)
    out = call("plan", "--shards", "1").stdout
    for text in ("1,437", "29.0 MiB", "500.0 MiB", "37.0 MiB", "3.5 s"):
        assert text in out
    assert fits(out)
    assert json.loads(call("plan", "--format", "json").stdout)["disk"] == {"total": 37 << 20}
    rows = list(csv.DictReader(io.StringIO(call("plan", "--format", "csv").stdout)))
    assert rows[-1] == {"section": "time", "row": "", "key": "total", "value": "3.5"}
