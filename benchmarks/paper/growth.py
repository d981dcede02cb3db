"""HyDRA, supplement Figure 1: training time by tracked samples and by parameters.

A batch of B samples holds B x share tracked ones, so a few steps with the right share of each batch tracked cost
what a whole epoch costs a step. Candidates take turns; times are processor seconds of one thread. The rows that are
formed once at the end, tracked samples x parameters, are not part of it: at 10,000 tracked samples of MobileNetV2
they are 89 GB.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.recipes.mobilenet import MobileNetV2
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.training import Compute

from ..cases import Clothes, Photographs, Prefetched, record
from ..timing import median
from .outcome import Outcome
from .steps import Found, Steps

MODELS = ("LeNet-5", "DenseNet-40", "MobileNetV2")
COMMON: Mapping[str, Any] = {
    "tracked": (400, 2_000, 10_000),
    "of": 10_000,
    "batch": 64,
    "steps": {"LeNet-5": 40, "DenseNet-40": 2, "MobileNetV2": 1},
    "rounds": 2,
}
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "supplement-figure1": {
        "quick": {**COMMON, "batch": 8, "steps": {"LeNet-5": 2}, "rounds": 1},
        "two-cores": COMMON,
        "full": {**COMMON, "steps": {"LeNet-5": 157, "DenseNet-40": 157, "MobileNetV2": 157}},
    }
}


class Mobile(Photographs):
    """Photographs on MobileNetV2."""

    NAME = "mobile"

    def model(self) -> MobileNetV2:
        """Return the network."""
        return MobileNetV2(self.CLASSES)


def case(model: str, samples: int, batch: int) -> Recipe:
    """Return a training of one epoch; images are random where the files are missing."""
    kind = {"LeNet-5": Clothes, "DenseNet-40": Photographs, "MobileNetV2": Mobile}[model]
    return kind(train_size=samples, test_size=8, epochs=1, batch_size=batch)


def measure(model: str, count: int, sizes: Mapping[str, Any], folder: Path) -> Found:
    """Return seconds a step, plain and with each number of tracked samples, in turns."""
    samples = count * sizes["batch"]
    recipe, compute = case(model, samples, sizes["batch"]), Compute(threads=1, device="cpu")
    batches, trajectory = record(copy.copy(recipe), compute, folder)
    order = np.random.default_rng(0).permutation(samples)
    taken: dict[str, list[float]] = {}
    for turn in range(sizes["rounds"] + 1):
        training = Prefetched(recipe, compute, batches)
        begun = time.process_time()
        for step, batch in enumerate(batches):
            training.step(step, batch)
        spent = {"plain": time.process_time() - begun}
        for tracked in sizes["tracked"]:
            rows = np.sort(order[: max(1, round(samples * tracked / sizes["of"]))])
            replay = Replay(Prefetched(recipe, compute, batches), trajectory, rows, FastRows)
            begun = time.process_time()
            replay.run()
            spent[str(tracked)] = time.process_time() - begun
            replay.close()
        if turn:  # the first warms up
            for name, seconds in spent.items():
                taken.setdefault(name, []).append(seconds / count)
    parameters = sum(p.numel() for p in recipe.model().parameters())
    return {"seconds": taken, "parameters": parameters}


def experiment(name: str, sizes: Mapping[str, Any], steps: Steps, pictures: Path) -> Outcome:
    """Measure each network."""
    outcome = Outcome(name=name, sizes=sizes)
    tracked = [f"{count:,} tracked" for count in sizes["tracked"]]
    table = outcome.table(
        f"ms of one processor a step of {sizes['batch']}, of {sizes['of']:,} samples",
        *("network", "parameters", "plain", *tracked, "most / plain", "most / least"),
    )
    curves = {}
    for model, count in sizes["steps"].items():
        folder = steps.folder / model
        folder.mkdir(exist_ok=True)
        parameters = {key: sizes[key] for key in ("tracked", "of", "batch", "rounds")} | {"steps": count}
        found = steps.do(model, parameters, partial(measure, model, count, sizes, folder))
        middle = {key: 1000 * median(values) for key, values in found["seconds"].items()}
        times = [middle[str(count)] for count in sizes["tracked"]]
        table.rows.append(
            (
                *(model, f"{found['parameters']:,}", middle["plain"], *times),
                *(times[-1] / middle["plain"], times[-1] / times[0]),
            )
        )
        outcome.details[model] = found
        curves[f"{model} ({found['parameters']:,} parameters)"] = (middle["plain"], times)
    outcome.notes += [
        (
            "the paper shows a picture only and says that the time does not increase; a tracked visit is not free here, "
            "but its price is that of its own gradient, once an epoch"
        ),
        "random images stand in for CIFAR-10 where its files are missing: pixel values do not change what a step costs",
        "steps measured: " + ", ".join(f"{model} {count}" for model, count in sizes["steps"].items()),
    ]
    path = pictures / "paper-supplement-figure1.png"
    _draw(curves, sizes["tracked"], path)
    outcome.pictures.append(path.name)
    return outcome


def _draw(curves: Mapping[str, tuple[float, list[float]]], tracked: Any, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for k, (label, (plain, times)) in enumerate(curves.items()):
        axis.plot([0, *tracked], [plain, *times], marker="o", color=f"C{k}", label=label)
    axis.set(xlabel="tracked samples of 10,000 (0: plain training)", ylabel="ms a step of 64", yscale="log")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
