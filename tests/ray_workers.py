"""Workers on Ray that outlive the run that started them: most of a small run on Ray is the start of its workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from hydra_pipe.pipeline.executors.placement import Demand
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.pipeline.executors.ray_stage import Worker

_idle: list[Worker] = []
_PLAIN = Demand(cpus=1.0, gpus=0.0)


@contextmanager
def reused() -> Iterator[None]:
    """Let executors hand their idle workers on when they close, and take such workers before they start any."""
    close, run = RayExecutor.close, RayExecutor.run

    def handing_on(executor: RayExecutor) -> None:
        if executor._pool_demand == _PLAIN:
            for worker in [one for one in executor._pool if one.loaded and one.unit is None]:
                executor._pool.remove(worker)
                _idle.append(worker)
        close(executor)

    def taking(executor: RayExecutor, *arguments: Any, **more: Any) -> dict[str, dict[str, Any]]:
        if not executor._pool and _idle:
            executor._connect()
            executor._pool_demand = _PLAIN
            count = min(len(_idle), executor._workers or len(_idle))
            executor._pool += [_idle.pop() for _ in range(count)]
        return run(executor, *arguments, **more)

    with mock.patch.object(RayExecutor, "close", handing_on), mock.patch.object(RayExecutor, "run", taking):
        yield


def end() -> None:
    """End the workers that nobody has taken; what comes next finds the cluster empty."""
    import ray

    while _idle:
        ray.kill(_idle.pop().actor, no_restart=True)
