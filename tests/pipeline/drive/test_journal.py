"""The log of a run: what stands in its way ends no run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra_pipe.pipeline.drive.journal import Journal
from hydra_pipe.storage import layout
from hydra_pipe.storage.rundir import RunDirectory


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_the_place_of_the_log_is_not_waited_for(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    run.update(lambda info: {**info, "n_train": 3})
    os.mkfifo(tmp_path / layout.LOG)
    journal = Journal(run)
    journal.say("Note", message="hello")
    journal.flush()
    os.remove(tmp_path / layout.LOG)
    journal.say("Note", message="again")
    journal.flush()
    told = (tmp_path / layout.LOG).read_text()
    assert [word in told for word in ("hello", "again")] == [True, True]
