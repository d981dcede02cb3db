"""HyDRA, Figure 2: how much a training class helps a test class (Eq. 23), in both normalisations.

As printed, an entry is divided by sqrt(row sum x column sum), which nothing defines where that product is
negative. The public code subtracts the mean of all entries, divides by their standard deviation, and then by
the roots of the row's and the column's Euclidean norms: its entries off the diagonal are relative, not contributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_pipe import Run

from .outcome import Outcome, Table
from .steps import Steps
from .tasks import available, names, task

Floats = npt.NDArray[np.float64]

PAIRS: Mapping[str, Sequence[tuple[int, int]]] = {
    "mnist": ((3, 5), (2, 7), (4, 9)),
    "digits": ((3, 5), (2, 7), (4, 9)),
    "fashion-mnist": ((2, 4), (0, 6), (7, 9)),
    "cifar10": ((1, 9),),
}
"""Pairs of classes that the paper says to stand out by low values."""

COMMON: Mapping[str, Any] = {"hessians": ("none", "ekfac"), "tests": {}, "epochs": None, "device": "cpu"}
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "figure2": {
        "quick": {
            **COMMON,
            "data": {"digits": 120},
            "hessians": ("none",),
            "tests": {"digits": 100},
            "epochs": 2,
        },
        "two-cores": {
            **COMMON,
            "data": {"fashion-mnist": 12_500, "digits": None},
            "tests": {"fashion-mnist": 2_000},
        },
        "full": {**COMMON, "data": {"mnist": None, "fashion-mnist": None, "cifar10": None}, "device": "auto"},
    }
}


def clean_run(
    steps: Steps, data: str, count: int | None, hessian: str, sizes: Mapping[str, Any]
) -> tuple[Run, str]:
    """Return the run on right labels that figure 2 and table 2 look at: contributions to each test class."""
    recipe = task(data, train_size=count, epochs=sizes["epochs"])
    part = steps.beside("clean")
    return part.attributed(
        data,
        recipe=recipe,
        mode="adjoint",
        targets="classes",
        hessian=hessian,
        test=sizes["tests"].get(data, "all"),
        device=sizes["device"],
    )


def class_map(run: Run, method: str) -> Floats:
    """Return Eq. 23, (training class, test class)."""
    table = run.interclass(method)
    train, test = (table[name].to_numpy() for name in ("train_class", "test_class"))
    found = np.full((train.max() + 1, test.max() + 1), np.nan)
    found[train, test] = table["contribution"].to_numpy()
    return found


def as_printed(raw: Floats) -> Floats:
    """Return each entry over sqrt(row sum x column sum); NaN where the product is not positive."""
    product = raw.sum(1, keepdims=True) * raw.sum(0, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(product > 0, raw / np.sqrt(product), np.nan)


def as_coded(raw: Floats) -> Floats:
    """Return the entries standardised, each over the roots of its row's and its column's norms."""
    scaled = (raw - raw.mean()) / raw.std()
    rows = np.linalg.norm(scaled, axis=1, keepdims=True)
    columns = np.linalg.norm(scaled, axis=0, keepdims=True)
    return np.asarray(scaled / np.sqrt(rows) / np.sqrt(columns), dtype=np.float64)


def judge(found: Floats, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return how far the paper's claims hold: maxima on the diagonal, and where the pairs rank among the lowest."""
    classes = len(found)
    own = np.arange(classes)
    off = [(i, j) for i in range(classes) for j in range(classes) if i != j and not np.isnan(found[i, j])]
    order = sorted(off, key=lambda at: found[at])
    whole = not np.isnan(found).any()
    return {
        "rows": int((found.argmax(1) == own).sum()) if whole else None,
        "columns": int((found.argmax(0) == own).sum()) if whole else None,
        "undefined": int(np.isnan(found).sum()),
        "of": len(off),
        "pairs": {
            f"{a}-{b}": [order.index(at) + 1 if at in order else None for at in ((a, b), (b, a))]
            for a, b in pairs
        },
    }


def experiment(name: str, sizes: Mapping[str, Any], steps: Steps, pictures: Path) -> Outcome:
    """Make the maps of each data set, judge the claims, draw."""
    outcome = Outcome(name=name, sizes=sizes)
    table = outcome.table(
        "claims of the paper: row and column maxima on the diagonal; the pairs stand out as low",
        *("data, form, normalisation", "rows", "columns", "undefined", "pairs: place from below (both ways)"),
    )
    for data, count in sizes["data"].items():
        if not available(data):
            outcome.notes.append(f"{data}: left out, its files are not there")
            continue
        drawn = {}
        for hessian in sizes["hessians"]:
            run, method = clean_run(steps, data, count, hessian, sizes)
            raw = class_map(run, method)
            outcome.details[f"{data}, {method}"] = raw.tolist()
            for kind, found in {
                "none": raw,
                "as printed": as_printed(raw),
                "as coded": as_coded(raw),
            }.items():
                _row(table, f"{data}, {method}, {kind}", data, judge(found, PAIRS[data]))
                if kind != "none":
                    drawn[f"{method}, {kind}"] = found
        path = pictures / f"paper-figure2-{data}.png"
        draw(drawn, names(data), path)
        outcome.pictures.append(path.name)
    return outcome


def _row(table: Table, label: str, data: str, found: Mapping[str, Any]) -> None:
    called = names(data)
    places = []
    for pair, ranks in found["pairs"].items():
        a, b = map(int, pair.split("-"))
        places.append(f"{called[a]}-{called[b]} {', '.join('–' if r is None else str(r) for r in ranks)}")
    text = "; ".join(places) + f" of {found['of']}"
    table.rows.append((label, found["rows"], found["columns"], found["undefined"], text))


def draw(maps: Mapping[str, Floats], called: Sequence[str], path: Path) -> None:
    """Draw maps side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        1, len(maps), figsize=(4.1 * len(maps), 4.2), layout="constrained", squeeze=False
    )
    for axis, (title, found) in zip(grid[0], maps.items(), strict=True):
        most = float(np.nanmax(np.abs(found))) if np.isfinite(found).any() else 1.0
        axis.imshow(np.ma.masked_invalid(found), cmap="RdBu", vmin=-most, vmax=most)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(called)), called, rotation=90, fontsize=7)
        axis.set_yticks(range(len(called)), called, fontsize=7)
        axis.set_xlabel("test class", fontsize=8)
        axis.set_facecolor("0.85")
    grid[0][0].set_ylabel("training class", fontsize=8)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
