"""Fidelity: how well each method foretells what really happens when training samples are removed.

The task is `digits_mlp.DigitsMLP`. Figures are linear datamodelling scores, the rank correlation of
predicted and real test losses over retrainings on random subsets, mean over the test samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_pipe.pipeline.evaluate.evaluate import Questions, evaluate
from hydra_pipe.pipeline.run import run as drive
from hydra_pipe.pipeline.spec.spec import RunSpec

from .digits_mlp import DigitsMLP
from .report import Result

SIZES: Mapping[str, Any] = {
    "hessians": ("none", "ekfac", "exact"),
    "ranks": (5, 10, 20, 40, 80, 160),
    "subsets": 120,
    "fractions": (0.5, 0.9, 0.99),
    "train_size": 1000,
    "test_size": 200,
    "epochs": 15,
    "retraining": "rescaled",
    "threads": 1,
}
QUICK: Mapping[str, Any] = {
    **SIZES,
    "hessians": ("none", "exact"),
    "ranks": (),
    "subsets": 12,
    "fractions": (0.9,),
}

GOALS = {
    "hydra-exact": {0.5: 0.88, 0.9: 0.97, 0.99: 0.98},
    "hydra-ekfac": {0.5: 0.80, 0.9: 0.75, 0.99: 0.64},
}
"""Least score of a method by the share that is kept, at the full sizes."""


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Attribute with every method, retrain, and score."""
    result = Result(name="fidelity", sizes=sizes)
    recipe = DigitsMLP(train_size=sizes["train_size"], test_size=sizes["test_size"], epochs=sizes["epochs"])
    place = str(folder / "run")
    forms: list[dict[str, Any]] = [{"hessian": hessian} for hessian in sizes["hessians"]]
    forms += [{"hessian": "ekfac", "exact_rank": rank} for rank in sizes["ranks"]]
    for form in forms:
        drive(
            RunSpec(
                recipe=recipe,
                out=place,
                executor="serial",
                device="cpu",
                mode="adjoint",
                threads=sizes["threads"],
                **form,
            )
        )
    found = evaluate(
        place,
        recipe,
        questions=Questions(
            subsets=sizes["subsets"],
            fractions=tuple(sizes["fractions"]),
            retraining=sizes["retraining"],
            remove=(),
            perturb=(),
        ),
    )
    full = all(sizes[key] == SIZES[key] for key in ("subsets", "train_size", "test_size", "epochs"))
    for row in found["lds"]:
        goal = GOALS.get(row["method"], {}).get(row["fraction"]) if full else None
        result.add(
            f"{row['method']}, {100 * row['fraction']:g}% kept",
            [row["lds"]],
            "LDS",
            at_least=goal,
            note=f"95% interval {row['low']:.3f} to {row['high']:.3f}",
        )
    for method, spent in found["cost"].items():
        if spent is not None:
            result.add(f"{method}, work of its own", [spent], "s")
    made = found["retrainings"]
    result.add("one retraining", [made["seconds"] / max(1, made["stored"])], "s")
    return result
