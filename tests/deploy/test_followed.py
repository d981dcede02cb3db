"""docs/how-to-deploy.md, followed: a cluster by hand, a shipped wheel, stop, and resume."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from tests.deploy.commands import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RUN = ("run", "digits", "--epochs", "30", "--test", "16", "--shards", "8")
WAIT = 180  # seconds for any one thing on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code == 401  # it is up, and wants the token
    except OSError:
        return False
    return False  # up, but open to all


def wait_for(what: str, condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert process is None or process.poll() is None, f"ended while waiting for {what}"
        assert time.monotonic() < deadline, f"waited {WAIT} s for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A cluster with a token, started as the page says; its processes end with it and no others do."""
    directory = Path(tempfile.mkdtemp(prefix="hp-", dir="/tmp"))
    url = f"http://127.0.0.1:{free_port()}"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    variables = {
        **inherited,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": url,
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
    }
    command = [
        *("ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={url.rpartition(':')[2]}"),
        *(f"--port={free_port()}", "--object-store-memory=100000000", f"--temp-dir={directory}"),
        f"--dashboard-agent-listen-port={free_port()}",  # another Ray of this machine may have the usual one
    ]
    head = subprocess.Popen(
        command,
        env=variables,
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for("the dashboard", lambda: answers(f"{url}/api/version"), head)
        yield variables
    finally:
        head.terminate()  # with --block it takes its own processes along
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:
            head.kill()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` builds, from a copy, so that nothing is left in the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("storage", "workers", "pipeline", "cli", "hydra_pipe"):
        shutil.copytree(ROOT / name, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source" / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place)]
    subprocess.run([*build, str(place / "source")], check=True, capture_output=True)
    (found,) = place.glob("*.whl")
    return found


def submit(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy" / "submit.py"), *words]
    return subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, timeout=WAIT, check=False
    )


def test_the_shipped_wheel_runs_and_a_failure_is_told(environment, wheel):
    done = submit(environment, "--wheel", str(wheel), "--", "--version")
    assert done.returncode == 0, done.stderr
    assert "hydra-pipe, version" in done.stdout
    done = submit(environment, "--wheel", str(wheel), "--", "status", "runs/none")
    assert done.returncode == 1
    assert "FAILED" in done.stderr


def test_without_the_token_nothing_is_accepted(environment, tmp_path):
    stranger = {k: v for k, v in environment.items() if k != "RAY_AUTH_TOKEN"} | {"HOME": str(tmp_path)}
    done = submit(stranger, "--", "--version")
    assert done.returncode == 1
    assert "error: " in done.stderr


def test_a_stopped_job_resumes_to_the_same_bits(environment, wheel, tmp_path):
    out = tmp_path / "run"
    job = ("--wheel", str(wheel), "--name")
    started = submit(environment, *job, "first", "--no-wait", "--", *RUN, "--out", str(out))
    assert started.returncode == 0, started.stderr
    shards = out / "manifests" / "hydra" / "replay"
    wait_for("a replayed shard", lambda: len(list(shards.glob("shard-*.json"))) >= 1)
    stop = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "first"]
    subprocess.run(stop, env=environment, cwd="/", check=True, capture_output=True, timeout=WAIT)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("manifests/**/*.json")}
    assert not (out / "manifests" / "hydra" / "reduce" / "interclass.json").exists()

    again = submit(environment, *job, "second", "--", *RUN, "--out", str(out))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "record: already done" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    serial = tmp_path / "serial"
    words = [*RUN, "--executor", "serial", "--quiet", "--out", str(serial)]
    code = "from hydra_pipe.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, timeout=WAIT)
    assert contributions(out).equals(contributions(serial))


def contributions(run: Path):
    table = ds.dataset(run / "contributions", partitioning="hive").to_table()
    return table.sort_by([("test_index", "ascending"), ("train_index", "ascending")])
