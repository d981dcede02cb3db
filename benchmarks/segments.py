"""Segments: a replay in shards of samples trains the model once a shard, one in segments of steps about once in all.

All forms replay the same training, in turns in this process, in processor seconds: those of other work on the machine
are not counted. Two workers are then measured on Ray, in elapsed time, and what more of them would take is the plan's
model, with the seconds a step that its survey measured here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra_pipe.pipeline.executors.base import Capacity
from hydra_pipe.pipeline.executors.events import Event, StageFinished, StageStarted
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.plan.plan import cut
from hydra_pipe.pipeline.plan.segmenting import replay_seconds
from hydra_pipe.pipeline.plan.survey import survey
from hydra_pipe.pipeline.run import run as run_spec
from hydra_pipe.pipeline.spec.spec import RunSpec

from .cases import Clothes
from .report import Result
from .timing import median, ratio

SIZES: Mapping[str, Any] = {
    "samples": 6400,
    "epochs": 4,
    "units": 8,
    "tests": 200,
    "rounds": 3,
    "sharded": 1,
    "project": 7709,
    "workers": (1, 2),
    "modelled": (8, 64, 1000),
    "modelled_samples": 50_000,
    "modelled_epochs": 40,
}
QUICK: Mapping[str, Any] = {
    **SIZES,
    "samples": 256,
    "epochs": 2,
    "units": 4,
    "tests": 8,
    "rounds": 1,
    "workers": (),
}
"""``sharded``: rounds in which shards of samples are measured too, which take longest. ``project``: numbers of a row where
that is measured too."""

REPLAY, ALL = ("ways", "segments", "replay"), ("ways", "segments", "replay", "reduce")
"""Stages of a replay, and of what follows the record."""


MACHINE = Capacity(executor="serial", nodes=1, cpus=1.0, gpus=0.0, slots=1, memory_per_worker=64 << 30)


class Clock:
    """Hears of a run's stages, and takes the time of each.

    Args:
        now: Gives it, in seconds.

    Attributes:
        stages: Seconds by the last part of the stage's name.
    """

    def __init__(self, now: Any) -> None:
        self._now, self.stages = now, dict[str, float]()
        self._begun: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Hear of something."""
        if isinstance(event, StageStarted):
            self._begun[event.stage] = self._now()
        elif isinstance(event, StageFinished):
            self.stages[event.stage.rsplit("/", 1)[-1]] = self._now() - self._begun[event.stage]

    def of(self, stages: tuple[str, ...]) -> float:
        """Return the seconds of some stages together."""
        return sum(self.stages.get(stage, 0.0) for stage in stages)


def spec_of(sizes: Mapping[str, Any], **fields: Any) -> RunSpec:
    """Return what is run."""
    recipe = Clothes(train_size=sizes["samples"], test_size=sizes["tests"], epochs=sizes["epochs"])
    common: dict[str, Any] = {"executor": "serial", "device": "cpu", "threads": 1, "visits": "off"}
    return RunSpec(recipe=recipe, **{**common, **fields})


