"""Faults on Ray: actors, drivers and a machine lost in the middle; every run ends with the bits of the undisturbed one.

A run has more shards than the two machines have slots. Afterwards the same command finds all done, and no process is left.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from hydra_pipe.pipeline.executors import events, stragglers
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.storage.errors import HydraError

from hydra_pipe import RunSpec, run
from tests.end_to_end.nursery import PAUSED, Nursery
from tests.faults import FaultPlan, spoiled
from tests.torture.drivers import SIGNALS, STOPPED
from tests.torture.ground import Ground
from tests.torture.judge import expected, untidy
from tests.torture.tally import Tally
from tests.torture.two_nodes import TwoNodes, left, two_nodes

PAUSE = 0.02
"""Seconds that each pass of the recipe waits, so that a fault finds it at work."""
FIELDS: Mapping[str, Any] = {
    "recipe": PAUSED[0],
    "recipe_args": {"pause": PAUSE},
    "device": "cpu",
    "shards": 5,
    "hessian": "ekfac",
}
WORDS = (
    "--device",
    "cpu",
    "--shards",
    "5",
    "--hessian",
    "ekfac",
    "--executor",
    "ray",
    "--workers",
    "2",
    "--quiet",
)
ACTOR_SECONDS, MACHINE_SECONDS = 15.0, 60.0
"""So long at most until a unit is at work again: from the notice that its worker is lost, from the kill of its machine's raylet."""
UNIT_TIMEOUT = 20.0
"""Of runs with an actor that hangs; longer than any unit here takes."""


@dataclass(slots=True)
class Watch:
    """An observer that takes the time from each loss of a unit to its next start, and may act at an event.

    Attributes:
        act: Called once, at the event that ``when`` says.
        when: Whether that is this event.
        seconds: Of every recovery, from the notice that a unit was lost.
        again: When it was at work again, seconds of the clock.
        done: Units that were done.
    """

    when: Callable[[events.Event], bool] = lambda event: False
    act: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    _lost: dict[str, float] = field(default_factory=dict)
    _acted: bool = False

    def __call__(self, event: events.Event) -> None:
        now = time.monotonic()
        if isinstance(event, events.UnitRetried):
            self._lost[event.unit] = now
        elif isinstance(event, events.UnitStarted) and event.unit in self._lost:
            self.seconds.append(now - self._lost.pop(event.unit))
            self.again.append(now)
        elif isinstance(event, events.UnitFinished):
            self.done.append(event.unit)
        if not self._acted and self.when(event):
            self._acted = True
            self.act()


@dataclass(frozen=True, kw_only=True, slots=True)
class RayGround(Ground):
    """The same on two machines of Ray.

    Attributes:
        nodes: The two machines.
        places: Units by stage, with the number of times that each reports.
    """

    nodes: TwoNodes
    places: Mapping[str, Sequence[tuple[str, int]]]

    def run(self, out: Path, observer: events.Observer, **fields: Any) -> None:
        """Make the run at ``out`` on the two machines, unless ``fields`` say otherwise."""
        placed = {"executor": "ray", "address": self.nodes.address, "workers": 2, **fields}
        run(RunSpec(out=str(out), **FIELDS, **placed), observer=observer)

    def judge(self, out: Path, pids: set[int], seconds: Sequence[float], limit: float) -> tuple[str, str]:
        """Return what became of a run that ended well, having lost ``pids``."""
        again = Watch()
        self.run(out, again, executor="serial", address=None, workers=None)
        if again.done:
            return "lost", f"done again: {again.done}"
        if expected(out) != self.right:
            return "wrong", "other numbers"
        if found := untidy(out):
            return found
        if remaining := left(pids):
            return "untidy", f"processes {remaining} are left"
        if late := [f"{one:.1f} s" for one in seconds if one > limit]:
            return "late", f"at work again after {late}, {limit:g} s are allowed"
        return "repaired", ""


