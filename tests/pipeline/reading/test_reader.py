"""What is told of a run that cannot be opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra_pipe.storage.errors import RunNotFound
from hydra_pipe.storage.lock import RunLock

from hydra_pipe import open_run

HOLD = "import sys; from hydra_pipe.storage.lock import RunLock; RunLock(sys.argv[1], 'hydra-pipe run').acquire(); print(flush=True); input()"


def test_a_run_that_somebody_is_about_to_make_is_not_called_missing(tmp_path: Path) -> None:
    place = str(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(
            RunNotFound, match=rf"yet: hydra-pipe run on .*, process {other.pid}, .* is about to make it"
        ):
            open_run(place)
        other.communicate("\n")


def test_who_holds_the_lock_itself_is_told_that_there_is_no_run(tmp_path: Path) -> None:
    place = str(tmp_path / "run")
    mine = RunLock(place, f"hydra-pipe test {os.getpid()}")
    mine.acquire()
    try:
        with pytest.raises(RunNotFound, match=r"run\.json is missing there; make one with"):
            open_run(place)
    finally:
        mine.release()
