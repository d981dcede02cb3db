"""Detectors of wrong labels side by side: every ``--by`` on four tasks with labels that are wrong on purpose.

Digits (1,437 samples, 64-64-10 units, 60 epochs of 64, rate 0.05, momentum 0.9) with 10 and 40% wrong labels of any
class and 20% of the next class, and 2,000 samples of Fashion-MNIST (LeNet-5, 5 epochs: not trained enough). Figures
are AUROC and average precision, medians over the seeds. Nearest neighbours on raw pixels, which no ``--by`` is, are
measured beside them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from hydra_pipe.pipeline.decide.detect import detect
from hydra_pipe.pipeline.run import run as drive
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.workers.recipes.data_images import LabelledImages
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.recipes.image import Part
from hydra_pipe.workers.recipes.mnist import FashionMnist
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

from .report import Result
from .timing import median

TASKS = {
    "digits, symmetric 10%": ("digits", "symmetric", 0.1),
    "digits, symmetric 40%": ("digits", "symmetric", 0.4),
    "digits, pairflip 20%": ("digits", "pairflip", 0.2),
    "Fashion, symmetric 10%": ("fashion", "symmetric", 0.1),
}
SIZES: Mapping[str, Any] = {
    "tasks": tuple(TASKS),
    "seeds": (0, 1, 2, 3, 4),
    "epochs": None,
    "train_size": None,
    "test_size": None,
    "hessian": "none",
    "threads": 1,
}
QUICK: Mapping[str, Any] = {
    **SIZES,
    "tasks": ("digits, symmetric 10%",),
    "seeds": (0,),
    "epochs": 2,
    "train_size": 200,
    "test_size": 40,
}

JOINT, PIXELS = "joint", "knn on raw pixels (no --by)"
WITHIN = 0.005
"""How far the default may be below the best detector of any task."""


class Figures(Digits):
    """Digits on a small network, long trained."""

    NAME = "figures"
    epochs, batch_size = 60, 64
    lr, momentum, weight_decay = 0.05, 0.9, 0.0

    def model(self) -> nn.Module:
        """Return the network of 64-64-10 units."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Garments(FashionMnist):
    """2,000 samples of Fashion-MNIST, drawn by the seed, on LeNet-5 for five epochs at a constant rate."""

    NAME = "garments"
    SAMPLES: ClassVar[int] = 2000
    epochs, batch_size = 5, 64
    test_size = 500

    def _part(self, part: Part) -> LabelledImages:
        found = super()._part(part)
        if part != "train":
            return found
        order = np.random.RandomState(1000 + self.noise_seed).permutation(len(found))
        return found.take(order[: self.SAMPLES])

    def scheduler(self, optimizer: Any) -> None:
        """Return no schedule."""

    def validation_dataset(self) -> None:
        """Return no validation samples."""


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Train with wrong labels, rank by every detector, and measure the rankings."""
    result = Result(name="detectors", sizes=sizes)
    for task in sizes["tasks"]:
        data, kind, share = TASKS[task]
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for seed in sizes["seeds"]:
            made = {
                "noise_kind": kind,
                "label_noise": share,
                "noise_seed": seed,
                "seed": seed,
                "epochs": sizes["epochs"],
                "train_size": sizes["train_size"],
                "test_size": sizes["test_size"],
            }
            recipe = Figures(**made) if data == "digits" else Garments(**made)
            place = str(folder / f"{data}-{kind}-{share}-{seed}")
            spec = RunSpec(
                recipe=recipe,
                out=place,
                executor="serial",
                device="cpu",
                hessian=sizes["hessian"],
                threads=sizes["threads"],
            )
            drive(spec)
            for detection in detect(place, recipe, by="all"):
                measures = detection.values.measures or {}
                for name in ("auroc", "average_precision"):
                    found[detection.values.by][name].append(_value(measures[name]))
            for name, value in _pixels(recipe).items():
                found[PIXELS][name].append(value)
        _add(result, task, found)
    return result


def _value(measure: Any) -> float:
    return float(measure["value"] if isinstance(measure, Mapping) else measure)


def _add(result: Result, task: str, found: Mapping[str, Mapping[str, list[float]]]) -> None:
    middle = {by: median(values["auroc"]) for by, values in found.items()}
    best = max(value for by, value in middle.items() if by != JOINT)
    for by, values in sorted(found.items(), key=lambda item: -middle[item[0]]):
        least = best - WITHIN if by == JOINT else None
        result.add(
            f"{task}: {by}",
            values["auroc"],
            "AUROC",
            at_least=least,
            note=f"mean {np.mean(values['auroc']):.4f}; average precision {median(values['average_precision']):.3f}",
        )


def _pixels(recipe: Figures | Garments) -> dict[str, float]:
    """Return how well the labels of ten nearest neighbours among raw pixels rank."""
    data: Any = recipe.train_dataset()
    images = np.stack([np.asarray(data[i][0]).reshape(-1) for i in range(len(data))])
    labels, indices = np.asarray(data.targets), recipe.noisy_labels(data)
    assert indices is not None
    wrong = np.isin(np.arange(len(labels)), indices[0])
    spread = images.std(0)
    near = NearestNeighbors(n_neighbors=11, metric="cosine").fit((images - images.mean(0)) / (spread + 1e-9))
    unlike = (labels[near.kneighbors(return_distance=False)[:, :10]] != labels[:, None]).mean(1)
    return {
        "auroc": float(roc_auc_score(wrong, unlike)),
        "average_precision": float(average_precision_score(wrong, unlike)),
    }
