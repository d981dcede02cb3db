"""What keeping the Hessian costs: EKFAC against the fast replay, the exact adjoint against training.

Fashion-MNIST on LeNet-5, batch 64, all samples tracked, with SGD; with AdamW the same and the digits on an MLP. The exact adjoint answers for all training
samples; its cost counts the segment replay it needs. Exact forward follows samples of the first batch,
which move in all steps but the first. Objects are built before the clock starts.
EKFAC in all, its curvature and the contributions to 200 test samples, is held against a training of 6,400 samples and 4 epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra_pipe.storage.curvature import Curvature
from hydra_pipe.storage.trajectory import Trajectory
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate
from hydra_pipe.workers.hessian.tiles import TILE, WIDEST
from hydra_pipe.workers.persample.engine import PerSampleGradients
from hydra_pipe.workers.recipe import Batch, Recipe
from hydra_pipe.workers.recursion.forms import ADJOINT, EKFAC, FORWARD
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.base import Replay, RowSink
from hydra_pipe.workers.replay.exact import ExactRows
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.replay.split import bent_coordinates
from hydra_pipe.workers.training.test_gradients import TestGradients
from hydra_pipe.workers.training.training import Compute, Training
from hydra_pipe.workers.training.trials import tried_ways

from .cases import Clothes, Prefetched, record
from .digits_mlp import DigitsAdamWClipped, DigitsMLP
from .report import Result
from .timing import clock, ratio

SIZES: Mapping[str, Any] = {
    "samples": 1280,
    "batch": 64,
    "threads": 2,
    "targets": (1, 8, 16),
    "forward": 16,
    "adamw_targets": 8,
    "adamw_epochs": 1,
    "whole_samples": 6400,
    "whole_epochs": 4,
    "whole_tested": 200,
    "digits_targets": 64,
    "rounds": 5,
}
QUICK: Mapping[str, Any] = {
    "samples": 96,
    "batch": 32,
    "threads": 1,
    "targets": (1, 2),
    "forward": 2,
    "adamw_targets": 2,
    "adamw_epochs": 1,
    "whole_samples": 96,
    "whole_epochs": 1,
    "whole_tested": 4,
    "digits_targets": 16,
    "rounds": 1,
}


class ClothesAdamW(Clothes):
    """The same with AdamW, its gradients clipped now and then."""

    NAME = "clothes-adamw"
    clip_grad_norm = 1.0

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(model.parameters(), lr=1e-3)


class Thrown(RowSink):
    """Takes factors of Linear layers and products of convolutions, and keeps nothing: the least a replay does."""

    def __init__(self, training: Training, trajectory: Trajectory, _rows: int) -> None:
        ways = tried_ways(training, trajectory)
        outer = frozenset(i for i, strategy in enumerate(ways.strategies) if strategy == "outer")
        self.engine = PerSampleGradients(training.recipe, training.model, training.layout, ways, outer)

    def begin(self, step: int, batch: Batch, members: torch.Tensor) -> None:
        """Do nothing."""

    def add(self, rows: torch.Tensor, block: torch.Tensor) -> None:
        """Do nothing."""

    def add_factors(
        self, entry: int, rows: torch.Tensor, d_R: torch.Tensor, x_R: torch.Tensor | None
    ) -> None:
        """Do nothing."""

    def numpy(self, start: int, stop: int) -> Any:
        """Return nothing."""


def _in_turns(
    candidates: Mapping[str, Callable[[], Callable[[], object]]], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each candidate, taken in turns, the first round dropped."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(1 + rounds):
        for name, build in candidates.items():
            seconds = clock(build())
            if turn:
                taken[name].append(seconds)
    return taken


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Measure, all candidates in turns."""
    result = Result(name="hessian", sizes=sizes)
    recipe = Clothes(train_size=sizes["samples"], test_size=8, epochs=1, batch_size=sizes["batch"])
    _measure(result, sizes, folder / "sgd", recipe)
    _measure_whole(result, sizes, folder / "whole")
    _measure_wide(result, sizes, folder / "wide")
    common = {"test_size": 8, "epochs": sizes["adamw_epochs"]}
    lenet = ClothesAdamW(train_size=sizes["samples"], batch_size=sizes["batch"], **common)
    mlp = DigitsAdamWClipped(train_size=min(1000, sizes["samples"]), **common)
    for name, found in (("LeNet-5", lenet), ("MLP", mlp)):
        _measure_adamw(result, sizes, folder / found.NAME, found, f"AdamW, {name}: ")
    return result


