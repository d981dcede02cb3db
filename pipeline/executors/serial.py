"""The serial executor: every unit in this process, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil

from .base import Capacity, Handler, Stopping, Unit, never, stopped
from .events import Observer, UnitFinished, UnitProgress, UnitStarted
from .placement import cpu_count
from .stalls import Stalls, limited, listened, took_too_long


class SerialExecutor:
    """Runs units in this process; what a handler raises passes through untouched.

    Args:
        clock: Returns seconds that only grow.
        interval: Least seconds between two progress events of a unit.
        unit_timeout: Seconds after which a unit ends the run; None: never. Nothing here could be tried again elsewhere.
    """

    slots: int = 1

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        interval: float = 0.1,
        unit_timeout: float | None = None,
    ) -> None:
        self._clock = clock
        self._unit_timeout = unit_timeout
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
        stalls = Stalls(stage, observer, clock=self._clock, timeout=self._unit_timeout)
        with listened(stalls):
            for unit in units:
                if stopping():
                    raise stopped(stage, len(units) - len(results))
                observer(UnitStarted(stage=stage, unit=unit.name))
                began = self._clock()
                stalls.begin(unit.name)
                too_long = partial(
                    took_too_long,
                    stage,
                    unit.name,
                    f"it took longer than {self._unit_timeout} s (--unit-timeout)",
                )
                with limited(self._unit_timeout, too_long):
                    results[unit.name] = handler(unit, self._reporter(stage, unit.name, observer, stalls))
                stalls.end(unit.name)
                observer(
                    UnitFinished(
                        stage=stage, unit=unit.name, seconds=self._clock() - began, values=results[unit.name]
                    )
                )
        return results

    def _reporter(
        self, stage: str, unit: str, observer: Observer, stalls: Stalls
    ) -> Callable[[int, int], None]:
        last = -float("inf")

        def report(done: int, total: int) -> None:
            nonlocal last
            stalls.moved(unit)
            reason = stalls.overdue(unit)
            if reason is not None:
                raise took_too_long(stage, unit, reason)
            now = self._clock()
            if now - last >= self._interval or done >= total:
                last = now
                observer(UnitProgress(stage=stage, unit=unit, done=done, total=total))

        return report

    def close(self) -> None:
        """Nothing to end."""
