"""A Ray that is started here ends with what started it, whenever that is told to end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra_pipe.pipeline.executors import raysetup, reaper
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.pipeline.executors.reaper import Reaper


class Asked(KeyboardInterrupt):
    """What the handler of the command raises."""


@pytest.fixture
def handled() -> Iterator[None]:
    def asked(number: int, frame: Any) -> None:
        raise Asked

    before = signal.signal(signal.SIGTERM, asked)
    yield
    signal.signal(signal.SIGTERM, before)


def starting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException) -> Path:
    """Have the start of Ray raise; return the session directory."""
    ray = pytest.importorskip("ray")
    session = tmp_path / "hp-session"
    session.mkdir()

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test's cluster may be up
    monkeypatch.setattr(raysetup, "session_directory", lambda: str(session))
    return session


def test_a_sigterm_while_ray_starts_is_what_it_is_anywhere(handled, monkeypatch, tmp_path):
    session = starting(monkeypatch, tmp_path, SystemExit(int(signal.SIGTERM)))
    with pytest.raises(Asked):
        RayExecutor(address="local")._connect()
    assert not session.exists()


def test_another_exit_while_ray_starts_passes(handled, monkeypatch, tmp_path):
    session = starting(monkeypatch, tmp_path, SystemExit(3))
    with pytest.raises(SystemExit) as caught:
        RayExecutor(address="local")._connect()
    assert caught.value.code == 3
    assert not session.exists()


def test_processes_that_outlive_their_ray_are_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(reaper, "_END_SECONDS", 0.2)
    for name in ("hp-one", "hp-another"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", AGENT, "/ray/agent.py", f"{tmp_path}/hp-one/"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "up\n"
        reaper.end_processes(str(tmp_path / "hp-another"))
        assert agent.poll() is None
        reaper.end_processes(str(tmp_path / "hp-one"))
        assert agent.wait(timeout=10) == -signal.SIGKILL


DRIVER = """
import subprocess, sys, time
from hydra_pipe.pipeline.executors.reaper import Reaper
directory, dismissed = sys.argv[1:]
reaper = Reaper(directory)
agents = [
    subprocess.Popen(
        [sys.executable, "-c", AGENT, *words], cwd=directory, start_new_session=True, stdout=subprocess.PIPE
    )
    for words in (["/ray/agent.py", "log"], ["/ray/agent.py", directory + "/"], ["tail", "log"])
]
for agent in agents:
    agent.stdout.readline()
if dismissed == "dismissed":
    reaper.dismiss()
print(*(agent.pid for agent in agents), flush=True)
time.sleep(600)
"""
AGENT = """
import sys, time
log = open(sys.argv[2], "a") if sys.argv[2].endswith("log") else None
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("dismissed", ["dismissed", "killed"])
def test_a_killed_driver_leaves_nothing_of_the_ray_that_it_started(dismissed, tmp_path):
    directory = tmp_path / "hp-session"
    directory.mkdir()
    code = f"AGENT = {AGENT!r}\n" + DRIVER
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory), dismissed], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        agents = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
        driver.kill()
    gone, alive = psutil.wait_procs(agents[:2], timeout=1 if dismissed == "dismissed" else 60)
    try:
        assert (len(gone), len(alive)) == ((0, 2) if dismissed == "dismissed" else (2, 0))
        assert agents[2].is_running()  # who merely reads a log
    finally:
        for agent in (*alive, agents[2]):
            agent.kill()
    deadline = time.monotonic() + 60
    while dismissed == "killed" and directory.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert directory.exists() == (dismissed == "dismissed")


def test_a_reaper_that_is_dismissed_ends(tmp_path):
    one = Reaper(str(tmp_path))
    one.dismiss()
    assert one._process.returncode == 0
