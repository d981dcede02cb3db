"""Outlier gradient analysis (arXiv 2405.03869): half moons, and wrong labels on digits and Fashion-MNIST.

Its rankings (l1, l2, iforest on the last layer's gradients) stand beside every other one of the product. A share of the
samples is trimmed, the rest is trained on from scratch, and the accuracy of the last epoch on test samples that no
ranking has seen is reported, over several seeds of data, wrong labels and training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from hydra_pipe.workers.recipe import Batch, Recipe
from hydra_pipe.workers.recipes.digits import Digits
from torch import Tensor, nn

from .outcome import Outcome, spread
from .rankings import every, suspicions
from .steps import Found, Steps
from .tasks import NOISE, Integers, OfThePaper, PaperClothes, available, retrained

Booleans = npt.NDArray[np.bool_]

PUBLISHED_MOONS = (
    ("the paper: untrimmed", "–", "90"),
    ("the paper: margin, self-confidence, confidence entropy", "82", "89"),
    ("the paper: exact Hessian", "90", "90"),
    ("the paper: gradient tracing, LiSSA, DataInf", "82", "91"),
    ("the paper: Self-LiSSA", "82", "90"),
    ("the paper: Self-DataInf", "90", "87"),
    ("the paper: outlier gradient, iforest", "96", "96"),
    ("the paper: outlier gradient, l1 and l2", "98", "87"),
)
OTHERS = ("nothing", "at random", "exactly the wrong ones")
"""Arms beside the rankings."""

COMMON: Mapping[str, Any] = {
    "moons": 5,
    "data": {"digits": 5, "fashion-mnist": 1},
    "shares": (0.1, 0.2, 0.4),
    "samples": {"digits": None, "fashion-mnist": 2_000},
    "epochs": {"digits": 20, "fashion-mnist": 8, "moons": 50},
    "selecting": {"digits": 180, "fashion-mnist": 300},
    "tests": {"digits": 360, "fashion-mnist": 3_000},
    "by": None,
    "retrain": (
        *("outlier-gradient l1", "outlier-gradient l2", "outlier-gradient iforest"),
        *("margin", "joint"),
    ),
    "retrain_seeds": {"moons": 3, "digits": 3, "fashion-mnist": 0},
    "trim": None,
    "device": "cpu",
}
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "outliers": {
        "quick": {
            **COMMON,
            "moons": 1,
            "data": {"digits": 1},
            "shares": (0.2,),
            "samples": {"digits": 120},
            "epochs": {"digits": 2, "moons": 3},
            "selecting": {"digits": 30},
            "tests": {"digits": 60},
            "by": ("margin", "outlier-gradient l2"),
        },
        "two-cores": COMMON,
        "full": {
            **COMMON,
            "data": {"digits": 5, "fashion-mnist": 5},
            "retrain": None,
            "retrain_seeds": {"moons": 5, "digits": 5, "fashion-mnist": 5},
            "samples": {"digits": None, "fashion-mnist": None},
            "epochs": {"digits": 60, "fashion-mnist": 20, "moons": 100},
            "tests": {"digits": 360, "fashion-mnist": 10_000},
            "trim": 0.05,
            "device": "auto",
        },
    }
}


class Moons(Recipe):
    """Two half moons: 250 samples of which 20 have the other label, and a small network.

    The paper says no more than that. Here: noise 0.2, 2-64-64-2 units with ReLU, batches of 32, learning rate 0.05 with
    momentum 0.9. The first 250 test samples select, the other 1,000 judge.
    """

    NAME = "moons"
    SAMPLES, FLIPPED, TESTS, SELECTING = 250, 20, 1_250, 250

    batch_size = 32

    def __init__(self, *, epochs: int = 100, seed: int = 0) -> None:
        """Take the epochs, and the seed of data, wrong labels and training."""
        self.epochs, self.seed = epochs, seed
        self.data_seed = seed

    def arguments(self) -> Mapping[str, Any]:
        """Return what distinguishes this training."""
        return {"epochs": self.epochs, "seed": self.seed, "data_seed": self.data_seed}

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def _points(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import make_moons

        points, labels = make_moons(count, noise=0.2, random_state=seed)
        return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))

    def _flipped(self) -> Tensor:
        chosen = np.random.RandomState(self.data_seed).permutation(self.SAMPLES)[: self.FLIPPED]
        return torch.from_numpy(np.sort(chosen))

    def train_dataset(self) -> Any:
        """Return the points, some with the other label."""
        points, labels = self._points(self.SAMPLES, 2 * self.data_seed)
        labels[self._flipped()] = 1 - labels[self._flipped()]
        return torch.utils.data.TensorDataset(points, labels)

    def test_dataset(self) -> Any:
        """Return points with right labels."""
        return torch.utils.data.TensorDataset(*self._points(self.TESTS, 2 * self.data_seed + 1))

    def noisy_labels(self, dataset: Any) -> tuple[Any, Any]:
        """Return the flipped samples and their right labels."""
        flipped = self._flipped()
        return flipped.numpy(), (1 - dataset.tensors[1][flipped]).numpy()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of each sample."""
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class SmallDigits(OfThePaper, Digits):
    """Digits on a network of 64-64-10 units, wrong labels drawn class by class."""

    CLASSES: ClassVar[int] = 10
    weight_decay: float = 0.0

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def validation_dataset(self) -> None:  # type: ignore[override]
        """Return no validation samples."""


