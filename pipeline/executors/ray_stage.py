"""One stage on Ray: the driver's loop over its actors. ``ray`` itself is handed in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ...storage.errors import ClusterTooSmall, HydraError, RecipeError, WorkerLost
from ...workers import actor
from . import raysetup
from .base import Unit
from .dispatch import Dispatch
from .events import Note, Observer
from .placement import Demand
from .stalls import STALLED_SECONDS

_PROGRESS_EVERY = 0.5  # seconds between two questions to one worker
_NODES_EVERY = 5.0  # seconds between two looks at which nodes there are


@dataclass(slots=True, eq=False)
class Worker:
    """One actor as the driver sees it.

    Attributes:
        actor: Ray's handle.
        call: The answer it owes: to loading the handler, or to ``unit``; None while idle.
        unit: What it works on; None while idle or loading.
        hello: Its first answer, which shows that its process is there, until that has come.
        up: Whether it has come.
        loaded: True once it has the handler of this stage.
        quiet: Since when it loads the handler, clock seconds; later where that has been spoken of.
        second: Whether another worker was at that unit before.
        host: Where it is, once it has a handler.
        question: The answer to the last question for progress, while that is open.
        asked: When that was asked, clock seconds.
    """

    actor: Any
    call: Any = None
    unit: Unit | None = None
    hello: Any = None
    up: bool = False
    loaded: bool = False
    quiet: float = 0.0
    second: bool = False
    host: str = ""
    question: Any = None
    asked: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WaveSettings:
    """How a wave behaves.

    Attributes:
        demand: What one worker holds.
        target: Returns how many workers there may be now.
        start_timeout: Seconds without a single worker process before giving up; what a process that is there
            takes to load the recipe and its data is its own affair.
        max_attempts: Workers in a row that may die while they start.
        clock: Returns seconds that only grow.
        tick: Most seconds between two looks at the workers.
        side_by_side: Whether two workers may do the same unit at the same time.
    """

    demand: Demand
    target: Callable[[], int]
    start_timeout: float
    max_attempts: int
    clock: Callable[[], float]
    tick: float
    side_by_side: bool


class Wave:
    """Keeps up to ``target`` workers busy until every unit of a stage is done.

    Args:
        ray: The connected ray module.
        actor: The actor class, resources set.
        payload: Ray reference to the pickled handler.
        pool: Workers that are there already; those started here are added, those that die removed.
        dispatch: The units.
        observer: Hears notes.
        settings: How to behave.
    """

    def __init__(
        self,
        ray: Any,
        actor: Any,
        payload: Any,
        pool: list[Worker],
        dispatch: Dispatch,
        observer: Observer,
        settings: WaveSettings,
    ) -> None:
        self._ray, self._actor, self._payload = ray, actor, payload
        self._pool, self._dispatch, self._observer, self._settings = pool, dispatch, observer, settings
        self._failed_starts = 0
        self._last_up = settings.clock()

    def run(self) -> None:
        """Return when every unit is done.

        Raises:
            ClusterTooSmall: No worker's process was there for ``start_timeout`` seconds.
            WorkerLost: A unit, or the start of workers, failed too often.
            RunStopped: It was asked to stop, and what was in work is done.
            Exception: What the handler raised.
        """
        for worker in self._pool:
            self._load(worker)
        while self._dispatch.unfinished:
            self._dispatch.check_stop()
            self._recruit()
            self._hand_out()
            self._back_up()
            self._ask_progress()
            self._listen()
            self._end_overdue()
            self._dispatch.stalls.say()
            self._check_alive()

    def _load(self, worker: Worker) -> None:
        worker.loaded, worker.unit, worker.question = False, None, None
        worker.quiet = self._settings.clock()
        worker.call = worker.actor.load.remote(self._payload, actor.versions())

    def _recruit(self) -> None:
        wanted = min(max(1, self._settings.target()), self._dispatch.unfinished)
        while len(self._pool) < wanted:
            worker = Worker(actor=self._actor.remote(self._settings.demand.gpus))
            worker.hello = worker.actor.pid.options(concurrency_group="control").remote()
            self._pool.append(worker)
            self._load(worker)

    def _hand_out(self) -> None:
        for worker in self._pool:
            if worker.loaded and worker.unit is None and self._dispatch.waiting:
                self._give(worker, self._dispatch.start(), second=False)

    def _give(self, worker: Worker, unit: Unit, *, second: bool) -> None:
        worker.unit, worker.second = unit, second
        worker.call = worker.actor.run.remote(unit)

    def _back_up(self) -> None:
        """Begin units that hold up the stage a second time, on workers that have nothing to do."""
        late = [w for w in self._pool if w.unit is not None and self._dispatch.straggles(w.unit)]
        for worker in late:
            idle = [other for other in self._pool if other.loaded and other.unit is None]
            if (
                self._settings.side_by_side
                and idle
                and worker.unit
                and self._dispatch.may_back_up(worker.unit)
            ):
                # Another machine, where there is one: what slows the first may slow all workers beside it.
                other = min(idle, key=lambda one: one.host == worker.host)
                self._dispatch.back_up(worker.unit)
                self._give(other, worker.unit, second=True)

    def _others_at(self, unit: Unit | None) -> list[Worker]:
        """Return the workers that are still at a unit which one of them has left."""
        return [worker for worker in self._pool if worker.unit is not None and worker.unit is unit]

    def _ask_progress(self) -> None:
        now = self._settings.clock()
        for worker in self._pool:
            if worker.unit and worker.question is None and now - worker.asked >= _PROGRESS_EVERY:
                worker.asked = now
                worker.question = worker.actor.progress.options(concurrency_group="control").remote()

    def _listen(self) -> None:
        calls = {worker.call: worker for worker in self._pool if worker.call is not None}
        questions = {worker.question: worker for worker in self._pool if worker.question is not None}
        hellos = {worker.hello: worker for worker in self._pool if worker.hello is not None}
        ready, _ = self._ray.wait([*calls, *questions, *hellos], num_returns=1, timeout=self._settings.tick)
        for reference in ready:
            if reference in hellos:
                self._take_hello(hellos[reference])
            elif reference in calls:
                self._take_answer(calls[reference])
            else:
                self._take_progress(questions[reference])

    def _take_hello(self, worker: Worker) -> None:
        hello, worker.hello = worker.hello, None
        # A worker that died before it could say so is told of by its call, and better.
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(hello)
            worker.up, worker.quiet = True, self._settings.clock()

    def _take_progress(self, worker: Worker) -> None:
        question, worker.question = worker.question, None
        # A worker that cannot answer is dead; its call says so, and better.
        with contextlib.suppress(self._ray.exceptions.RayError):
            progress = self._ray.get(question)
            if progress is not None and worker.unit is not None and progress[0] == worker.unit.name:
                self._dispatch.progress(*progress)

    def _take_answer(self, worker: Worker) -> None:
        call, worker.call = worker.call, None
        unit, worker.unit = worker.unit, None
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if not self._others_at(unit):
                _raise_cause(error, unit)
            self._say_gone(unit, str(error.cause))
        except self._ray.exceptions.RayError as error:
            self._bury(worker, unit, error)
        else:
            if unit is None:
                worker.loaded, worker.host, self._failed_starts = True, answer[0], 0
            else:
                self._dispatch.finish(unit, answer, second=worker.second)
                for other in self._others_at(unit):
                    self._end(other)

    def _end(self, worker: Worker) -> None:
        """Kill a worker and forget it."""
        self._pool.remove(worker)
        with contextlib.suppress(Exception):
            self._ray.kill(worker.actor, no_restart=True)

    def _say_gone(self, unit: Unit | None, reason: str) -> None:
        assert unit is not None
        first = (reason.strip().splitlines() or ["no reason given"])[0][:200]
        self._observer(
            Note(
                message=f"{unit.stage}: one of two attempts at {unit.name} failed, the other goes on: {first}"
            )
        )

    def _bury(self, worker: Worker, unit: Unit | None, error: Exception) -> None:
        """Forget a worker that died, and queue its unit again."""
        if type(error).__name__ == "UnserializableException":
            raise RuntimeError(f"a worker failed with an error that cannot be read here: {error}") from error
        # "Unavailable" may mean alive out of reach: two workers on one unit would be one too many.
        self._end(worker)
        reason = raysetup.reason(error)
        if unit is not None:
            if self._others_at(unit):
                self._say_gone(unit, reason)
            else:
                self._dispatch.lose(unit, reason)
            return
        self._failed_starts += 1
        if getattr(error, "actor_init_failed", False) or self._failed_starts >= self._settings.max_attempts:
            raise WorkerLost(
                f"{self._failed_starts} worker(s) in a row died while starting; last: {reason}; check that "
                "the same hydra-pipe, torch and Python are installed on every node"
            ) from error
        self._observer(Note(message=f"a worker died while starting: {reason}; starting another"))

    def _end_overdue(self) -> None:
        """Give up the workers of units that take longer than they may, and queue those units again."""
        for unit in {worker.unit.name: worker.unit for worker in self._pool if worker.unit}.values():
            reason = self._dispatch.stalls.overdue(unit.name)
            if reason is not None:
                # Killed before the unit goes to another, and its second attempt with it.
                for worker in self._others_at(unit):
                    self._end(worker)
                self._dispatch.lose(unit, reason)

    def _check_alive(self) -> None:
        now = self._settings.clock()
        for worker in self._pool:
            if worker.up and not worker.loaded and now - worker.quiet >= STALLED_SECONDS:
                worker.quiet = now
                self._observer(
                    Note(message=f"a worker has been loading the recipe for {STALLED_SECONDS:g} s or more")
                )
        if any(worker.up for worker in self._pool):
            self._last_up = now
        elif now - self._last_up > self._settings.start_timeout:
            free = self._ray.available_resources()
            total = self._ray.cluster_resources()
            raise ClusterTooSmall(
                f"no worker came up in {self._settings.start_timeout:g} s: each needs "
                f"{self._settings.demand} on one node, free are {free.get('CPU', 0):g} of "
                f"{total.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} of {total.get('GPU', 0):g} GPU; "
                "end other work, add nodes, or raise start_timeout"
            )


def worker_target(
    slots: Callable[[], int], *, workers: int | None, grows: bool, units: int, clock: Callable[[], float]
) -> Callable[[], int]:
    """Return a function that says how many workers there may be now.

    Args:
        slots: Returns how many the cluster holds now; asked again every few seconds.
        workers: Most the user wants, or None.
        grows: True where an autoscaler adds nodes.
        units: Units of the stage.
        clock: Returns seconds that only grow.
    """
    surveyed, held = -float("inf"), 0

    def target() -> int:
        nonlocal surveyed, held
        if clock() - surveyed > _NODES_EVERY:
            surveyed, held = clock(), slots()
        # Actors that wait are what an autoscaler goes by: ask for twice what there is.
        limit = max(1, 2 * held) if grows else held
        return min(workers or units, limit)

    return target


def _raise_cause(error: Any, unit: Unit | None) -> NoReturn:
    """Raise what happened inside a worker as itself, Ray's account of it as its cause."""
    cause = error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))
    if unit is None and not isinstance(cause, HydraError):
        raise RecipeError(
            f"workers cannot load the recipe: {type(cause).__name__}: {cause}; install what it imports on "
            "every node, or give it as path/to/file.py:Class"
        ) from error
    raise cause from error
