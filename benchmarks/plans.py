"""Plans: what ``plan`` says of seconds, bytes and memory for every form, against the run that follows.

Each form is planned and run twice in a process of its own; the second run is measured, since a process does much for the first
time that is no part of any stage. Bytes are said before compression. The largest resident set is of the whole process, which does
all stages and both runs, where ``memory`` measures one stage in a fresh one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .memory import FACTOR, from_worker
from .report import Result

MEAN: Mapping[str, Any] = {"hessian": "exact", "mode": "adjoint", "targets": "mean"}

FORMS: Mapping[str, Mapping[str, Any]] = {
    "fast": {},
    "fast, adjoint": {"mode": "adjoint"},
    "fast, adjoint, 16 test samples": {"mode": "adjoint", "test": "16"},
    "EKFAC": {"hessian": "ekfac"},
    "EKFAC, adjoint": {"hessian": "ekfac", "mode": "adjoint"},
    "EKFAC, adjoint, rank 4": {"hessian": "ekfac", "mode": "adjoint", "exact_rank": 4},
    "exact, adjoint, the mean": MEAN,
    "exact, adjoint, the mean, weights read": {**MEAN, "checkpoint_every": 1},
    "exact, adjoint, classes": {**MEAN, "targets": "classes"},
    "exact, 32 tracked": {"hessian": "exact", "track": "32"},
    "fast, 4 segments": {"segments": 4},
    "fast, bfloat16": {"store_dtype": "bfloat16"},
    "fast, projected to 2,048": {"project": 2048},
    "fast, weights alone": {"layers": ("*.weight",)},
}

SIZES: Mapping[str, Any] = {"forms": tuple(FORMS), "samples": 3200, "epochs": 2, "threads": 1}
QUICK: Mapping[str, Any] = {**SIZES, "forms": ("exact, adjoint, the mean",), "samples": 256, "epochs": 1}


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Plan and run each form; compare."""
    result = Result(name="plans", sizes=sizes)
    for number, form in enumerate(sizes["forms"]):
        given = {
            "recipe": "clothes",
            "samples": sizes["samples"],
            "shards": 1,
            "epochs": sizes["epochs"],
            "threads": sizes["threads"],
            "out": str(folder / f"plans-{number}"),
            "options": dict(FORMS[form]),
        }
        found = from_worker("whole", given)
        said, taken = found["seconds"]["total"], sum(found["stages"].values())
        by_stage = ", ".join(f"{name} {seconds:.2g}" for name, seconds in found["stages"].items() if seconds)
        for what, ratio, note in (
            ("seconds", taken / said, f"{taken:.3g} s, said {said:.3g}: {by_stage}"),
            ("bytes", found["stored"] / found["disk"]["total"], f"{found['stored'] / 1e6:.3g} MB"),
            ("resident set", found["peak"] / found["memory"], f"{found['peak'] / 1e6:.0f} MB"),
        ):
            result.add(
                f"{form}: {what}, measured / said",
                [ratio],
                "x",
                at_least=1 / FACTOR if what == "seconds" else None,
                at_most=FACTOR,
                note=note,
            )
    return result
