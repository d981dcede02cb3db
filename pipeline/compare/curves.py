"""Pictures of a comparison over training: Figures 3, 4 and 5 of the HyDRA paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import COLOURS, check_figures, draw_panels

FIGURES = (
    ("error", "over-training-error.png", "mean norm of the hypergradient's error"),
    ("sign_error", "over-training-signs.png", "share of wrong signs of C(i)"),
    ("spearman", "over-training-spearman.png", "Spearman of C(i)"),
)
"""Measure, file, axis: the paper's Figures 3, 4 and 5."""


def training_figures(found: Mapping[str, Any], folder: str) -> list[str]:
    """Draw the three figures, one panel a reference; return the files."""
    place = check_figures(folder)
    references = list(dict.fromkeys(row["reference"] for row in found["curves"]))
    methods = list(dict.fromkeys(row["method"] for row in found["curves"]))

    def curves(axes: Sequence[Any], key: str, label: str) -> None:
        for axis, reference in zip(axes, references, strict=True):
            for number, method in enumerate(methods):
                rows = [
                    row
                    for row in found["curves"]
                    if (row["reference"], row["method"]) == (reference, method) and row[key] is not None
                ]
                if rows and method not in references:
                    axis.plot(
                        [row["epoch"] for row in rows],
                        [row[key] for row in rows],
                        marker=".",
                        color=COLOURS[number % len(COLOURS)],
                        label=method,
                    )
            axis.set(title=f"against {reference}", xlabel="epoch", ylabel=label)
            if key == "error":
                axis.set_yscale("log")
            if key == "spearman":
                axis.set_ylim(top=1)
            if key == "sign_error":
                axis.set_ylim(bottom=0)
            axis.legend(frameon=False, fontsize="small")

    def panels(key: str, label: str) -> Any:
        return lambda axes: curves(axes, key, label)

    return [draw_panels(place / name, len(references), panels(key, label)) for key, name, label in FIGURES]