KINDS: Mapping[str, type[OfThePaper]] = {"digits": SmallDigits, "fashion-mnist": PaperClothes}


def experiment(name: str, sizes: Mapping[str, Any], steps: Steps, pictures: Path) -> Outcome:
    """Half moons, then each data set at each share of wrong labels."""
    outcome = Outcome(name=name, sizes=sizes)
    if sizes["moons"]:
        _moons(outcome, sizes, steps)
    for data, seeds in sizes["data"].items():
        if not available(data):
            outcome.notes.append(f"{data}: left out, its files are not there")
            continue
        for share in sizes["shares"]:
            _noise(outcome, data, share, seeds, sizes, steps)
    trim = "as many as are wrong" if sizes["trim"] is None else f"{100 * sizes['trim']:g}%"
    outcome.notes.append(
        f"trimmed: {trim} (the paper: 5% whatever the share of wrong labels); mean ± standard deviation over the seeds, "
        "each with wrong labels, initial weights and batch order of its own; trained again on the first "
        + ", ".join(f"{count} ({data})" for data, count in sizes["retrain_seeds"].items())
    )
    return outcome


def _moons(outcome: Outcome, sizes: Mapping[str, Any], steps: Steps) -> None:
    cut = round(0.1 * Moons.SAMPLES)
    table = outcome.table(
        f"half moons, {Moons.SAMPLES} samples, {Moons.FLIPPED} flipped, {cut} trimmed",
        *("ranking", "detection accuracy, %", "test accuracy, %", "AUROC"),
    )
    recipes = [Moons(epochs=sizes["epochs"]["moons"], seed=seed) for seed in range(sizes["moons"])]
    found = _judged(steps, "moons", "moons", recipes, Moons.SELECTING, Moons.TESTS, cut, sizes)
    for arm, rows in found.items():
        cells = [
            spread([row[key] for row in rows if key in row], scale) if key in rows[0] else None
            for key, scale in (("detection", 100), ("rest", 100), ("auroc", 1))
        ]
        table.rows.append((arm, *cells))
    table.rows += [(*row, None) for row in PUBLISHED_MOONS]
    outcome.details["moons"] = found
    outcome.notes.append(
        "half moons: noise of the points, network and optimiser are not stated in the paper; detection accuracy counts "
        f"samples that are rightly trimmed or kept, of {Moons.SAMPLES}: at most {100 * (1 - (cut - Moons.FLIPPED) / Moons.SAMPLES):g}%"
    )


