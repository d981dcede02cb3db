"""The Ray actor: one worker process that does units with one handler.

``ray`` is imported when the actor class is asked for, not with this module.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any

from .recipes.beside import unpacked

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
        self._handler: Callable[..., dict[str, Any]] | None = None
        self._progress: Progress | None = None

    def load(self, payload: bytes) -> tuple[str, int]:
        """Unpickle the handler; replaces one loaded before.

        Args:
            payload: The handler as ``packed`` wrote it.

        Returns:
            Host name and process id of this worker.
        """
        self._handler = None
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
