"""Fixtures that several rooms share."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address ``host:port`` of one local Ray with 4 logical CPUs, started once for the session.

    Starting Ray takes seconds: tests mark themselves ``ray`` and share this one. The directory is
    short because Ray's sockets lie in it and their paths have a limit.
    """
    import ray

    directory = tempfile.mkdtemp(prefix="hp-", dir="/tmp")
    # Workers import handlers from tests/, wherever pytest was started.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 << 20,
            _temp_dir=directory,
        )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)
