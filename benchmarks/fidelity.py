"""Fidelity: how well each method foretells what really happens when training samples are removed.

The tasks are those of `digits_mlp`: SGD in full, and AdamW without and with clipping on several seeds. Figures
are linear datamodelling scores, the rank correlation of predicted and real test losses over retrainings on
random subsets, mean over the test samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_pipe.pipeline.evaluate.evaluate import Questions, evaluate
from hydra_pipe.pipeline.run import run as drive
from hydra_pipe.pipeline.spec.spec import RunSpec

from .digits_mlp import DigitsAdamW, DigitsAdamWClipped, DigitsMLP
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
    "adamw_hessians": ("none", "ekfac", "exact"),
    "adamw_seeds": (0, 1),
    "adamw_ranks": (40,),
    "adamw_subsets": 60,
    "adamw_test_size": 80,
}
QUICK: Mapping[str, Any] = {
    **SIZES,
    "hessians": ("none", "exact"),
    "ranks": (),
    "subsets": 12,
    "fractions": (0.9,),
    "adamw_seeds": (0,),
    "adamw_ranks": (),
    "adamw_subsets": 12,
}

GOALS = {
    "hydra-exact": {0.5: 0.88, 0.9: 0.97, 0.99: 0.98},
    "hydra-ekfac": {0.5: 0.80, 0.9: 0.75, 0.99: 0.64},
}
"""Least score of a method by the share that is kept, at the full sizes."""

ADAMW_GOALS = {
    "hydra-exact": {0.5: 0.95, 0.9: 0.985, 0.99: 0.99},
    "hydra-ekfac": {0.5: 0.90, 0.9: 0.92, 0.99: 0.88},
    "hydra-ekfac-rank40": {0.5: 0.94, 0.9: 0.97, 0.99: 0.96},
}
"""The same for the tasks with AdamW."""

Goals = Mapping[str, Mapping[float, float]]


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Attribute with every method, retrain, and score."""
    result = Result(name="fidelity", sizes=sizes)
    common = {key: sizes[key] for key in ("train_size", "epochs")}
    full = all(sizes[key] == SIZES[key] for key in common)
    measured = full and all(sizes[key] == SIZES[key] for key in ("subsets", "test_size"))
    recipe = DigitsMLP(test_size=sizes["test_size"], **common)
    _task(result, sizes, folder / "sgd", recipe, "", GOALS if measured else {})
    small = {
        **sizes,
        "hessians": sizes["adamw_hessians"],
        "ranks": sizes["adamw_ranks"],
        "subsets": sizes["adamw_subsets"],
    }
    measured = full and all(sizes[key] == SIZES[key] for key in ("adamw_subsets", "adamw_test_size"))
    for kind, name in ((DigitsAdamW, "AdamW"), (DigitsAdamWClipped, "AdamW, clipped")):
        for seed in sizes["adamw_seeds"]:
            recipe = kind(test_size=sizes["adamw_test_size"], seed=seed, **common)
            place = folder / f"{kind.NAME}-{seed}"
            _task(result, small, place, recipe, f"{name}, seed {seed}: ", ADAMW_GOALS if measured else {})
    return result


def _task(
    result: Result, sizes: Mapping[str, Any], folder: Path, recipe: DigitsMLP, prefix: str, goals: Goals
) -> None:
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
    for row in found["lds"]:
        result.add(
            f"{prefix}{row['method']}, {100 * row['fraction']:g}% kept",
            [row["lds"]],
            "LDS",
            at_least=goals.get(row["method"], {}).get(row["fraction"]),
            note=f"95% interval {row['low']:.3f} to {row['high']:.3f}",
        )
    for method, spent in found["cost"].items():
        if spent is not None:
            result.add(f"{prefix}{method}, work of its own", [spent], "s")
    made = found["retrainings"]
    result.add(f"{prefix}one retraining", [made["seconds"] / max(1, made["stored"])], "s")