def take(spec: RunSpec, place: Path, now: Any) -> Clock:
    """Run everything at ``place`` and remove it; return what it took."""
    clock = Clock(now)
    run_spec(replace(spec, out=str(place)), observer=clock)
    open_run(place).directory.delete_results()
    return clock


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Measure one process, then two workers, then let the plan say what more of them would take."""
    result = Result(name="segments", sizes=sizes)
    _processor(result, sizes, folder)
    if sizes["workers"]:
        _workers(result, sizes, folder)
    _modelled(result, sizes)
    return result


def _processor(result: Result, sizes: Mapping[str, Any], folder: Path) -> None:
    """Compare processor seconds of one unit, as many segments and as many shards."""
    units = sizes["units"]
    forms = {
        "one": spec_of(sizes, shards=1),
        "segments": spec_of(sizes, shards=1, segments=units),
        "shards": spec_of(sizes, shards=units),
        "one, folded": spec_of(sizes, shards=1, project=sizes["project"]),
        "segments, folded": spec_of(sizes, shards=1, segments=units, project=sizes["project"]),
    }
    taken: dict[str, list[Clock]] = {name: [] for name in forms}
    for turn in range(sizes["rounds"]):
        for name, spec in forms.items():
            if name != "shards" or turn < sizes["sharded"]:
                taken[name].append(take(spec, folder / name, time.process_time))
    seconds = {name: [clock.of(REPLAY) for clock in clocks] for name, clocks in taken.items()}
    name = f"{sizes['samples']:,} samples, {sizes['epochs']} epochs"
    result.add(f"{name}: replay in one unit", seconds["one"], "s")
    parts = {part: median([c.stages.get(part, 0.0) for c in taken["segments"]]) for part in REPLAY}
    result.add(
        f"{name}: replay in 1 x {units} units / one unit",
        ratio(seconds["segments"], seconds["one"]),
        "x",
        at_most=1.15,
        note=", ".join(f"{part} {value:.1f} s" for part, value in parts.items()),
    )
    if seconds["shards"]:
        few = seconds["one"][: len(seconds["shards"])]
        result.add(f"{name}: replay in {units} x 1 units / one unit", ratio(seconds["shards"], few), "x")
    folded = f"{name}, rows of {sizes['project']:,} numbers"
    result.add(f"{folded}: replay in one unit", seconds["one, folded"], "s")
    planned = [
        cut(spec, survey(spec, trial=False), MACHINE).segments.bytes / 1e6
        for spec in (forms["segments, folded"], forms["segments"])
    ]
    result.add(
        f"{folded}: replay in 1 x {units} units / one unit",
        ratio(seconds["segments, folded"], seconds["one, folded"]),
        "x",
        note=f"{planned[0]:.0f} MB of sums, {planned[1]:.0f} where rows are whole",
    )


def _workers(result: Result, sizes: Mapping[str, Any], folder: Path) -> None:
    """Compare elapsed time of replay and reduce on Ray, one thread a worker."""
    units, found = sizes["units"], {}
    for workers in sizes["workers"]:
        spec = spec_of(sizes, shards=1, segments=units, executor="ray", address="local", workers=workers)
        found[workers] = take(spec, folder / "workers", time.monotonic).of(ALL)
    one = found[min(found)] * min(found)
    for workers, seconds in found.items():
        if workers > 1:
            result.add(
                f"replay + reduce on {workers} workers, of linear",
                [one / (workers * seconds)],
                "x",
                at_least=0.9,
                note=f"{one:.1f} s on one, {seconds:.1f} s",
            )


def _modelled(result: Result, sizes: Mapping[str, Any]) -> None:
    """Add what the plan says of many workers."""
    spec = spec_of(sizes, segments="auto")
    seen = survey(spec)
    count, epochs = sizes["modelled_samples"], sizes["modelled_epochs"]
    batch = int(seen.recipe.batch_size)
    seen = replace(
        seen,
        n_train=count,
        tracked=np.arange(count),
        train_labels=np.zeros(count, dtype=np.int64),
        epochs=epochs,
        steps=-(-count // batch) * epochs,
    )

    def seconds(workers: int, asked: RunSpec) -> tuple[float, Any]:
        capacity = Capacity(
            executor="serial",
            nodes=workers,
            cpus=float(workers),
            gpus=0.0,
            slots=workers,
            memory_per_worker=64 << 30,
        )
        plan = cut(asked, seen, capacity)
        assert seen.step_seconds is not None
        share = max(shard.rows for shard in plan.shards) / count
        replayed = replay_seconds(
            *seen.step_seconds, seen.steps, share, len(plan.shards), plan.segments, workers
        )
        return replayed + plan.seconds["reduce"], plan

    alone = seconds(1, replace(spec, segments=1))[0]
    for workers in sizes["modelled"]:
        taken, plan = seconds(workers, spec)
        sharded = seconds(workers, replace(spec, segments=1))[0]
        moved = 2 * plan.segments.bytes / 1e9
        result.add(
            f"plan, {count:,} samples, {epochs} epochs: replay + reduce on {workers:,} workers, of linear",
            [alone / (workers * taken)],
            "x",
            at_least=0.9 if workers == min(sizes["modelled"]) else None,
            note=f"{len(plan.shards)} x {plan.segments.count} units, {moved:.0f} GB of sums written and read, "
            f"{taken:,.0f} s; shards alone {alone / (workers * sharded):.2f}",
        )
