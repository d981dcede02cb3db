"""A Ray of two machines that are both this one, and what runs on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import psutil

from tests.conftest import ROOT

STORE = 100 << 20
"""Bytes of an object store; next to nothing goes through it."""
ALIEN_THREADS = "3"
"""``OMP_NUM_THREADS`` of the second machine: a run's bits must not depend on it."""


@dataclass(kw_only=True, slots=True)
class TwoNodes:
    """The head, with one slot, and a second machine with one slot, which may be lost.

    Attributes:
        cluster: Ray's own for tests.
        second: The machine that may be lost.
    """

    cluster: Any
    second: Any

    @property
    def address(self) -> str:
        """``host:port`` of the head."""
        return str(self.cluster.address)

    def lose(self) -> set[int]:
        """Kill the raylet of the second machine; return the processes that were below it, itself included."""
        raylet = self.second.all_processes["raylet"][0].process
        found = {raylet.pid, *(child.pid for child in psutil.Process(raylet.pid).children(recursive=True))}
        os.kill(raylet.pid, signal.SIGKILL)
        return found

    def restore(self) -> None:
        """Put another machine in the place of the one that was lost."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = _patiently(lambda: self.cluster.add_node(**_second()))

    def workers(self) -> set[int]:
        """Return the actors of hydra-pipe that live on either machine."""
        found = set()
        for node in self.cluster.list_all_nodes():
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(node.all_processes["raylet"][0].process.pid).children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::UnitWorker"):
                            found.add(child.pid)
        return found


def _second() -> dict[str, Any]:
    return {"num_cpus": 1, "object_store_memory": STORE, "env_vars": {"OMP_NUM_THREADS": ALIEN_THREADS}}


@contextlib.contextmanager
def two_nodes(**more: Any) -> Iterator[TwoNodes]:
    """Start the two, in a directory of their own that no other Ray of this machine looks at; they end with the block.

    Args:
        more: Of the head, as Ray's own `Cluster` takes it.
    """
    from ray.cluster_utils import Cluster

    directory = tempfile.mkdtemp(prefix="ht-", dir="/tmp")  # short: sockets lie in it
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with mock.patch.dict(os.environ, RAY_TMPDIR=directory, PYTHONPATH=path):
        head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, **more}
        cluster = _patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            yield TwoNodes(cluster=cluster, second=_patiently(lambda: cluster.add_node(**_second())))
        finally:
            cluster.shutdown()
            shutil.rmtree(directory, ignore_errors=True)


def _patiently(start: Callable[[], Any]) -> Any:
    """Start a machine of Ray, again where it was not up in the half minute that Ray waits; a busy one takes longer."""
    for attempt in range(4):
        before = set(psutil.Process().children(recursive=True))
        try:
            return start()
        except Exception:
            for child in set(psutil.Process().children(recursive=True)) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            if attempt == 3:
                raise
    raise AssertionError


def left(pids: Iterable[int], seconds: float = 60.0) -> set[int]:
    """Return which processes are still there after so long; one that only waits to be counted is gone."""
    deadline, remaining = time.monotonic() + seconds, set(pids)
    while remaining and time.monotonic() < deadline:
        remaining = {pid for pid in remaining if _lives(pid)}
        time.sleep(0.1)
    return remaining


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
