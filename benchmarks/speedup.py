"""What dropping the Hessian buys: the speed-up experiment of the HyDRA paper, on a size that fits.

The paper tracks 20,000 samples of CIFAR-10 through one epoch of DenseNet-40: 49 hours with
Hessian-vector products, 3 minutes without. Here both forms follow few samples through few steps, in
turns, and what each costs is extrapolated:

    fast     T a + n b              a step, whatever is tracked, and something a visit
    exact    T p + n v + m c        a plain step, something a visit, and one product for each sample
                                    and step in which it moves

A tangent is zero until its sample has been visited: over one epoch of T steps m = n (T - 1) / 2 on
average. Samples of the first batch move in all steps but the first, those of the last batch in none: the
difference gives c. The exact adjoint, which answers for all samples at once, stands beside them.

Times are processor seconds of one thread: a run takes minutes, and other work counts for less in them
than in elapsed time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.exact import ExactRows
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.training import Compute

from .cases import Photographs, Prefetched, record
from .report import Result
from .timing import median, ratio

SIZES: Mapping[str, Any] = {
    "samples": 192,
    "batch": 64,
    "tracked": (4, 8),
    "targets": (1, 4),
    "rounds": 2,
    "asked": 20_000,
    "asked_of": 40_000,
}
QUICK: Mapping[str, Any] = {
    **SIZES,
    "samples": 16,
    "batch": 8,
    "tracked": (2, 4),
    "targets": (1,),
    "rounds": 1,
}
HOUR = 3600.0


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Measure all candidates in turns, then extrapolate."""
    result = Result(name="speedup", sizes=sizes)
    recipe = Photographs(train_size=sizes["samples"], test_size=8, epochs=1, batch_size=sizes["batch"])
    compute = Compute(threads=1, device="cpu")
    coupled = replace(compute, batch_norm="coupled")
    batches, trajectory = record(recipe, compute, folder)
    dimension = len(trajectory.checkpoint(0).weights)
    targets = np.random.default_rng(0).standard_normal((max(sizes["targets"]), dimension)).astype(np.float32)
    choices: set[str] = set()

    def plain() -> Callable[[], object]:
        training = Prefetched(recipe, compute, batches)
        return lambda: [training.step(step, batch) for step, batch in enumerate(batches)]

    first, last = (trajectory.batches[step][: max(sizes["tracked"])].astype(np.int64) for step in (0, -1))

    def fast(tracked: Any) -> Callable[[], Callable[[], object]]:
        return lambda: Replay(Prefetched(recipe, compute, batches), trajectory, tracked, FastRows).run

    def exact(tracked: Any) -> Callable[[], Callable[[], object]]:
        def build() -> Callable[[], object]:
            ahead = Replay(Prefetched(recipe, coupled, batches), trajectory, tracked, ExactRows)
            choices.add(ahead.sink.tiles.choice)
            return ahead.run

        return build

    def adjoint(count: int) -> Callable[[], Callable[[], object]]:
        def build() -> Callable[[], object]:
            back = Adjoint(
                Prefetched(recipe, coupled, batches), trajectory, np.arange(sizes["samples"]), targets[:count]
            )
            return back.run

        return build

    candidates: dict[str, Callable[[], Callable[[], object]]] = {"plain": plain}
    for count in sizes["tracked"]:
        candidates |= {f"fast {count}": fast(first[:count]), f"exact {count}": exact(first[:count])}
    candidates |= {"fast all": fast(np.arange(sizes["samples"])), "exact last": exact(last)}
    candidates |= {f"adjoint {count}": adjoint(count) for count in sizes["targets"]}
    plain()()  # the first of all touches fresh memory
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(sizes["rounds"]):
        for name, build in candidates.items():
            taken[name].append(_clock(build()))
    report(result, sizes, taken, len(batches), "; ".join(choices))
    extrapolate(result, sizes, taken, len(batches))
    return result


def _clock(function: Callable[[], object]) -> float:
    """Return how many processor seconds one call takes."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def report(
    result: Result, sizes: Mapping[str, Any], taken: Mapping[str, list[float]], steps: int, choice: str
) -> None:
    result.add("measured: plain training", [value / steps for value in taken["plain"]], "s a step")
    for count in sizes["tracked"]:
        fast, exact = taken[f"fast {count}"], taken[f"exact {count}"]
        result.add(f"measured: fast, {count} tracked / plain training", ratio(fast, taken["plain"]), "x")
        result.add(f"measured: exact, {count} tracked / plain training", ratio(exact, taken["plain"]), "x")
        note = f"first batch, so they move in {steps - 1} of {steps} steps; {choice}"
        result.add(f"measured: exact / fast, {count} tracked", ratio(exact, fast), "x", note=note)
    result.add(
        f"measured: fast, {sizes['samples']} tracked / plain training",
        ratio(taken["fast all"], taken["plain"]),
        "x",
    )
    for count in sizes["targets"]:
        each = [value / count for value in ratio(taken[f"adjoint {count}"], taken["plain"])]
        result.add(f"measured: adjoint, each of {count} targets / plain training", each, "x")


def extrapolate(
    result: Result, sizes: Mapping[str, Any], taken: Mapping[str, list[float]], steps: int
) -> None:
    """Fit both costs to the medians and add what they come to for the paper's experiment."""
    most, fewest, samples = max(sizes["tracked"]), min(sizes["tracked"]), sizes["samples"]
    middle = {name: median(values) for name, values in taken.items()}
    plain = middle["plain"] / steps
    fast_visit = max(0.0, (middle["fast all"] - middle[f"fast {fewest}"]) / (samples - fewest))
    fast_step = (middle["fast all"] - samples * fast_visit) / steps
    visit = max(0.0, (middle["exact last"] - middle["plain"]) / most)
    product = (middle[f"exact {most}"] - middle["exact last"]) / (most * (steps - 1))
    each = middle[f"adjoint {max(sizes['targets'])}"] / max(sizes["targets"]) / steps
    result.add("fitted: one product of the exact form / plain step", [product / plain], "x")
    result.add("fitted: one visit, exact / plain step", [visit / plain], "x")
    result.add("fitted: one step of the fast form / plain step", [fast_step / plain], "x")
    result.add("fitted: one visit, fast / plain step", [fast_visit / plain], "x")
    total, asked = -(-sizes["asked_of"] // sizes["batch"]), sizes["asked"]
    fast = total * fast_step + asked * fast_visit
    exact = total * plain + asked * (visit + (total - 1) / 2 * product)
    note = f"{asked:,} tracked of {sizes['asked_of']:,}, one epoch"
    result.add("extrapolated: fast", [fast / HOUR], "h", note=note)
    result.add("extrapolated: exact forward", [exact / HOUR], "h", note=note)
    result.add("extrapolated: exact forward / fast", [exact / fast], "x", note="the paper: 49 h, 3 min, 971")
    result.add("extrapolated: adjoint, one target", [total * each / HOUR], "h", note="for all samples")
    note = "fewer: adjoint is cheaper"
    result.add(
        "extrapolated: targets at which both exact forms cost the same", [exact / total / each], "", note=note
    )
