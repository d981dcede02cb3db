"""The paper's Figures 3, 4 and 5: what dropping the Hessian costs, epoch by epoch, beside influence functions.

LeNet-5 on Fashion-MNIST with the paper's settings: batch 64, learning rate 0.01 halved on plateaus of two
epochs, momentum 0.9, weight decay 1/N (with N = 50,000 that is the paper's 2e-5). Followed twice: with the
optimiser's decay in the recursion, and with N times it, as the first published code had it.

The paper's own sizes (weeks on two cores):

    python -m benchmarks approximation --size samples=50000 --size "track='1%'" --size epochs=200 \\
        --size every=4 --size influence_from=100 --size tests=10000
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_pipe.pipeline.compare.by_epoch import Course, by_epoch
from hydra_pipe.pipeline.compare.curves import training_figures
from hydra_pipe.pipeline.run import run as drive
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.workers.recipes.data_images import first
from hydra_pipe.workers.recipes.mnist import FashionMnist

from .cases import Clothes
from .report import Result

SIZES: Mapping[str, Any] = {
    "samples": 1280,
    "track": "2.5%",
    "tests": 100,
    "epochs": 40,
    "every": 2,
    "influence_from": 20,
    "methods": None,
    "ekfac": True,
    "damping": 3.0,
    "scale": 200.0,
    "depth": 1000,
    "repeats": 1,
    "executor": "ray",
    "workers": 2,
    "figures": "benchmarks/results",
}
QUICK: Mapping[str, Any] = {
    **SIZES,
    "samples": 128,
    "track": 6,
    "tests": 8,
    "epochs": 2,
    "every": 1,
    "influence_from": 2,
    "depth": 5,
    "executor": "serial",
    "figures": "",
}


class Shortened(Clothes):
    """Fashion-MNIST with the paper's schedule; a fifth as many validation as training samples, as there."""

    NAME = "shortened-fashion-mnist"

    def scheduler(self, optimizer: Any) -> Any:
        """Return the schedule that halves the learning rate on plateaus."""
        return FashionMnist.scheduler(self, optimizer)

    def validation_dataset(self) -> Any:
        """Return the first N / 5 samples of the validation part."""
        part = self._part("validation")
        count = min(len(part), max(1, (self.train_size or 50_000) // 5))
        return self._dataset(first(part, count, "validation size"), training=False)


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Record, follow, draw."""
    result = Result(name="approximation", sizes=sizes)
    count = sizes["samples"]
    recipe = Shortened(
        train_size=count, test_size=sizes["tests"], epochs=sizes["epochs"], weight_decay=1 / count
    )
    place = str(folder / "run")
    given = {"executor": sizes["executor"], "workers": sizes["workers"], "address": "local"}
    spec = {"recipe": recipe, "out": place, "track": sizes["track"], "device": "cpu", **given}
    if sizes["ekfac"]:
        drive(RunSpec(**spec, hessian="ekfac"))
    else:
        drive(RunSpec(**spec), stages=("record",))
    lissa = {key: sizes[key] for key in ("damping", "scale", "depth", "repeats")}
    course = Course(
        every=sizes["every"],
        influence_from=sizes["influence_from"],
        methods=sizes["methods"],
        options={"influence-lissa": lissa}
        if not sizes["methods"] or "influence-lissa" in sizes["methods"]
        else {},
        raw_decay=True,
    )
    found = by_epoch(place, course, recipe, **given)
    for row in found["late"]:
        pair = f"{row['method']} against {row['reference']}"
        if row["error"] is not None:
            relative = f"{row['relative_error']:.3g} of the reference's norm"
            result.add(f"{pair}: error of the hypergradients", [row["error"]], "", note=relative)
        for key, what in (("sign_error", "wrong signs of C(i)"), ("spearman", "Spearman of C(i)")):
            note = f"± {row[f'{key}_std']:.3f} over {row['epochs']} epochs"
            result.add(f"{pair}: {what}", [row[key]], "", note=note)
    for stage, seconds in found["seconds"].items():
        result.add(f"{stage}, work", [seconds], "s")
    if sizes["figures"]:
        training_figures(found, sizes["figures"])
    return result
