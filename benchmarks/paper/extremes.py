"""HyDRA, Table 2 and supplement Tables 1 and 2: the training samples with the most extreme C(i), with pictures.

On right labels. Supplement Table 2 then asks which test samples the two most extreme ones move most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.training.training import Compute, Training

from hydra_pipe import Run

from .maps import COMMON, clean_run
from .outcome import Cell, Outcome, Table
from .steps import Steps
from .tasks import available, names, task

MOMENTS: Mapping[str, tuple[float, float]] = {
    "mnist": (-3.17e-9, 1.19e-6),
    "fashion-mnist": (-4.9858e-7, 1e-4),
    "cifar10": (-1.8676e-7, 3.206e-6),
}
"""Published mean and standard deviation of C(i) over the training samples."""
PUBLISHED = (
    ("mnist", "5", "5", 0.66, -1.0e-4),
    ("mnist", "8", "8", 0.73, 4.8e-5),
    ("fashion-mnist", "Coat", "Pullover", 0.66, 9.3e-4),
    ("cifar10", "deer", "deer", 0.97, -1.01e-5),
)
"""Published extremes: true and predicted label, confidence, C(i)."""

SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "table2": {
        "quick": {
            **COMMON,
            "data": {"digits": 120},
            "hessians": ("none",),
            "tests": {"digits": 100},
            "epochs": 2,
            "shown": 2,
            "moved": ("digits",),
        },
        "two-cores": {
            **COMMON,
            "data": {"fashion-mnist": 12_500, "digits": None},
            "hessians": ("none",),
            "tests": {"fashion-mnist": 2_000},
            "shown": 4,
            "moved": ("digits",),
        },
        "full": {
            **COMMON,
            "data": {"mnist": None, "fashion-mnist": None, "cifar10": None},
            "device": "auto",
            "shown": 4,
            "moved": ("mnist", "fashion-mnist", "cifar10"),
        },
    }
}


def confidences(run: Run, recipe: Recipe, dataset: Any, at: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the trained model's class probabilities for some samples, (n, classes)."""
    training = Training(recipe, Compute(device="cpu", threads=1))
    last = run.trajectory().checkpoint(-1)
    training.load_weights(last.weights, last.buffers)
    training.model.eval()
    with torch.no_grad():
        images = torch.stack([dataset[int(i)][0] for i in at])
        return training.model(images).double().softmax(1).numpy()


def experiment(name: str, sizes: Mapping[str, Any], steps: Steps, pictures: Path) -> Outcome:
    """List the extremes of each data set, and what they move."""
    outcome = Outcome(name=name, sizes=sizes)
    moments = outcome.table(
        "C(i) over all training samples, target = mean test loss",
        *("data, method", "mean", "standard deviation", "the paper: mean", "standard deviation"),
    )
    extremes = outcome.table(
        "most extreme training samples",
        *("data, method", "train_index", "place in the file", "label", "predicted", "confidence", "C(i)"),
    )
    moved = outcome.table(
        "test samples that the most harmful and the most helpful of them move most",
        *("data, method, train_index", "test_index", "label", "predicted", "confidence", "C(i, j)"),
    )
    for data, count in sizes["data"].items():
        if not available(data):
            outcome.notes.append(f"{data}: left out, its files are not there")
            continue
        for hessian in sizes["hessians"]:
            run, method = clean_run(steps, data, count, hessian, sizes)
            recipe = task(data, train_size=count, epochs=sizes["epochs"])
            value = run.samples(method)["contribution"].to_numpy()
            moments.rows.append(
                (
                    f"{data}, {method}",
                    float(value.mean()),
                    float(value.std()),
                    *MOMENTS.get(data, (None, None)),
                )
            )
            order = np.argsort(value, kind="stable")
            chosen = np.concatenate([order[: sizes["shown"]], order[-sizes["shown"] :][::-1]])
            probability = _extremes(extremes, f"{data}, {method}", run, recipe, chosen, value, names(data))
            path = pictures / f"paper-table2-{data}-{method}.png"
            _draw(recipe.train_dataset(), chosen, value, probability, names(data), path)
            outcome.pictures.append(path.name)
            if hessian == "none" and data in sizes["moved"]:
                _moved(moved, steps, data, recipe, sorted({int(chosen[0]), int(order[-1])}), sizes)
    for data, label, predicted, confidence, value in PUBLISHED:
        extremes.rows.append((f"the paper: {data}", None, None, label, predicted, confidence, value))
    moved.rows.append(("the paper: mnist, the harmful one", None, "6", "5", 0.78, -0.31))
    moved.rows.append(("the paper: mnist, the helpful one", None, "8", "3", 0.80, 0.091))
    outcome.notes.append(
        "C(i) divides by N: at another N another scale is expected; the paper does not say which samples of its extremes are which"
    )
    return outcome


def _extremes(
    table: Table, label: str, run: Run, recipe: Recipe, chosen: Any, value: Any, called: Sequence[str]
) -> npt.NDArray[np.float64]:
    dataset: Any = recipe.train_dataset()
    probability = confidences(run, recipe, dataset, chosen)
    for row, i in zip(probability, chosen.tolist(), strict=True):
        given, best = int(dataset.targets[i]), int(row.argmax())
        source = int(dataset.source_index[i])
        table.rows.append((label, i, source, called[given], called[best], float(row[best]), float(value[i])))
    return probability


def _moved(
    table: Table, steps: Steps, data: str, recipe: Recipe, tracked: list[int], sizes: Mapping[str, Any]
) -> None:
    """Follow the two most extreme samples forward and list the test samples that each moves most."""
    run, method = steps.attributed(
        f"{data}-extremes",
        recipe=recipe,
        track=tracked,
        test=sizes["tests"].get(data, "all"),
        device=sizes["device"],
    )
    found = run.contributions(method).to_table()
    dataset, called = recipe.test_dataset(), names(data)
    for i in tracked:
        rows = [row for row in found.to_pylist() if row["train_index"] == i]
        rows.sort(key=lambda row: -abs(row["contribution"]))
        at = [row["test_index"] for row in rows[:3]]
        for row, probability in zip(rows[:3], confidences(run, recipe, dataset, at), strict=True):
            best = int(probability.argmax())
            cells: tuple[Cell, ...] = (f"{data}, {method}, {i}", row["test_index"], called[row["test_label"]])
            table.rows.append((*cells, called[best], float(probability[best]), row["contribution"]))


def _draw(dataset: Any, chosen: Any, value: Any, probability: Any, called: Sequence[str], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    half = len(chosen) // 2
    figure, grid = plt.subplots(2, half, figsize=(1.7 * half, 4.4), layout="constrained", squeeze=False)
    for axis, i, row in zip(grid.ravel(), chosen.tolist(), probability, strict=True):
        image = dataset[i][0].numpy()
        axis.imshow(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2), cmap="gray")
        given, best = called[int(dataset.targets[i])], called[int(row.argmax())]
        axis.set_title(f"{given}\ntaken for {best}, {row.max():.2f}\nC = {value[i]:.2g}", fontsize=7)
        axis.set_axis_off()
    figure.text(-0.02, 0.73, "harmful", rotation=90, fontsize=8)
    figure.text(-0.02, 0.22, "helpful", rotation=90, fontsize=8)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