def cluster(
    scratch: Path, tally: Tally, *, count: int, seed: int, heard: Callable[[], None] = lambda: None
) -> None:
    """Disturb ``count`` runs on Ray: half of them by actors, the others by machines and drivers in turn."""
    with Nursery() as nursery, two_nodes() as nodes:
        watched: list[events.Event] = []
        spec = RunSpec(out=str(scratch / "right"), executor="serial", **FIELDS)
        run(spec, observer=watched.append)
        ground = RayGround(
            nodes=nodes,
            nursery=nursery,
            scratch=scratch,
            tally=tally,
            chance=random.Random(f"{seed} cluster"),
            right=expected(scratch / "right"),
            places=_places(watched),
        )
        ways = {
            _actor: cycle(_ways(ground)),
            _machine: cycle(ground.places),
            _driver: cycle((False, True)),
        }
        for number in range(count):
            kind = (_actor, _machine, _actor, _driver)[number % 4]
            kind(ground, scratch / f"run-{number}", next(ways[kind]))
            heard()


def _places(watched: Sequence[events.Event]) -> dict[str, list[tuple[str, int]]]:
    """Return each stage's units and how often they report, as a run told it."""
    steps = {e.unit: e.total for e in watched if isinstance(e, events.UnitProgress)}
    found: dict[str, list[tuple[str, int]]] = {}
    for event in watched:
        if isinstance(event, events.UnitFinished):
            found.setdefault(event.stage, []).append((event.unit, max(1, steps.get(event.unit, 1))))
    return found


def _ways(ground: RayGround) -> Iterator[tuple[str, str]]:
    """Return stages and faults such that after few of them each stage and each fault was met."""
    stages = list(ground.places)
    faults = ("kill", "kill@", "kill-after", "hang", "kill>", "stop", "exit:3", "straggle")
    pairs = [
        (stage, fault)
        for k in range(len(faults))
        for stage, fault in zip(stages, faults[k:] + faults[:k], strict=False)
    ]
    # Only a stage of several units has a last one.
    yield from (pair for pair in pairs if pair[1] != "straggle" or len(ground.places[pair[0]]) > 1)


def _actor(ground: RayGround, out: Path, way: tuple[str, str]) -> None:
    """Have the worker of one unit die, hang or stand still."""
    stage, fault = way
    unit, steps = ground.chance.choice(ground.places[stage])
    drawn = {
        "kill@": f"kill@{ground.chance.randint(1, steps)}",
        "kill>": f"kill>{ground.chance.uniform(0, 0.4):.3f}",
    }
    action = drawn.get(fault, "hang" if fault == "straggle" else fault)
    kind = {
        "hang": "actor hangs",
        "stop": "actor stands still",
        "exit:3": "actor exits",
        "straggle": "last unit hangs",
    }
    name, detail = kind.get(fault, f"actor killed: {stage.rsplit('/')[-1]}"), f"{action} in {stage} {unit}"
    (faults := out.with_suffix(".faults")).mkdir()
    plan, watch = FaultPlan(directory=str(faults), script={unit: [action]}), Watch()
    limit = UNIT_TIMEOUT if fault in ("hang", "stop") else None
    try:
        with (
            mock.patch.object(RayExecutor, "run", spoiled(RayExecutor.run, plan)),
            mock.patch.object(stragglers, "LEAST_SECONDS", 2.0 if fault == "straggle" else 1e9),
        ):
            ground.run(out, watch, unit_timeout=limit)
    except HydraError as error:
        ground.tally.note(name, "lost", f"{detail}: {error}")
        return
    if plan.attempts(unit) == 1:  # it was done before its time came
        ground.tally.note(name, "unharmed", detail)
        return
    outcome, why = ground.judge(out, plan.pids(), watch.seconds, ACTOR_SECONDS)
    ground.tally.note(name, outcome, f"{detail}: {why}", seconds=watch.seconds)


