"""What a worker on Ray does by itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from hydra_pipe.storage.errors import ResourceError
from hydra_pipe.workers.actor import check_versions, versions

from tests.conftest import ROOT
from tests.torture.two_nodes import left

PARENT = """
import subprocess, sys
child = "from hydra_pipe.workers.actor import end_with_parent; import time; end_with_parent(0.05); print(1, flush=True); time.sleep(600)"
made = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
made.stdout.readline()
print(made.pid, flush=True)
made.wait()
"""


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.2)
    assert left({worker}, 0.1)  # it goes on while its parent lives
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not left({worker})


def test_versions_are_compared_as_far_as_both_know_them() -> None:
    here = versions()
    assert {"python", "torch", "numpy"} <= set(here)
    assert "+" not in here["torch"]
    check_versions(here, here)
    check_versions({**here, "another": "1"}, here)
    with pytest.raises(ResourceError, match=r"has numpy 1, the driver numpy 2: .*install the same"):
        check_versions({"numpy": "2", "torch": "3"}, {"numpy": "1", "torch": "3"})
