"""A Ray that is started here ends with what started it, whenever that is told to end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra_pipe.pipeline.executors import raysetup
from hydra_pipe.pipeline.executors.ray import RayExecutor

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"])
print("up", flush=True)
child.wait()
"""


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


def test_processes_that_outlive_their_ray_are_ended(monkeypatch):
    monkeypatch.setattr(raysetup, "_END_SECONDS", 0.2)
    command = [sys.executable, "-c", PARENT, "--session_dir=/nowhere/hp-one/session"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
        assert raysetup.processes_of("/nowhere/hp-another") == []
        found = raysetup.processes_of("/nowhere/hp-one")
        assert len(found) == 2
        parent.kill()  # its child now has another parent
        parent.wait()
        raysetup.end(found)
    _, alive = psutil.wait_procs(found, timeout=10)
    assert alive == []
