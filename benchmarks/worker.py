"""One step of the memory benchmark in a fresh process: ``python -m benchmarks.worker WHAT JSON``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from hydra_pipe.pipeline.drive import run
from hydra_pipe.pipeline.plan import Plan, cut
from hydra_pipe.pipeline.spec import RunSpec
from hydra_pipe.pipeline.survey import survey
from hydra_pipe.pipeline.tasks import Tasks
from hydra_pipe.pipeline.units import Unit
from hydra_pipe.storage.rows import RowStore
from hydra_pipe.workers.memory import peak_bytes
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.training import Compute

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
    )


def plan(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a plan predicts for a replay worker, and how it cuts the rows."""
    spec = make_spec(given)
    cutting: Plan = cut(spec, survey(spec), {"slots": 1, "memory_per_worker": 0})
    return {
        "predicted": cutting.memory["replay worker"],
        "buffers": cutting.memory["buffers of the largest shard"],
        "tracked": cutting.n_tracked,
    }


def record(given: Mapping[str, Any]) -> dict[str, Any]:
    """Record, and leave for the replay what the driver would: the plan's cut and an empty store."""
    spec = make_spec(given)
    run(spec, stages=("record",))
    looked = survey(spec, trial=False)
    cutting = cut(spec, looked, {"slots": 1, "memory_per_worker": 0})
    RowStore.create(
        f"{given['out']}/hypergradients/method=hydra.zarr",
        name="hypergradient",
        rows=cutting.n_tracked,
        columns=cutting.dimension,
        dtype="float32",
        chunk_rows=cutting.chunk_rows,
        row_columns={"train_index": looked.tracked.astype(np.int32)},
        attrs={},
    )
    with open(f"{given['out']}/cut.json", "w", encoding="utf-8") as file:
        json.dump({"rows": cutting.n_tracked, "stop": cutting.shards[0].stop}, file)
    return {}


def replay(given: Mapping[str, Any]) -> dict[str, Any]:
    """Replay the first shard as a worker does; return the process's largest resident set."""
    with open(f"{given['out']}/cut.json", encoding="utf-8") as file:
        cutting = json.load(file)
    tasks = Tasks(
        uri=given["out"],
        recipe=make_recipe(given),
        compute=Compute(device="cpu", threads=given["threads"]),
        method="hydra",
        tracked=np.arange(cutting["rows"]),
        tested=np.arange(0),
        checkpoint_every=None,
        job=cast(Any, None),  # only reduce units look at it
    )
    unit = Unit(stage="hydra/replay", name="shard-00000", arguments={"start": 0, "stop": cutting["stop"]})
    tasks(unit, lambda _done, _total: None)
    return {"peak": peak_bytes()}


def main() -> None:
    """Do what the command line says and write the answer as the last line."""
    what, given = sys.argv[1], json.loads(sys.argv[2])
    found = {"plan": plan, "record": record, "replay": replay}[what](given)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
