"""One step of the benchmarks of what a plan says, in a fresh process: ``python -m benchmarks.worker WHAT JSON``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle
from hydra_pipe.pipeline import run as door
from hydra_pipe.pipeline.executors.base import Handler, Unit
from hydra_pipe.pipeline.executors.serial import SerialExecutor
from hydra_pipe.pipeline.plan.plan import Plan, cut
from hydra_pipe.pipeline.plan.survey import survey
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.workers.memory import peak_bytes
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.recipes.digits import Digits

from .cases import Clothes


def make_recipe(given: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a case."""
    if given["recipe"] == "digits":
        return Digits(epochs=given["epochs"])
    return Clothes(train_size=given["samples"], test_size=64, epochs=given["epochs"])


def make_spec(given: Mapping[str, Any]) -> RunSpec:
    """Return the run of a case."""
    return RunSpec(
        recipe=make_recipe(given),
        out=given["out"],
        shards=given["shards"],
        executor="serial",
        threads=given["threads"],
        device="cpu",
        **given.get("options", {}),
    )


def plan(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a plan predicts for a replay worker, and how it cuts the rows."""
    spec = make_spec(given)
    cutting: Plan = cut(spec, survey(spec), replace(SerialExecutor().capacity(), memory_per_worker=0))
    return {
        "predicted": cutting.memory.workers["replay"],
        "buffers": cutting.memory.buffers,
        "tracked": cutting.n_tracked,
    }


class _Kept(Exception):
    """The unit was kept instead of done."""


class _Keeping(SerialExecutor):
    """Writes handler and first unit of the replay to a file, as they would go to a worker."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def run(self, stage: str, units: Sequence[Unit], handler: Handler, *_others: Any, **_more: Any) -> Any:
        """Keep the first unit; do none."""
        with open(self.path, "wb") as file:
            cloudpickle.dump((handler, units[0]), file)
        raise _Kept


def record(given: Mapping[str, Any]) -> dict[str, Any]:
    """Record, and keep what the driver would send to the first replay worker."""
    spec = make_spec(given)
    door.run(spec, stages=("record",))
    keeping = _Keeping(f"{given['out']}/first-unit.pickle")
    with mock.patch.object(door, "make_executor", return_value=keeping), suppress(_Kept):
        door.run(spec, stages=("replay",))
    return {}


def replay(given: Mapping[str, Any]) -> dict[str, Any]:
    """Replay the first shard as a worker does; return the process's largest resident set."""
    with open(f"{given['out']}/first-unit.pickle", "rb") as file:
        handler, unit = cloudpickle.load(file)
    handler(unit, lambda _done, _total: None)
    return {"peak": peak_bytes()}


def whole(given: Mapping[str, Any]) -> dict[str, Any]:
    """Plan a run and do all of it; return what was said and what came of it: seconds, bytes on disk, resident set."""
    spec = make_spec(given)
    said = cut(spec, survey(spec), replace(SerialExecutor().capacity(), memory_per_worker=0))
    # What a process does for the first time (imports, pools, caches) is no part of any stage.
    door.run(replace(spec, out=f"{given['out']}-warm"))
    done = door.run(spec)
    stages = {name: entry.get("seconds", 0.0) for name, entry in done.info["stages"].items()}
    stored = sum(file.stat().st_size for file in Path(given["out"]).rglob("*") if file.is_file())
    return {
        "seconds": dict(said.seconds),
        "stages": stages,
        "disk": dict(said.disk),
        "stored": stored,
        "memory": max(said.memory.workers.values()),
        "peak": peak_bytes(),
    }


def main() -> None:
    """Do what the command line says and write the answer as the last line."""
    what, given = sys.argv[1], json.loads(sys.argv[2])
    found = {"plan": plan, "record": record, "replay": replay, "whole": whole}[what](given)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