def _noise(
    outcome: Outcome, data: str, share: float, seeds: int, sizes: Mapping[str, Any], steps: Steps
) -> None:
    made = {
        "label_noise": share,
        "noise_kind": NOISE,
        "train_size": sizes["samples"][data],
        "epochs": sizes["epochs"][data],
    }
    recipes = [KINDS[data](**made, seed=seed, noise_seed=seed) for seed in range(seeds)]
    count = len(recipes[0].train_dataset())
    found = _judged(
        steps,
        data,
        f"{data}-{share:g}",
        recipes,
        sizes["selecting"][data],
        sizes["tests"][data],
        None if sizes["trim"] is None else round(sizes["trim"] * count),
        sizes,
    )
    table = outcome.table(
        f"{data}, {count:,} samples, {100 * share:g}% wrong, {seeds} seeds",
        *(
            "ranking",
            "AUROC",
            "average precision",
            "precision at the true number",
            "accuracy after trimming, %",
        ),
    )
    for arm, rows in found.items():
        cells = [
            spread([row[key] for row in rows]) if key in rows[0] else None
            for key in ("auroc", "average_precision", "precision")
        ]
        accuracy = spread([row["rest"] for row in rows if "rest" in row], 100) if "rest" in rows[0] else None
        table.rows.append((arm, *cells, accuracy))
    outcome.details[f"{data}, {share:g}"] = found


def _judged(
    steps: Steps,
    data: str,
    name: str,
    recipes: Sequence[Any],
    selecting: int,
    tests: int,
    cut: int | None,
    sizes: Mapping[str, Any],
) -> dict[str, list[Found]]:
    """Return what became of each arm, one value a seed: how well it detects, and the accuracy after trimming."""
    found: dict[str, list[Found]] = {}
    parts = {"rest": np.arange(selecting, tests)}
    for seed, recipe in enumerate(recipes):
        run, method = steps.attributed(
            f"{name}-seed-{seed}", recipe=recipe, test=f"0:{selecting}", device=sizes["device"]
        )
        noisy = run.noisy()
        assert noisy is not None
        count = len(run.samples(method))
        wrong = np.isin(np.arange(count), noisy[0])
        drop = int(wrong.sum()) if cut is None else cut
        names = list(sizes["by"] or every())
        known = {"recipe": {"name": recipe.name, **recipe.arguments()}, "selecting": selecting}
        ranked = steps.do(
            f"{name}-rankings-{seed}",
            {**known, "by": names},
            partial(suspicions, run, recipe, names, method=method),
        )
        for arm in (*OTHERS[:2], *names, OTHERS[2]):
            dropped = _dropped(arm, ranked, wrong, drop, recipe.seed)
            one = measures(ranked[arm], dropped, wrong) if arm in ranked else Found()
            asked = sizes["retrain"] is None or arm in OTHERS or arm in sizes["retrain"]
            if asked and seed < sizes["retrain_seeds"][data]:
                kept = np.setdiff1d(np.arange(count), dropped)
                one |= steps.do(
                    f"{name}-{arm}-{seed}".replace(" ", "-"),
                    {**known, "tests": tests, "kept": int(kept.sum()), "count": len(kept)},
                    partial(retrained, recipe, kept, seed=recipe.seed, parts=parts, device=sizes["device"]),
                )
            found.setdefault(arm, []).append(one)
    return found


def _dropped(arm: str, ranked: Found, wrong: Booleans, drop: int, seed: int) -> Integers:
    """Return what an arm drops."""
    if arm == OTHERS[0]:
        return np.empty(0, dtype=np.int64)
    if arm == OTHERS[1]:
        return np.random.default_rng(seed).permutation(len(wrong))[:drop]
    if arm == OTHERS[2]:
        return np.flatnonzero(wrong)
    return np.argsort(-ranked[arm], kind="stable")[:drop]


def measures(suspicion: npt.NDArray[np.float64], dropped: Integers, wrong: Booleans) -> Found:
    """Return how well a ranking detects: AUROC, average precision, precision at the true number, and accuracy."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    finite = np.nan_to_num(suspicion, neginf=np.finfo(np.float64).min, posinf=np.finfo(np.float64).max)
    first = np.argsort(-suspicion, kind="stable")[: int(wrong.sum())]
    return {
        "auroc": float(roc_auc_score(wrong, finite)),
        "average_precision": float(average_precision_score(wrong, finite)),
        "precision": float(wrong[first].mean()),
        "detection": float((np.isin(np.arange(len(wrong)), dropped) == wrong).mean()),
    }