def _machine(ground: RayGround, out: Path, stage: str) -> None:
    """Kill the raylet of the second machine during a stage, with as many of its units at work as can be.

    They go on only when the loss was noticed: a worker may outlive its raylet by a moment, and finish a short unit.
    """
    name, pids, go_on = "raylet killed", set[int](), out.with_suffix(".go-on")
    units, at_work = [unit for unit, _ in ground.places[stage]], set[str]()
    killed: list[float] = []

    def full(event: events.Event) -> bool:
        if isinstance(event, events.UnitStarted) and event.stage == stage:
            at_work.add(event.unit)
        return len(at_work) == min(2, len(units))

    def release() -> None:
        with contextlib.suppress(FileNotFoundError):  # all is over
            go_on.touch()

    def lose() -> None:
        killed.append(time.monotonic())
        pids.update(ground.nodes.lose())
        # A stage of one unit may have it on the other machine, where nothing is lost.
        later = threading.Timer(ground.chance.uniform(0.1, 2.0) if len(units) == 1 else 90.0, release)
        later.daemon = True
        later.start()

    def listen(event: events.Event) -> None:
        watch(event)
        if isinstance(event, events.UnitRetried):
            release()

    (faults := out.with_suffix(".faults")).mkdir()
    plan = FaultPlan(directory=str(faults), script={unit: [f"wait:{go_on}"] for unit in units})
    watch = Watch(when=full, act=lose)
    try:
        with mock.patch.object(RayExecutor, "run", spoiled(RayExecutor.run, plan)):
            ground.run(out, listen)
    except HydraError as error:
        ground.tally.note(name, "lost", f"{stage}: {error}")
    else:
        took = [again - killed[0] for again in watch.again[:1]]
        outcome, why = ground.judge(out, pids | plan.pids(), took, MACHINE_SECONDS)
        ground.tally.note(name, outcome, f"{stage}: {why}", seconds=took)
    ground.nodes.restore()


def _driver(ground: RayGround, out: Path, own: bool) -> None:
    """Signal drivers at random moments, on the two machines or each with a Ray of its ``own``; the last one finishes."""
    said, hit = out.with_suffix(".said"), []

    def words(place: str) -> list[str]:
        return ["run", PAUSED[0], "--set", f"pause={PAUSE}", *WORDS, "--address", place, "--out", str(out)]

    for _ in range(1 if own else 3):
        sent = ground.chance.choice(list(SIGNALS))
        name, after = f"{SIGNALS[sent]}, on Ray", ground.chance.uniform(2.0, 15.0)
        with _children(ground.nursery) as pids:
            code = ground.nursery.drive(
                words("local" if own else ground.nodes.address), after=after, number=sent, said=said
            )
        if code == 0:
            break
        if code not in STOPPED[sent]:
            ground.tally.note(
                name, "crashed", f"after {after:.1f} s: exit code {code}: {said.read_text()[-300:]}"
            )
        remaining = left(pids)
        deadline = time.monotonic() + 60
        while (workers := ground.nodes.workers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if remaining or workers:
            ground.tally.note(
                name, "untidy", f"after {after:.1f} s: processes {remaining | workers} are left"
            )
        hit.append(name)
    code = ground.nursery.drive(words(ground.nodes.address), said=said)
    if code != 0:
        outcome, why = "lost", f"run again: exit code {code}: {said.read_text()[-300:]}"
    else:
        outcome, why = ground.judge(out, set(), (), 0.0)
    for name in hit or ("driver through before its signal",):
        ground.tally.note(name, outcome if hit or outcome != "repaired" else "unharmed", why)


@contextlib.contextmanager
def _children(nursery: Nursery) -> Iterator[set[int]]:
    """Give a set that takes in all processes below the driver that a nursery makes within."""
    found, over, before = set[int](), threading.Event(), nursery.child

    def look() -> None:
        while not over.wait(0.2):
            if nursery.child not in (None, before):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.update(
                        child.pid for child in psutil.Process(nursery.child).children(recursive=True)
                    )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
