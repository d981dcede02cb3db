"""Checks: what a replay pays for trying its per-sample gradients, what a step of it dispatches, what visits cost the record.

Every part of the checks that is paid for by rules alone lies in the trials before a replay (see
``workers.training.trials``): a step runs the same operators with and without them, which is counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training
from hydra_pipe.workers.training.trials import tried_ways

from .operators import Operators
from .report import Result
from .timing import ratio, take_turns

SIZES: Mapping[str, Any] = {"rounds": 7, "epochs": 20, "threads": 1}
QUICK: Mapping[str, Any] = {"rounds": 3, "epochs": 1, "threads": 1}

COUNTED = 10
"""Steps whose operators are counted."""


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Measure on LeNet-5 and digits, all samples tracked."""
    recipe, compute = Digits(), Compute(device="cpu", threads=sizes["threads"])
    recipe.epochs = sizes["epochs"]
    uri = tempfile.mkdtemp(dir=folder) + "/trajectory.zarr"
    Recorder(Training(recipe, compute), uri).run()
    trajectory = open_trajectory(uri)
    everyone = np.arange(Training(recipe, compute).n_train)

    def replay() -> None:
        made = Replay(Training(recipe, compute), trajectory, everyone, FastRows)
        made.run()
        made.close()

    training = Training(recipe, compute)
    taken = take_turns(
        {"trials": lambda: tried_ways(training, trajectory), "replay": replay}, rounds=sizes["rounds"]
    )
    ways = tried_ways(training, trajectory)
    result = Result(name="checks", sizes=sizes)
    note = f"{ways.trials} batches, {len(trajectory.loss)} steps"
    result.add("trials before a replay", taken["trials"], "s", note=note)
    result.add("the whole replay, trials included", taken["replay"], "s")
    result.add("trials / replay", ratio(taken["trials"], taken["replay"]), "", at_most=0.03)
    taken = take_turns(
        {str(kept): partial(_record, recipe, compute, folder, kept) for kept in (True, False)},
        rounds=sizes["rounds"],
    )
    result.add("the record, visits kept", taken["True"], "s")
    result.add("visits kept / not kept", ratio(taken["True"], taken["False"]), "x", at_most=1.05)
    result.add("operators of a plain step", [_plain(recipe, compute)], "")
    result.add("operators of a step of the replay", [_tracked(recipe, compute, trajectory, everyone)], "")
    return result


def _record(recipe: Digits, compute: Compute, folder: Path, visits: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        Recorder(Training(recipe, compute), f"{place}/trajectory.zarr", visits=visits).run()


def _plain(recipe: Digits, compute: Compute) -> float:
    training = Training(recipe, compute)
    batches = list(training.loader(0, COUNTED))
    with Operators() as operators:
        for step, batch in enumerate(batches):
            training.step(step, batch)
    return operators.count / COUNTED


def _tracked(recipe: Digits, compute: Compute, trajectory: Any, everyone: np.ndarray) -> float:
    made = Replay(Training(recipe, compute), trajectory, everyone, FastRows)
    batches = list(made.training.loader(0, COUNTED))
    with Operators() as operators, torch.enable_grad():
        for step, batch in enumerate(batches):
            made.training.apply_settings(made._settings, step)
            made.step(step, batch, made.rows(step))
    made.close()
    return operators.count / COUNTED
