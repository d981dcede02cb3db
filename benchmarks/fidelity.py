"""Fidelity: how well each method foretells what really happens when training samples are removed.

Tasks: digits with SGD in full, and with AdamW without and with clipping on several seeds (`digits_mlp`); clothes with LeNet-5,
which is not smooth (`clothes_lenet`); a small language model (`small_transformer`). Figures are linear datamodelling scores,
the rank correlation of predicted and real test losses over retrainings on random subsets, mean over the test samples.
Every task group has a result of its own: ``--size tasks=("adamw",)`` measures one, and with ``--keep DIR`` one that was broken
off goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.evaluate.evaluate import Questions, evaluate
from hydra_pipe.pipeline.run import run as drive
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.workers.recipe import Recipe

from .clothes_lenet import ClothesConstant, ClothesCosine
from .digits_mlp import DigitsAdamW, DigitsAdamWClipped, DigitsMLP
from .report import Result
from .small_transformer import SmallTransformer

SIZES: Mapping[str, Any] = {
    "tasks": ("digits", "adamw", "clothes", "transformer"),
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
    "clothes_rates": ("cosine", "constant rate"),
    "clothes_hessians": ("none", "ekfac", "exact", "gauss-newton", "mixed"),
    "clothes_ranks": (16,),
    "clothes_train_size": 3200,
    "clothes_test_size": 64,
    "transformer_hessians": ("none", "ekfac", "exact", "gauss-newton", "mixed"),
    "transformer_ranks": (16,),
    "transformer_train_size": 256,
    "transformer_test_size": 32,
    "less_smooth_methods": ("blend",),
    "less_smooth_subsets": 60,
    "less_smooth_fractions": (0.5, 0.9),
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
    "clothes_hessians": ("none", "ekfac"),
    "clothes_ranks": (),
    "clothes_train_size": 640,
    "clothes_test_size": 8,
    "transformer_hessians": ("none", "gauss-newton"),
    "transformer_ranks": (),
    "transformer_train_size": 96,
    "transformer_test_size": 8,
    "less_smooth_methods": (),
    "less_smooth_subsets": 6,
    "less_smooth_fractions": (0.9,),
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

CLOTHES: Mapping[str, type[ClothesConstant]] = {"cosine": ClothesCosine, "constant rate": ClothesConstant}
"""The recipe of clothes by its learning rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A recipe, the methods that are tried on it and the retrainings they are held against.

    Attributes:
        place: Folder of its run.
        recipe: The recipe.
        hessians: Forms of the Hessian.
        ranks: Of exact corrections on top of EKFAC.
        methods: Other estimators.
        subsets: Random subsets a share.
        fractions: Shares that are kept.
        prefix: Of its lines.
        goals: See `GOALS`.
    """

    place: str
    recipe: Recipe
    hessians: Sequence[str]
    ranks: Sequence[int]
    subsets: int
    fractions: Sequence[float]
    methods: Sequence[str] = ()
    prefix: str = ""
    goals: Goals | None = None


def run(sizes: Mapping[str, Any], folder: Path) -> Iterator[Result]:
    """Attribute with every method, retrain, and score; yield a result a group of tasks."""
    for group in sizes["tasks"]:
        result = Result(name="fidelity" if group == "digits" else f"fidelity_{group}", sizes=sizes)
        for task in TASKS[group](sizes):
            _measure(result, sizes, folder, task)
        yield result


def _digits(sizes: Mapping[str, Any]) -> Iterator[Task]:
    measured = _alike(sizes, "train_size", "epochs", "subsets", "test_size")
    yield Task(
        place="sgd",
        recipe=DigitsMLP(**{key: sizes[key] for key in ("train_size", "test_size", "epochs")}),
        hessians=sizes["hessians"],
        ranks=sizes["ranks"],
        subsets=sizes["subsets"],
        fractions=sizes["fractions"],
        goals=GOALS if measured else None,
    )


def _adamw(sizes: Mapping[str, Any]) -> Iterator[Task]:
    common = {key: sizes[key] for key in ("train_size", "epochs")}
    measured = _alike(sizes, "train_size", "epochs", "adamw_subsets", "adamw_test_size")
    for kind, name in ((DigitsAdamW, "AdamW"), (DigitsAdamWClipped, "AdamW, clipped")):
        for seed in sizes["adamw_seeds"]:
            yield Task(
                place=f"{kind.NAME}-{seed}",
                recipe=kind(test_size=sizes["adamw_test_size"], seed=seed, **common),
                hessians=sizes["adamw_hessians"],
                ranks=sizes["adamw_ranks"],
                subsets=sizes["adamw_subsets"],
                fractions=sizes["fractions"],
                prefix=f"{name}, seed {seed}: ",
                goals=ADAMW_GOALS if measured else None,
            )


def _clothes(sizes: Mapping[str, Any]) -> Iterator[Task]:
    for rate in sizes["clothes_rates"]:
        recipe = CLOTHES[rate](train_size=sizes["clothes_train_size"], test_size=sizes["clothes_test_size"])
        yield _less_smooth(sizes, "clothes", recipe, f"{rate}: ")


def _transformer(sizes: Mapping[str, Any]) -> Iterator[Task]:
    recipe = SmallTransformer(
        train_size=sizes["transformer_train_size"], test_size=sizes["transformer_test_size"]
    )
    yield _less_smooth(sizes, "transformer", recipe, "")


def _less_smooth(sizes: Mapping[str, Any], group: str, recipe: Recipe, prefix: str) -> Task:
    return Task(
        place=recipe.name,
        recipe=recipe,
        hessians=sizes[f"{group}_hessians"],
        ranks=sizes[f"{group}_ranks"],
        methods=sizes["less_smooth_methods"],
        subsets=sizes["less_smooth_subsets"],
        fractions=sizes["less_smooth_fractions"],
        prefix=prefix,
    )


TASKS = {"digits": _digits, "adamw": _adamw, "clothes": _clothes, "transformer": _transformer}
"""The groups of tasks."""


def _alike(sizes: Mapping[str, Any], *keys: str) -> bool:
    """Return whether these sizes are the full ones, whose goals are judged."""
    return all(sizes[key] == SIZES[key] for key in keys)


def _measure(result: Result, sizes: Mapping[str, Any], folder: Path, task: Task) -> None:
    place = str(folder / task.place / "run")
    forms: list[dict[str, Any]] = [{"hessian": hessian} for hessian in task.hessians]
    forms += [{"hessian": "ekfac", "exact_rank": rank} for rank in task.ranks]
    for form in forms:
        drive(
            RunSpec(
                recipe=task.recipe,
                out=place,
                executor="serial",
                device="cpu",
                mode="adjoint",
                threads=sizes["threads"],
                **form,
            )
        )
    if task.methods:
        attribute(place, {name: {} for name in task.methods}, task.recipe, executor="serial")
    found = evaluate(
        place,
        task.recipe,
        questions=Questions(
            subsets=task.subsets,
            fractions=tuple(task.fractions),
            retraining=sizes["retraining"],
            remove=(),
            perturb=(),
        ),
    )
    goals = task.goals or {}
    for row in found["lds"]:
        result.add(
            f"{task.prefix}{row['method']}, {100 * row['fraction']:g}% kept",
            [row["lds"]],
            "LDS",
            at_least=goals.get(row["method"], {}).get(row["fraction"]),
            note=f"95% interval {row['low']:.3f} to {row['high']:.3f}",
        )
    for method, spent in found["cost"].items():
        if spent is not None:
            result.add(f"{task.prefix}{method}, work of its own", [spent], "s")
    made = found["retrainings"]
    result.add(f"{task.prefix}one retraining", [made["seconds"] / max(1, made["stored"])], "s")
