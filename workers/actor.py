"""The Ray actor: one worker process that does units with one handler.

``ray`` is imported when the actor class is asked for, not with this module.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import socket
import threading
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from ..storage.errors import ResourceError
from .recipes.beside import unpacked

COMPARED = ("hydra-pipe", "torch", "numpy")
"""Packages of which workers must have the driver's version: others may give other bits, or fail to read what they get."""

Progress = tuple[str, int, int]
"""(unit, done, total) of the unit in work."""


class UnitWorker:
    """Loads a handler and does units with it, one at a time.

    Args:
        gpus: GPUs this worker holds. Ray leaves every GPU of the machine visible to an actor that
            holds none; here such a worker sees none, so that it cannot take one by accident.
    """

    def __init__(self, gpus: float) -> None:
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        end_with_parent()
        self._handler: Callable[..., dict[str, Any]] | None = None
        self._progress: Progress | None = None

    def load(self, payload: bytes, there: Mapping[str, str]) -> tuple[str, int]:
        """Unpickle the handler; replaces one loaded before.

        Args:
            payload: The handler as ``packed`` wrote it.
            there: `versions` of the driver.

        Returns:
            Host name and process id of this worker.

        Raises:
            ResourceError: The versions here are others; nothing was unpickled.
        """
        self._handler = None
        check_versions(there, versions())
        try:
            self._handler = unpacked(payload)
        except Exception as error:
            raise portable(error) from error
        return socket.gethostname(), os.getpid()

    def run(self, unit: Any) -> dict[str, Any]:
        """Do one unit; return the handler's values."""
        assert self._handler is not None, "run() before load()"
        name = unit.name
        self._progress = None

        def report(done: int, total: int) -> None:
            self._progress = (name, int(done), int(total))

        try:
            return self._handler(unit, report)
        except Exception as error:
            raise portable(error) from error

    def progress(self) -> Progress | None:
        """Return how far the unit in work is; answers while ``run`` computes."""
        return self._progress

    def pid(self) -> int:
        """Return the process id; answers while ``run`` computes."""
        return os.getpid()


def end_with_parent(every: float = 1.0) -> None:
    """Have this process end, whatever it does, when the one that started it is gone.

    A worker whose raylet died would otherwise work on, and live as long as the cluster does: Ray asks it to end,
    and waits for the unit in work.
    """
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=look, name="hydra-pipe-parent", daemon=True).start()


def versions() -> dict[str, str]:
    """Return the versions that driver and workers must share, as far as they are known here.

    Of torch the part before ``+``: a driver without a GPU may have the build for CPUs.
    """
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package).partition("+")[0]
    return found


def check_versions(there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuse to work for a driver of other versions.

    Args:
        there: `versions` of the driver.
        here: `versions` of this worker.

    Raises:
        ResourceError: Names machine and versions.
    """
    other = [name for name in there if name in here and there[name] != here[name]]
    if other:
        mine = ", ".join(f"{name} {here[name]}" for name in other)
        wanted = ", ".join(f"{name} {there[name]}" for name in other)
        raise ResourceError(
            f"the worker on {socket.gethostname()} has {mine}, the driver {wanted}: their numbers may differ; "
            "install the same versions on every node"
        )


def portable(error: Exception) -> Exception:
    """Return ``error`` if it survives the way to the driver, else a RuntimeError that says the same."""
    with contextlib.suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def actor_class() -> Any:
    """Return :class:`UnitWorker` as a Ray actor class with a concurrency group ``control``.

    Ray neither restarts such an actor nor repeats its calls: the driver does both itself, because Ray's
    own retries lose work or fail on node loss. Calls in the group ``control`` are answered during
    torch work; the others run one at a time, all in one thread.
    """
    import ray

    remote: Any = ray.remote  # its annotations do not know concurrency_groups
    return remote(
        max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", concurrency_groups={"control": 1}
    )(UnitWorker)
