"""Fixtures that several rooms share."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

# Before anything imports torch or numpy: tests run side by side, and threads that wait must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray gives its workers nice 15: beside tests that keep every core busy they would get 3% of one, and start in minutes.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest

from tests import ray_workers

ROOT = Path(__file__).resolve().parents[1]


TURNS = ("docs", "end_to_end", "pipeline", "workers", "test_", "deploy", "cli", "storage")
"""Below tests/, in which order: files of minutes first, so that many short ones even out the end."""


ROOM = 8 << 30
"""Bytes that must be free in memory for the files of all tests to lie there."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests' files in memory where it has room, and remove them in the end; ``--basetemp=DIR`` keeps them in DIR.

    They are hundreds of thousands of small ones: to make one takes eight times as long on a disk.
    """
    memory = Path("/dev/shm")
    if hasattr(config, "workerinput") or config.option.basetemp or not os.access(memory, os.W_OK | os.X_OK):
        return
    if shutil.disk_usage(memory).free < ROOM:
        return
    place = tempfile.mkdtemp(prefix="hp-", dir=memory)
    config.add_cleanup(lambda: shutil.rmtree(place, ignore_errors=True))
    config.option.basetemp = os.path.join(place, "tests")
    if "TMPDIR" not in os.environ:
        os.environ["TMPDIR"], tempfile.tempdir = place, None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores: tests also wait, for Ray, for processes, for a signal to arrive."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files in the order of `TURNS`; pytest-xdist keeps it with ``--no-loadscope-reorder``."""
    tests = Path(__file__).parent

    def turn(item: pytest.Item) -> int:
        first = item.path.relative_to(tests).parts[0] if item.path.is_relative_to(tests) else ""
        return next((k for k, begins in enumerate(TURNS) if first.startswith(begins)), len(TURNS))

    items.sort(key=turn)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Look for garbage once all modules are imported, and never among what they hold: a quarter of the imports' time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
        session.config.add_cleanup(gc.unfreeze)


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Do not wait for the disk: half of the time of a small run, and no test pulls the plug.

    Processes that a test starts do wait; ``storage/test_rundir.py`` holds what is synced and when.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


class _Inline:
    """What `storage.threads` needs of a pool, without threads."""

    def __init__(self, threads: int) -> None:
        pass

    def submit(self, function: Callable[..., Any], *given: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*given))
        except BaseException as error:  # noqa: BLE001 - as a thread keeps it
            done.set_exception(error)
        return done

    def shutdown(self, **_: Any) -> None:
        pass


@pytest.fixture(scope="session", autouse=True)
def unthreaded() -> Iterator[None]:
    """Read and write files one after the other: to start threads for small ones is a tenth of a small run.

    Processes that a test starts do have threads, and so have tests of ``storage/``.
    """
    from hydra_pipe.storage import threads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "ThreadPoolExecutor", _Inline)
        yield


@pytest.fixture
def ray_cluster(shared_ray: str) -> str:
    """Address ``host:port`` of a local Ray with 4 logical CPUs and no worker of ours."""
    ray_workers.end()
    return shared_ray


@pytest.fixture
def warm_ray(shared_ray: str) -> Iterator[str]:
    """The same, with the workers that earlier tests left, for tests that look at results and not at processes."""
    with ray_workers.reused():
        yield shared_ray


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """The address of the one Ray that tests marked ``ray`` share: starting one takes seconds.

    The directory is short because Ray's sockets lie in it and their paths have a limit.
    """
    import ray

    directory = tempfile.mkdtemp(prefix="hp-", dir="/tmp")
    # Workers import handlers from tests/, wherever pytest was started.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        # Nobody reads what workers print, and a process that looks for it all the time takes time from the tests.
        patch.setattr("ray._private.node.Node.start_log_monitor", lambda node: None)
        patch.setenv("RAY_DASHBOARD_AGENT_CHECK_PARENT_INTERVAL_S", "5")
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
