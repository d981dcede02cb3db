"""The rankings of ``hydra-pipe detect``, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from hydra_pipe.pipeline.decide.case import Options
from hydra_pipe.pipeline.decide.detect import detect
from hydra_pipe.pipeline.decide.scorers import SCORERS
from hydra_pipe.workers.recipe import Recipe

from hydra_pipe import Run

Floats = npt.NDArray[np.float64]

CONTRIBUTIONS = ("contribution", "harm", "harmed-class", "cluster", "joint")
"""Rankings that look at contributions, and so differ by method."""

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "outlier-gradient l1": ("outlier-gradient", {"scorer": "l1"}),
    "outlier-gradient l2": ("outlier-gradient", {"scorer": "l2"}),
    "outlier-gradient iforest": ("outlier-gradient", {"scorer": "iforest"}),
    "cluster kmeans": ("cluster", {}),
    "cluster average": ("cluster", {"clusters": "average"}),
    "outlier-gradient iforest per class": ("outlier-gradient", {"scorer": "iforest", "per_class": True}),
}
"""Rankings by a detector with options; every other name is a detector's own."""


def every() -> list[str]:
    """Return every ranking: each detector of ``--by all``, the outlier gradients in their variants."""
    names: list[str] = []
    for name in SCORERS:
        names += [v for v, (by, _) in VARIANTS.items() if by == name] or [name]
    return names


def suspicions(
    run: Run, recipe: Recipe, names: Sequence[str], *, method: str | None = None, **placement: Any
) -> dict[str, Floats]:
    """Return the suspicion of each tracked sample, ascending in its index, by ranking.

    NaN, where a detector cannot say, is put last.
    """
    given = {"executor": "serial", "threads": 1, "method": method, **placement}
    plain = [name for name in names if name not in VARIANTS]
    made = {one.values.by: one for one in (detect(run, recipe, by=plain, **given) if plain else ())}
    for name in names:
        if name in VARIANTS:
            by, options = VARIANTS[name]
            made[name] = detect(run, recipe, by=by, options=replace(Options(), **options), **given)[0]
    return {name: _ascending(made[name].table) for name in names}


def _ascending(table: pa.Table) -> Floats:
    """Return the suspicion of a detection's samples, ascending in their index."""
    values = table["suspicion"].to_numpy()[np.argsort(table["train_index"].to_numpy())].astype(np.float64)
    return np.where(np.isnan(values), -np.inf, values)
