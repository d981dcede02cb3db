"""The Ray executor: waves of actors, watched and replaced by the driver.

The only module of this room that imports ray, and only when something is to run on it.
Ray's own restarts lose tasks, and an infeasible demand waits without end: so every actor dies once
and for all, the driver queues its unit again, and what can never fit is refused before anything starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...storage.errors import RecipeError, ResourceError, WorkerLost
from ...workers.actor import actor_class
from ...workers.recipes.beside import packed
from ..spec.groups import ExecutionSpec
from . import placement, raysetup
from .base import Capacity, Executor, Handler, Stopping, Unit, never, side_by_side
from .dispatch import Dispatch
from .events import Note, Observer
from .placement import Demand, Node
from .ray_metrics import Measured, ray_counters
from .ray_stage import Wave, WaveSettings, Worker, worker_target
from .reaper import Reaper, end_processes
from .serial import SerialExecutor

__all__ = ["RayExecutor", "SerialExecutor", "make_executor"]

_log = logging.getLogger(__name__)
_OBJECT_STORE = 100 << 20  # bytes; next to nothing goes through it


def make_executor(spec: ExecutionSpec) -> Executor:
    """Return the executor that ``spec`` asks for. Nothing is started yet."""
    if spec.executor == "serial":
        return SerialExecutor(unit_timeout=spec.unit_timeout)
    return RayExecutor(
        address=spec.address,
        workers=spec.workers,
        gpus=spec.gpus_per_actor,
        cpus=spec.cpus_per_actor,
        start_timeout=spec.start_timeout,
        max_attempts=spec.max_attempts,
        unit_timeout=spec.unit_timeout,
    )


class RayExecutor:
    """Runs units in Ray actors; see :class:`~.units.Executor`.

    Workers stay between two stages that ask for the same resources, so that torch is imported once.

    Args:
        address: ``host:port``, ``auto`` or ``local``; None: ``RAY_ADDRESS``, then a cluster started by
            ``ray start`` on this machine, then a new one that ends with :meth:`close`.
        workers: Most workers at a time; None: as many as the cluster holds.
        gpus: GPUs a worker holds; None: 1 where the cluster has GPUs, else 0.
        cpus: CPUs a worker holds.
        start_timeout: Seconds to wait while not a single worker is up.
        max_attempts: How often a unit is tried when its workers die.
        unit_timeout: Seconds after which the attempt at a unit counts as lost; None: never.
        clock: Returns seconds that only grow.
        tick: Most seconds between two looks at the workers.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        *,
        gpus: float | None = None,
        cpus: float = 1.0,
        start_timeout: float = 120.0,
        max_attempts: int = 3,
        unit_timeout: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        tick: float = 0.25,
    ) -> None:
        self._address, self._workers = address, workers
        self._gpus, self._cpus = gpus, cpus
        self._start_timeout, self._max_attempts = start_timeout, max_attempts
        self._unit_timeout = unit_timeout
        self._clock, self._tick = clock, tick
        self._ray: Any = None
        self._joined = self._owned = False  # we called ray.init; it started a cluster
        self._directory: str | None = None
        self._reaper: Reaper | None = None
        self._pool: list[Worker] = []
        self._pool_demand: Demand | None = None

    @property
    def slots(self) -> int:
        """How many workers there can be at a time; connects, and starts Ray where none runs."""
        return self.capacity().slots

    def capacity(self, *, start: bool = True) -> Capacity:
        """Describe the cluster; see :class:`~.units.Executor`.

        With ``start=False`` a cluster that runs is asked, and otherwise this machine is described as
        Ray would see it.
        """
        if not start and self._ray is None and self._running_address() is None:
            nodes = [placement.this_machine()]
        else:
            nodes = self._nodes()
        demand = self._demand(nodes, None, None)
        return Capacity(
            executor="ray",
            nodes=len(nodes),
            cpus=sum(node.cpus for node in nodes),
            gpus=sum(node.gpus for node in nodes),
            slots=min(placement.slots(nodes, demand), self._workers or 1 << 30),
            memory_per_worker=placement.memory_per_worker(nodes, demand),
        )

    def _demand(self, nodes: Sequence[Node], gpus: float | None, cpus: float | None) -> Demand:
        gpus = self._gpus if gpus is None else gpus
        if gpus is None:
            gpus = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
        return Demand(cpus=self._cpus if cpus is None else cpus, gpus=gpus)

    def _nodes(self) -> list[Node]:
        alive = (node["Resources"] for node in self._connect().nodes() if node["Alive"])
        return [
            Node(cpus=has.get("CPU", 0.0), gpus=has.get("GPU", 0.0), memory=int(has.get("memory", 0)))
            for has in alive
        ]

    def _running_address(self) -> str | None:
        """Return the address of the cluster to join, None where one is to be started."""
        asked = raysetup.asked_address(self._address)
        if asked == "local":
            return None
        if asked is None:
            from ray._private.services import find_bootstrap_address

            # What `ray start` left on this machine; of no use when that cluster is gone.
            asked = find_bootstrap_address(None)
            # Joined as "auto": only then does Ray use the token that such a cluster may want.
            return "auto" if asked is not None and raysetup.listening(asked) else None
        if asked != "auto" and not raysetup.listening(asked):
            raise ResourceError(
                f"no Ray cluster answers at {asked}; check --address and RAY_ADDRESS, or use "
                "--address local to start one here"
            )
        return asked

    def _connect(self) -> Any:
        if self._ray is not None:
            return self._ray
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of older Rays
        import ray

        if ray.is_initialized():
            return self._adopt(ray)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        terminated = signal.getsignal(signal.SIGTERM)
        address = self._running_address()
        try:
            self._joined = True
            if address is not None:
                # No num_cpus and the like here: inside a submitted job ray.init refuses them.
                ray.init(address=address, **quiet)
            else:
                self._directory = raysetup.session_directory()
                self._reaper = None if self._directory is None else Reaper(self._directory)
                self._owned = True
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE,
                    _temp_dir=self._directory,
                    **quiet,
                )
        except SystemExit as error:
            self.close()
            # A SIGTERM met Ray's own handler, which is a sys.exit.
            if error.code == signal.SIGTERM and callable(terminated):
                terminated(signal.SIGTERM, None)
            raise
        except Exception as error:
            self.close()
            place = f"connect to Ray at {address}" if address else "start Ray here"
            raise ResourceError(
                f"cannot {place}: {raysetup.reason(error)}; check that Ray versions and RAY_AUTH_MODE agree "
                "and that HOME and the temporary directory can be written, or use --executor serial"
            ) from error
        _hush()
        if callable(terminated) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray's own handler is a sys.exit
        self._ray = ray
        return ray

    def _adopt(self, ray: Any) -> Any:
        """Use the connection this process has already; it is not ours to end."""
        there = ray.get_runtime_context().gcs_address
        if self._address not in (None, "auto", there):
            raise ResourceError(
                f"this process is connected to Ray at {there}, not {self._address}; call ray.shutdown() first"
            )
        self._ray = ray
        return ray

    def _autoscales(self) -> bool:
        """Tell whether the cluster may grow. A cluster we started never does."""
        if self._owned:
            return False
        with contextlib.suppress(Exception):
            from ray.autoscaler.v2.utils import is_autoscaler_v2
            from ray.experimental.internal_kv import _internal_kv_get

            status = _internal_kv_get(b"__autoscaling_status")
            return bool(is_autoscaler_v2(fetch_from_server=True)) or raysetup.grows(status)
        return False

    def run(
        self,
        stage: str,
        units: Sequence[Unit],
        handler: Handler,
        observer: Observer,
        *,
        gpus: float | None = None,
        cpus: float | None = None,
        label: str = "step",
        stopping: Stopping = never,
    ) -> dict[str, dict[str, Any]]:
        """Do all units in waves of actors; see :class:`~.units.Executor`."""
        if not units:
            return {}
        try:
            payload = packed(handler)
        except Exception as error:
            raise RecipeError(
                f"the recipe cannot be sent to workers: {error}; keep open files, locks and generators out of "
                "it, or use --executor serial"
            ) from error
        ray = self._connect()
        nodes = self._nodes()
        demand = self._demand(nodes, gpus, cpus)
        grows = self._autoscales()
        if not grows:
            placement.check_feasible(nodes, demand)
        if demand != self._pool_demand:
            self._kill(self._pool)
        self._pool_demand = demand
        observer = Measured(observer, ray_counters(), label)
        dispatch = Dispatch(
            stage,
            units,
            observer,
            max_attempts=self._max_attempts,
            clock=self._clock,
            timeout=self._unit_timeout,
            stopping=stopping,
        )
        target = worker_target(
            lambda: placement.slots(self._nodes(), demand),
            workers=self._workers,
            grows=grows,
            units=len(units),
            clock=self._clock,
        )
        if not grows and target() < min(self._workers or 0, len(units)):
            observer(Note(message=f"{self._workers} workers asked, the cluster holds {target()} at a time"))
        settings = WaveSettings(
            demand=demand,
            target=target,
            start_timeout=self._start_timeout,
            max_attempts=self._max_attempts,
            clock=self._clock,
            tick=self._tick,
            side_by_side=side_by_side(handler),
        )
        actor = actor_class().options(num_cpus=demand.cpus, num_gpus=demand.gpus)
        try:
            Wave(ray, actor, ray.put(payload), self._pool, dispatch, observer, settings).run()
        except BaseException as error:
            # An interrupt too: whatever ends the stage early leaves no actor behind.
            self._kill(self._pool)
            if isinstance(error, WorkerLost) and self._directory:
                observer(Note(message=f"Ray's logs are kept in {self._directory}/session_latest/logs"))
                self._directory = None  # not ours to remove any more
            raise
        self._kill([worker for worker in self._pool if not worker.loaded])
        return dispatch.results()

    def _kill(self, workers: list[Worker]) -> None:
        for worker in list(workers):
            with contextlib.suppress(Exception):
                self._ray.kill(worker.actor, no_restart=True)
            with contextlib.suppress(ValueError):
                self._pool.remove(worker)

    def close(self) -> None:
        """End all workers; leave the cluster if it was joined here, end it if it was started here."""
        self._kill(self._pool)
        if self._joined:
            import ray

            with contextlib.suppress(Exception):
                ray.shutdown()
        if self._directory:
            end_processes(self._directory)
            shutil.rmtree(self._directory, ignore_errors=True)
        if self._reaper is not None:
            self._reaper.dismiss()
        self._ray, self._joined, self._owned, self._directory, self._reaper = None, False, False, None, None


def _hush() -> None:
    """Log what raylets say about dead workers, which Ray prints to our standard output otherwise.

    ``log_to_driver=False`` does not cover these messages, and a table or JSON on standard output
    must not have them in it. Should a later Ray name this otherwise, they are merely printed.
    """
    with contextlib.suppress(Exception):
        from ray._private import worker

        if hasattr(worker, "print_to_stdstream"):

            def log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
                _log.info("ray: %s", "\n".join(map(str, data.get("lines", []))))

            worker.print_to_stdstream = log
