"""deploy/submit.py: what it sends, what it refuses, and how it ends, with a cluster that is only told of."""

from __future__ import annotations

import shlex
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import submit
from tests.deploy.commands import SECRET

OUT = "s3://bucket/runs/digits"


class Status(str):
    """As Ray's: text that knows whether it is the last."""

    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


class Cluster:
    """A job server that notes what it is sent and goes through the given states."""

    def __init__(self, *states: str, log_breaks: bool = False, refusal: Exception | None = None) -> None:
        self.states, self.log_breaks, self.refusal = list(states), log_breaks, refusal
        self.sent: list[dict[str, Any]] = []
        self.shipped: list[list[str]] = []

    def submit_job(self, **job: Any) -> str:
        if self.refusal:
            raise self.refusal
        self.sent.append(job)
        modules = job["runtime_env"].get("py_modules", [])
        self.shipped = [sorted(p.name for p in Path(module).iterdir()) for module in modules]
        return job["submission_id"] or "raysubmit_1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "record: 1/1 run\n"
        if self.log_breaks:
            raise ConnectionError("gone")

    def get_job_status(self, job: str) -> Status:
        return Status(self.states.pop(0) if len(self.states) > 1 else self.states[0])

    def get_job_info(self, job: str) -> SimpleNamespace:
        text = "Job entrypoint command failed with exit code 1, last available logs (truncated):\nrecord: …"
        return SimpleNamespace(message=text if self.states[0] == "FAILED" else None)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster("RUNNING", "SUCCEEDED")
    monkeypatch.setattr(submit, "connect", lambda address: found)
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    return found


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    place = tmp_path / "hydra_pipe-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(place, "w") as archive:
        for name in (
            "hydra_pipe/__init__.py",
            "hydra_pipe/cli/main.py",
            "hydra_pipe-0.1.0.dist-info/METADATA",
        ):
            archive.writestr(name, "")
    return place


def test_an_installed_package_is_called_by_its_script(cluster, capsys):
    assert submit.main(["--", "run", "digits", "--set", "name=a b", "--out", OUT]) == 0
    (job,) = cluster.sent
    assert shlex.split(job["entrypoint"]) == [
        "hydra-pipe",
        "run",
        "digits",
        "--set",
        "name=a b",
        "--out",
        OUT,
    ]
    assert job["runtime_env"] == {}
    said = capsys.readouterr()
    assert said.out == "record: 1/1 run\n"
    assert "ray job stop raysubmit_1" in said.err
    assert "SUCCEEDED" in said.err


def test_a_wheel_is_shipped_as_its_directories(cluster, wheel):
    """Not as a wheel: Ray would install that with torch and ray, on every node."""
    assert submit.main(["--wheel", str(wheel), "--name", "mine", "--", "run", "digits", "--out", OUT]) == 0
    (job,) = cluster.sent
    assert job["submission_id"] == "mine"
    names = [Path(module).name for module in job["runtime_env"]["py_modules"]]
    assert names == ["hydra_pipe", "hydra_pipe-0.1.0.dist-info"]
    assert cluster.shipped == [["__init__.py", "cli"], ["METADATA"]]
    program, option, code, *words = shlex.split(job["entrypoint"])
    assert (program, option, words) == ("python", "-c", ["run", "digits", "--out", OUT])
    compile(code, "entrypoint", "exec")
    assert not Path(job["runtime_env"]["py_modules"][0]).exists()  # the unpacked copy is cleared away


def test_the_shipped_entry_reaches_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-c", "--version"])
    with pytest.raises(SystemExit) as ended:
        exec(submit.SHIPPED_ENTRY, {})  # noqa: S102 - our own line
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("hydra-pipe, version")


def test_a_recipes_directory_goes_along(cluster):
    words = ["--working-dir", "recipes", "--no-wait", "--", "run", "mine.py:Mine", f"--out={OUT}"]
    assert submit.main(words) == 0
    assert cluster.sent[0]["runtime_env"] == {"working_dir": "recipes"}


def test_nothing_secret_can_get_into_the_runtime_environment(monkeypatch, wheel):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    job = submit.describe(["run"], ["hydra_pipe"], "recipes")
    assert "env_vars" not in job["runtime_env"]
    assert "hush" not in str(job)
    with pytest.raises(SystemExit):
        submit.parse(["--env", "A=B", "--", "run"])
    assert not any(SECRET.search(name) for name in vars(submit.parse(["--", "run"])))


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["run", "digits", "--out", "runs/digits"], "absolute path"),
        (["run", "digits", "--out=./x"], "absolute path"),
        (["run", "digits"], "--out is missing"),
        (["reduce", "digits"], "--out is missing"),
    ],
)
def test_a_run_that_would_be_lost_is_refused(cluster, capsys, words, remedy):
    assert submit.main(["--", *words]) == 1
    assert not cluster.sent
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert remedy in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--out", "/mnt/shared/run"],
        ["run", "--config", "run.toml"],
        ["run", "--help"],
        ["status", "s3://bucket/run"],
        ["--version"],
    ],
)
def test_what_cannot_be_lost_is_sent(cluster, words):
    assert submit.main(["--", *words]) == 0
    assert len(cluster.sent) == 1


@pytest.mark.parametrize(("state", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 130)])
def test_the_exit_code_is_the_jobs(cluster, capsys, state, code):
    cluster.states = [state]
    assert submit.main(["--", "status", OUT]) == code
    said = capsys.readouterr().err
    assert state in said
    assert "last available logs" not in said


def test_a_log_that_breaks_off_does_not_end_the_wait(cluster, capsys):
    cluster.log_breaks = True
    cluster.states = ["RUNNING", "RUNNING", "SUCCEEDED"]
    assert submit.main(["--", "status", OUT]) == 0
    assert "the log broke off" in capsys.readouterr().err


def test_no_wait_returns_at_once(cluster, capsys):
    cluster.states = ["RUNNING"]
    assert submit.main(["--no-wait", "--", "status", OUT]) == 0
    assert capsys.readouterr().out == ""


def test_an_interrupt_leaves_the_job_alone(cluster, monkeypatch, capsys):
    def interrupt(client: Any, job: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "follow", interrupt)
    assert submit.main(["--", "status", OUT]) == 130
    assert "runs on" in capsys.readouterr().err


def test_of_a_refusal_the_last_line_is_shown(cluster, capsys):
    cluster.refusal = RuntimeError("Traceback:\n  File x\nValueError: Job with submission_id a exists.\n.\n.")
    assert submit.main(["--name", "a", "--", "status", OUT]) == 1
    assert capsys.readouterr().err.endswith("refused the job: ValueError: Job with submission_id a exists.\n")


def test_what_is_no_wheel_of_ours_is_refused(cluster, tmp_path, capsys):
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/__init__.py", "")
    for path in (other, tmp_path / "none.whl", Path(__file__)):
        assert submit.main(["--wheel", str(path), "--", "status", OUT]) == 1
        assert "make wheel" in capsys.readouterr().err
    assert not cluster.sent


def test_the_address_must_be_the_dashboards():
    with pytest.raises(submit.SubmitError, match="not the cluster's host:port"):
        submit.connect("ray-head:6379")


def test_the_address_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")  # the cluster's, not the dashboard's
    assert submit.parse(["--", "run"]).address == submit.LOCAL_DASHBOARD
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9999")
    assert submit.parse(["--", "run"]).address == "http://127.0.0.1:9999"
