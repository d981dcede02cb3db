"""How deep each ranking has the 18 wrong labels of Fashion-MNIST that others have listed.

Positions in the training file, from Müller and Markert (arXiv 1912.05283) and the data set's issue 166. They lie among
others at random, which have errors of their own: a ranking that puts those first is not wrong, so the places are
pessimistic.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipes.data_idx import FILES, missing_files, read_images
from hydra_pipe.workers.recipes.data_images import LabelledImages
from hydra_pipe.workers.recipes.data_place import data_directory
from hydra_pipe.workers.recipes.image import Part
from hydra_pipe.workers.recipes.mnist import FashionMnist

from .outcome import Outcome
from .rankings import every, suspicions
from .steps import Steps

WRONG = (
    *(45592, 16691, 28264, 33982, 40513, 42018, 29599, 37286, 36049),
    *(9059, 1600, 34381, 22750, 39620, 38208, 53257, 22264, 3415),
)
SHARES = (0.05, 0.1, 0.2)
MEDIAN, DEPTH = 30, 0.2
"""Goal: a ranking with all of them in the first `DEPTH`, and their median place at most `MEDIAN`."""
COMMON: Mapping[str, Any] = {
    "samples": 6_000,
    "epochs": 8,
    "tests": 500,
    "seeds": 1,
    "by": None,
    "device": "cpu",
}
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "found": {
        "quick": {**COMMON, "samples": 128, "epochs": 2, "tests": 30, "by": ("margin", "loss", "knn")},
        "two-cores": COMMON,
        "full": {**COMMON, "samples": 60_000, "tests": 1_000, "seeds": 5, "device": "auto"},
    }
}


class Listed(FashionMnist):
    """Fashion-MNIST, the listed samples first, then others at random; a constant learning rate, no decay.

    ``train_size`` counts all. The training part is cut from all 60,000 images of the file.
    """

    weight_decay: float = 0.0
    SEED: ClassVar[int] = 0

    def _part(self, part: Part) -> LabelledImages:
        whole = _whole(part != "test", self.data_dir)
        if part == "test":
            return whole
        others = np.setdiff1d(np.arange(len(whole)), WRONG)
        others = np.random.RandomState(self.SEED).permutation(others)
        return whole.take(np.concatenate([np.asarray(WRONG), others]).astype(np.int64))

    def scheduler(self, optimizer: Any) -> None:  # type: ignore[override]
        """Return no schedule."""

    def validation_dataset(self) -> None:  # type: ignore[override]
        """Return no validation samples."""


@cache
def _whole(train: bool, data_dir: str | None) -> LabelledImages:
    place = data_directory(
        "fashion-mnist",
        data_dir,
        files=FILES,
        missing=missing_files,
        usual=FashionMnist.USUAL_PLACES,
        source=FashionMnist.SOURCE,
    )
    return read_images(place, train=train)


def experiment(name: str, sizes: Mapping[str, Any], steps: Steps, pictures: Path) -> Outcome:
    """Train, rank by everything, and look where the listed samples are."""
    outcome = Outcome(name=name, sizes=sizes)
    total, known = sizes["samples"], len(WRONG)
    table = outcome.table(
        f"places of {known} known wrong labels among {total:,} samples, most suspicious first",
        *("ranking", "median", "last", "found in the first 5 / 10 / 20%", "goal"),
    )
    recipe = Listed(train_size=total, epochs=sizes["epochs"])
    try:
        recipe.train_dataset()
    except RecipeError as error:
        outcome.notes.append(f"not run: {error}")
        return outcome
    places: dict[str, list[np.ndarray]] = {}
    for seed in range(sizes["seeds"]):
        recipe = Listed(train_size=total, epochs=sizes["epochs"], seed=seed)
        run, method = steps.attributed(
            f"seed-{seed}", recipe=recipe, test=sizes["tests"], device=sizes["device"]
        )
        names = list(sizes["by"] or every())
        kept = steps.do(
            f"rankings-{seed}",
            {"recipe": dict(recipe.arguments()), "method": method, "by": names, "tests": sizes["tests"]},
            partial(suspicions, run, recipe, names, method=method),
        )
        for by in names:
            rank = np.empty(total, dtype=np.int64)
            rank[np.argsort(-kept[by], kind="stable")] = np.arange(1, total + 1)
            places.setdefault(by, []).append(rank[:known])
    met = []
    for by, found in places.items():
        middle = float(np.median([np.median(ranks) for ranks in found]))
        last = float(np.median([ranks.max() for ranks in found]))
        inside = [np.mean([(ranks <= share * total).sum() for ranks in found]) for share in SHARES]
        reached = middle <= MEDIAN and last <= DEPTH * total
        met += [by] if reached else []
        text = " / ".join(f"{value:.3g}" for value in inside)
        table.rows.append((by, f"{middle:.4g}", f"{last:.4g}", text, "met" if reached else "no"))
        outcome.details[by] = [ranks.tolist() for ranks in found]
    outcome.details["train-images"] = list(WRONG)
    outcome.notes.append(
        f"goal: all {known} in the first {100 * DEPTH:.0f}% and a median place of at most {MEDIAN}: "
        + (f"met by {', '.join(met)}" if met else "met by none")
    )
    outcome.notes.append(f"{sizes['seeds']} training seed(s); medians and means over them")
    return outcome
