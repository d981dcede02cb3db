"""A worker that runs out of memory: named, with what helps."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hydra_pipe.pipeline.executors import events
from hydra_pipe.pipeline.executors.dispatch import Dispatch
from hydra_pipe.storage.errors import WorkerLost

from tests.conftest import ROOT
from tests.faults import units


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        (
            "out of memory: Ray killed it because its node ran low (6.87GB of 23.54GB used)",
            r"fewer --workers or more --cpus-per-actor.*same command again.*more --shards or a smaller --memory$",
        ),
        (
            "its node died",
            r"if memory is short use fewer --workers.*same command again: finished work is kept$",
        ),
    ],
)
def test_the_remedy_fits_the_death(reason: str, remedy: str) -> None:
    dispatch = Dispatch("test", units(1), events.null, max_attempts=1, clock=lambda: 0.0)
    with pytest.raises(WorkerLost, match=remedy) as caught:
        dispatch.lose(dispatch.start(), reason)
    assert f"last: {reason};" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_ends_a_worker_that_takes_too_much(tmp_path: Path) -> None:
    """Ray's own monitor, set to 1.5 GiB above what this machine uses now."""
    program = f"""
        import logging, psutil, ray
        from tests.faults import *
        from hydra_pipe.pipeline.executors.ray import RayExecutor
        seen = psutil.virtual_memory()
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            object_store_memory=100 << 20,
            _system_config={{
                "memory_usage_threshold": 1 - (seen.available - (3 << 29)) / seen.total,
                "memory_monitor_refresh_ms": 100,
            }},
        )
        plan = FaultPlan(directory={str(tmp_path)!r}, script={{"unit-0": ["memory", "memory"]}})
        handler = Faulty(plan=plan, handler=Count(directory={str(tmp_path)!r}))
        try:
            RayExecutor(workers=1, max_attempts=2).run("test", units(1), handler, lambda event: None)
        except Exception as error:
            print(type(error).__name__, error)
        ray.shutdown()
    """
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    last = said.stdout.splitlines()[-1]
    assert last.startswith("WorkerLost test unit-0: its worker "), said.stdout + said.stderr
    assert "out of memory: Ray killed it because its node ran low (" in last
    assert "use fewer --workers" in last
