"""The serial executor: every unit in this process, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from .base import Capacity, Handler, Stopping, Unit, never, stopped
from .events import Observer, UnitFinished, UnitProgress, UnitStarted
from .placement import cpu_count


class SerialExecutor:
    """Runs units in this process; what a handler raises passes through untouched.

    Args:
        clock: Returns seconds that only grow.
        interval: Least seconds between two progress events of a unit.
    """

    slots: int = 1

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, interval: float = 0.1) -> None:
        self._clock = clock
        self._interval = interval

    def capacity(self, *, start: bool = True) -> Capacity:
        """Describe this process; see :class:`~.units.Executor`. GPUs are not counted here."""
        return Capacity(
            executor="serial",
            nodes=1,
            cpus=float(cpu_count()),
            gpus=0.0,
            slots=self.slots,
            memory_per_worker=int(psutil.virtual_memory().available),
        )

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
        """Do all units in order; see :class:`~.units.Executor`. ``gpus`` and ``cpus`` place nothing here."""
        results: dict[str, dict[str, Any]] = {}
        for unit in units:
            if stopping():
                raise stopped(stage, len(units) - len(results))
            observer(UnitStarted(stage=stage, unit=unit.name))
            began = self._clock()
            results[unit.name] = handler(unit, self._reporter(stage, unit.name, observer))
            observer(
                UnitFinished(
                    stage=stage, unit=unit.name, seconds=self._clock() - began, values=results[unit.name]
                )
            )
        return results

    def _reporter(self, stage: str, unit: str, observer: Observer) -> Callable[[int, int], None]:
        last = -float("inf")

        def report(done: int, total: int) -> None:
            nonlocal last
            now = self._clock()
            if now - last >= self._interval or done >= total:
                last = now
                observer(UnitProgress(stage=stage, unit=unit, done=done, total=total))

        return report

    def close(self) -> None:
        """Nothing to end."""