def _measure_whole(result: Result, sizes: Mapping[str, Any], folder: Path) -> None:
    """Measure EKFAC's curvature, and with it all contributions to some test samples."""
    compute = Compute(threads=1, device="cpu")
    recipe = Clothes(
        train_size=sizes["whole_samples"],
        test_size=sizes["whole_tested"],
        epochs=sizes["whole_epochs"],
        batch_size=sizes["batch"],
    )
    batches, trajectory = record(recipe, compute, folder, every=max(1, sizes["whole_samples"] // 1280))
    tested = np.arange(sizes["whole_tested"])
    targets = TestGradients(Prefetched(recipe, compute, batches), trajectory).rows(tested).gradient
    tracked = np.arange(sizes["whole_samples"])
    found: list[Curvature] = []

    def plain() -> Callable[[], object]:
        training = Prefetched(recipe, compute, batches)
        return lambda: [training.step(step, batch) for step, batch in enumerate(batches)]

    def curvature() -> Callable[[], object]:
        estimate = CurvatureEstimate(Prefetched(recipe, compute, batches), trajectory)
        return lambda: found.append(estimate.run())

    def adjoint() -> Callable[[], object]:
        fresh = Prefetched(recipe, compute, batches)
        given = {"curvature": found[-1], "targets": targets}
        return make_replay(EKFAC, ADJOINT, fresh, trajectory, tracked, **given).run

    taken = _in_turns({"plain": plain, "curvature": curvature, "adjoint": adjoint}, sizes["rounds"])
    own = ratio(taken["curvature"], taken["plain"])
    full = sizes["whole_samples"] >= SIZES["whole_samples"]
    result.add("EKFAC curvature / plain training", own, "x", at_most=1.0 if full else None)
    both = [a + b for a, b in zip(own, ratio(taken["adjoint"], taken["plain"]), strict=True)]
    name = f"EKFAC for {len(tested)} test samples, curvature and adjoint / plain training"
    result.add(name, both, "x", at_most=3.0 if full else None)
    bent = float(len(bent_coordinates(found[-1])))
    result.add("EKFAC coordinates that bend", [bent / found[-1].eigenvalues.shape[1]], "of all")


def _measure_wide(result: Result, sizes: Mapping[str, Any], folder: Path) -> None:
    """Measure what a wide tile of targets saves on a model whose calls cost more than its numbers."""
    recipe = DigitsMLP(train_size=min(1000, sizes["samples"]), test_size=8, epochs=1)
    compute = Compute(threads=1, device="cpu", batch_norm="coupled")
    batches, trajectory = record(recipe, compute, folder)
    count, dimension = sizes["digits_targets"], len(trajectory.checkpoint(0).weights)
    targets = np.random.default_rng(0).standard_normal((count, dimension)).astype(np.float32)
    tracked = np.arange(int(trajectory.attrs["n_train"]))

    def adjoint(tile: int) -> Callable[[], Callable[[], object]]:
        def build() -> Callable[[], object]:
            return Adjoint(Prefetched(recipe, compute, batches), trajectory, tracked, targets, tile=tile).run

        return build

    taken = _in_turns({"8": adjoint(TILE), "all": adjoint(WIDEST)}, sizes["rounds"])
    name = f"exact adjoint of {count} targets on an MLP, {WIDEST} at a time / {TILE} at a time"
    result.add(name, ratio(taken["all"], taken["8"]), "x", at_most=0.4 if count >= WIDEST else None)


def _measure_adamw(
    result: Result, sizes: Mapping[str, Any], folder: Path, recipe: Recipe, prefix: str
) -> None:
    """Measure what AdamW's state and metric add: EKFAC's replay, what is in it, and the adjoint of one tile."""
    compute = Compute(threads=sizes["threads"], device="cpu")
    coupled = replace(compute, batch_norm="coupled")
    batches, trajectory = record(recipe, compute, folder)
    curvature = CurvatureEstimate(Prefetched(recipe, compute, batches), trajectory, checkpoints=1).run()
    tracked = np.arange(int(trajectory.attrs["n_train"]))
    count, dimension = sizes["adamw_targets"], len(trajectory.checkpoint(0).weights)
    targets = np.random.default_rng(0).standard_normal((count, dimension)).astype(np.float32)

    def plain() -> Callable[[], object]:
        training = Prefetched(recipe, compute, batches)
        return lambda: [training.step(step, batch) for step, batch in enumerate(batches)]

    def ekfac() -> Callable[[], object]:
        fresh = Prefetched(recipe, compute, batches)
        return make_replay(EKFAC, FORWARD, fresh, trajectory, tracked, curvature=curvature).run

    def fast() -> Callable[[], object]:
        return Replay(Prefetched(recipe, compute, batches), trajectory, tracked, FastRows).run

    def thrown() -> Callable[[], object]:
        return Replay(Prefetched(recipe, compute, batches), trajectory, tracked, Thrown).run

    def rows() -> Callable[[], object]:
        fresh = Prefetched(recipe, compute, batches)
        done = make_replay(EKFAC, FORWARD, fresh, trajectory, tracked, curvature=curvature).run()
        return lambda: done.numpy(0, len(tracked))

    def adjoint() -> Callable[[], object]:
        return Adjoint(Prefetched(recipe, coupled, batches), trajectory, tracked, targets).run

    candidates = {"plain": plain, "thrown": thrown, "fast": fast, "ekfac": ekfac, "rows": rows}
    candidates["adjoint"] = adjoint
    taken = _in_turns(candidates, sizes["rounds"])
    result.add(
        f"{prefix}EKFAC replay / plain training", ratio(taken["ekfac"], taken["plain"]), "x", at_most=1.6
    )
    for name, what in (
        ("thrown", "replay that throws away what rows are made of"),
        ("fast", "fast replay"),
        ("rows", "EKFAC rows rotated back, once a run"),
    ):
        result.add(f"{prefix}{what} / plain training", ratio(taken[name], taken["plain"]), "x")
    each = [value / count for value in ratio(taken["adjoint"], taken["plain"])]
    name = f"{prefix}exact adjoint, {count} targets: one target / plain training"
    result.add(name, each, "x", at_most=1.6 if count >= 8 else None)


def _measure(result: Result, sizes: Mapping[str, Any], folder: Path, recipe: Recipe) -> None:
    compute = Compute(threads=sizes["threads"], device="cpu")
    coupled = replace(compute, batch_norm="coupled")
    batches, trajectory = record(recipe, compute, folder)
    curvature = CurvatureEstimate(Prefetched(recipe, compute, batches), trajectory, checkpoints=1).run()
    tracked = np.arange(sizes["samples"])
    dimension = len(trajectory.checkpoint(0).weights)
    targets = np.random.default_rng(0).standard_normal((max(sizes["targets"]), dimension)).astype(np.float32)

    def plain() -> Callable[[], object]:
        training = Prefetched(recipe, compute, batches)
        return lambda: [training.step(step, batch) for step, batch in enumerate(batches)]

    def fast() -> Callable[[], object]:
        return Replay(Prefetched(recipe, compute, batches), trajectory, tracked, FastRows).run

    def ekfac() -> Callable[[], object]:
        return make_replay(
            EKFAC, FORWARD, Prefetched(recipe, compute, batches), trajectory, tracked, curvature=curvature
        ).run

    def rows() -> Callable[[], object]:
        replay = make_replay(
            EKFAC, FORWARD, Prefetched(recipe, compute, batches), trajectory, tracked, curvature=curvature
        ).run()
        return lambda: replay.numpy(0, len(tracked))

    def adjoint(count: int) -> Callable[[], Callable[[], object]]:
        def build() -> Callable[[], object]:
            back = Adjoint(Prefetched(recipe, coupled, batches), trajectory, tracked, targets[:count])
            return back.run

        return build

    def forward() -> Callable[[], object]:
        first = trajectory.batches[0][: sizes["forward"]].astype(np.int64)
        return Replay(Prefetched(recipe, coupled, batches), trajectory, first, ExactRows).run

    candidates = {"plain": plain, "fast": fast, "ekfac": ekfac, "rows": rows, "forward": forward}
    candidates |= {f"adjoint {count}": adjoint(count) for count in sizes["targets"]}
    taken = _in_turns(candidates, sizes["rounds"])
    result.add("fast replay / plain training", ratio(taken["fast"], taken["plain"]), "x")
    result.add("EKFAC replay / fast replay", ratio(taken["ekfac"], taken["fast"]), "x", at_most=1.3)
    visits = ratio(taken["rows"], taken["ekfac"])  # one epoch: as many rows as visits
    result.add("EKFAC rows rotated back, once a run / a visit in the replay", visits, "x")
    for count in sizes["targets"]:
        each = [value / count for value in ratio(taken[f"adjoint {count}"], taken["plain"])]
        goal = 4.0 if count == 1 else 1.7 if count >= 8 else None
        result.add(f"exact adjoint, {count} targets: one target / plain training", each, "x", at_most=goal)
    moves = sizes["forward"] * (1 - 1 / len(batches))
    each = [(value - 1) / moves for value in ratio(taken["forward"], taken["plain"])]
    name = f"exact forward, {sizes['forward']} tracked: one sample moved one step / plain step"
    result.add(name, each, "x")
