"""HyDRA, Table 3 (80% wrong labels) and supplement Table 4 (50%): drop as many samples as are wrong, train again.

What was run for the published tables is not known (the samples were selected with the test set on which accuracy
is then reported, and the retraining script gives the true labels back). So each ranking is judged in both readings:

- labels kept as trained, which is what cleaning means; and the true labels, as the published command lines have it;
- C(i) is that of one half of the test set; accuracy is reported on the other half, and on the half that selected.

Beside it stand a random choice of the same size, the rankings by loss and by margin, and exactly the right labels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hydra_pipe.workers.recipe import Recipe

from hydra_pipe import Run

from .outcome import Outcome, spread
from .rankings import suspicions
from .steps import Found, Steps
from .tasks import NOISE, Integers, available, recorded, retrained, task

Floats = npt.NDArray[np.float64]

PUBLISHED: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "table3": {
        "mnist": (72.93, 90.07, 98.31),
        "fashion-mnist": (78.52, 63.20, 86.72),
        "cifar10": (31.36, 42.12, 72.01),
    },
    "supplement-table4": {
        "mnist": (94.65, 93.83, 98.31),
        "fashion-mnist": (87.44, 76.70, 87.28),
        "cifar10": (68.91, 58.34, 75.06),
    },
}
"""Accuracy in %: no filtering, influence functions, HyDRA."""
SHARES = {"table3": 0.8, "supplement-table4": 0.5}

NOTHING, RANDOM, EXACT = "nothing", "at random", "exactly the wrong ones"
KEPT, TRUE = "as trained", "true"
"""Which labels the retraining sees."""

COMMON: Mapping[str, Any] = {
    "data": ("fashion-mnist",),
    "samples": None,
    "epochs": None,
    "tests": 10_000,
    "hessians": ("none", "ekfac"),
    "by": (
        "loss",
        "margin",
        "early-loss",
        "final-loss",
        "confident",
        "contribution",
        "harmed-class",
        "joint",
    ),
    "retrain": ("loss", "margin", "early-loss", "contribution", "harmed-class", "joint"),
    "seeds": 3,
    "true_seeds": 1,
    "true": (RANDOM, "margin", EXACT),
    "device": "cpu",
}
QUICK = {
    **COMMON,
    "data": ("digits",),
    "samples": 120,
    "epochs": 2,
    "tests": 100,
    "hessians": ("none",),
    "by": ("margin", "contribution", "loss"),
    "retrain": ("margin", "contribution"),
    "seeds": 1,
}
FULL = {
    **COMMON,
    "data": ("mnist", "fashion-mnist", "cifar10"),
    "hessians": ("none", "ekfac", "exact"),
    "seeds": 5,
    "true_seeds": 5,
    "true": (RANDOM, "loss", "margin", "contribution", "harmed-class", "joint", EXACT),
    "device": "auto",
}
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    name: {"quick": QUICK, "two-cores": {**COMMON, "samples": samples}, "full": FULL}
    for name, samples in (("table3", 12_500), ("supplement-table4", 5_000))
}


def noisy_task(data: str, share: float, sizes: Mapping[str, Any]) -> Recipe:
    """Return the training on wrong labels."""
    return task(
        data, label_noise=share, noise_kind=NOISE, train_size=sizes["samples"], epochs=sizes["epochs"]
    )


def experiment(name: str, sizes: Mapping[str, Any], steps: Steps, pictures: Path) -> Outcome:
    """Rank, drop, train again; one table a data set."""
    outcome = Outcome(name=name, sizes=sizes)
    for data in sizes["data"]:
        if not available(data):
            outcome.notes.append(f"{data}: left out, its files are not there")
            continue
        _clean(outcome, data, SHARES[name], sizes, steps)
        if published := PUBLISHED[name].get(data):
            none, influence, hydra = published
            outcome.notes.append(
                f"{data}, published: no filtering {none}%, influence functions {influence}%, HyDRA {hydra}%"
            )
    return outcome


def _clean(outcome: Outcome, data: str, share: float, sizes: Mapping[str, Any], steps: Steps) -> None:
    recipe = noisy_task(data, share, sizes)
    half = sizes["tests"] // 2
    ranked: dict[str, Floats] = {}
    for hessian in sizes["hessians"]:
        run, method = steps.attributed(
            data,
            recipe=recipe,
            mode="adjoint",
            targets="classes",
            hessian=hessian,
            test=f"0:{half}",
            device=sizes["device"],
        )
        ranked |= ranking_step(steps, f"{data}-rank-{method}", run, recipe, sizes, method, first=not ranked)
    noisy = run.noisy()
    assert noisy is not None
    count = len(run.samples(method))
    wrong = noisy[0]
    parts = {"selecting": np.arange(half), "rest": np.arange(half, sizes["tests"])}
    arms = choices(ranked, wrong, count)
    table = outcome.table(
        f"{data}, {count:,} samples, {100 * len(wrong) / count:.0f}% wrong: accuracy of the last epoch, %",
        *("dropped", "right among kept, %", "labels as trained, rest", "the half that selected"),
        *("true labels, rest", "the half that selected"),
    )
    right = np.setdiff1d(np.arange(count), wrong)
    for arm, kept in arms.items():
        cells: list[Any] = [arm, 100 * len(np.intersect1d(kept, right)) / len(kept)]
        trained = arm not in ranked or arm.split(",")[0] in sizes["retrain"]
        for labels, seeds in ((KEPT, sizes["seeds"]), (TRUE, sizes["true_seeds"])):
            # Nothing dropped and true labels is no cleaning.
            asked = trained if labels == KEPT else arm != NOTHING and arm.split(",")[0] in sizes["true"]
            seeds = seeds if asked else 0
            found = [
                _retrain(steps, data, run, recipe, sizes, arm, kept, labels, seed, parts)
                for seed in range(seeds)
            ]
            outcome.details[f"{data}, {arm}, {labels}"] = found
            cells += [
                spread([one[part] for one in found], 100) if found else None for part in ("rest", "selecting")
            ]
        table.rows.append(cells)
    outcome.notes += [
        (
            f"{data}: {sizes['seeds']} seeds of the retraining with labels as trained, {sizes['true_seeds']} with true "
            "labels (mean ± standard deviation); the wrong labels and the rankings are those of one training"
        ),
        f"{data}: C(i) of the first {half:,} test samples selects, the other {sizes['tests'] - half:,} judge",
    ]


def ranking_step(
    steps: Steps,
    name: str,
    run: Run,
    recipe: Recipe,
    sizes: Mapping[str, Any],
    method: str,
    *,
    first: bool,
) -> dict[str, Floats]:
    """Return suspicions by ranking, those that do not look at contributions once."""
    from .rankings import CONTRIBUTIONS

    wanted = [by for by in sizes["by"] if first or by in CONTRIBUTIONS]
    found = steps.do(
        name,
        {"by": wanted, **_parameters(recipe)},
        lambda: dict(suspicions(run, recipe, wanted, method=method)),
    )
    return {f"{by}, {method}" if by in CONTRIBUTIONS else by: value for by, value in found.items()}


def _parameters(recipe: Recipe) -> dict[str, Any]:
    return {"recipe": recipe.name, **recipe.arguments()}


def choices(ranked: Mapping[str, Floats], wrong: Integers, count: int) -> dict[str, Integers]:
    """Return which samples each arm keeps; all but the first drop as many as are wrong."""
    everyone, drop = np.arange(count), len(wrong)
    draw = np.random.default_rng(0)
    arms = {NOTHING: everyone, RANDOM: np.sort(draw.permutation(count)[drop:])}
    for name, suspicion in ranked.items():
        order = np.argsort(-suspicion, kind="stable")
        arms[name] = np.sort(order[drop:])
    arms[EXACT] = np.setdiff1d(everyone, wrong)
    return arms


def _retrain(
    steps: Steps,
    data: str,
    run: Run,
    recipe: Recipe,
    sizes: Mapping[str, Any],
    arm: str,
    kept: Integers,
    labels: str,
    seed: int,
    parts: dict[str, Integers],
) -> Found:
    chosen = recipe
    if labels == TRUE:
        chosen = copy.copy(recipe)
        chosen.label_noise = 0.0  # type: ignore[attr-defined]
    name = "-".join((data, arm, labels, str(seed))).replace(", ", "-").replace(" ", "-")
    parameters = {**_parameters(chosen), "seed": seed, "kept": int(kept.sum()), "count": len(kept)}
    if arm == NOTHING and labels == KEPT and seed == recipe.seed:
        return steps.do(name, parameters, lambda: recorded(run, recipe, parts=parts, device=sizes["device"]))
    return steps.do(
        name, parameters, lambda: retrained(chosen, kept, seed=seed, parts=parts, device=sizes["device"])
    )
