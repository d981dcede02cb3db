"""A job stopped by Ray in the middle and submitted again: the rest is done, with the bits of the undisturbed run."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from deploy import submit
from hydra_pipe import RunSpec, run
from tests.end_to_end.nursery import PAUSED
from tests.torture.judge import expected, problems
from tests.torture.two_nodes import left, two_nodes

FIELDS = {
    "recipe": PAUSED[0],
    "recipe_args": {"pause": 0.02},
    "device": "cpu",
    "shards": 5,
    "hessian": "ekfac",
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.ray
def test_ray_job_stop_and_submit_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    run(RunSpec(out=str(tmp_path / "right"), executor="serial", **FIELDS))
    out, port = tmp_path / "run", free_port()
    words = ["--address", f"http://127.0.0.1:{port}", "--no-wait", "--name", "first", "--"]
    command = [
        "run",
        *PAUSED[:1],
        "--set",
        "pause=0.02",
        "--device",
        "cpu",
        "--shards",
        "5",
        "--hessian",
        "ekfac",
    ]
    command += ["--out", str(out)]
    ports = {"dashboard_port": port, "dashboard_agent_listen_port": free_port()}
    with two_nodes(include_dashboard=True, **ports) as nodes:
        client = JobSubmissionClient(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 120
        while submit.main([*words, *command]) != 0:  # what takes jobs comes up after the dashboard
            assert time.monotonic() < deadline
            time.sleep(1)
        begun = out / "manifests" / "hydra-ekfac" / "replay" / "shard-00000.json"
        deadline = time.monotonic() + 300
        while not begun.exists():
            assert time.monotonic() < deadline, client.get_job_logs("first")
            time.sleep(0.05)
        workers = nodes.workers()
        assert client.stop_job("first")
        while not client.get_job_status("first").is_terminal():
            time.sleep(0.2)
        assert str(client.get_job_status("first")) == "STOPPED"
        assert not left(workers)
        done = set(begun.parent.glob("shard-*.json"))
        assert submit.main([*words[:2], "--", *command]) == 0  # followed to its end
        assert "Traceback" not in client.get_job_logs("first")
        assert not left(nodes.workers())
    assert 0 < len(done) < 5
    assert expected(out) == expected(tmp_path / "right")
    assert not problems(out)
