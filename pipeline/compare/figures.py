"""Pictures of a comparison or an evaluation; matplotlib is an extra and is imported here only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...storage.errors import InputError
from ...storage.files import staged
from .compare import scatter

if TYPE_CHECKING:
    from ..reading.reader import Reader

COLOURS = [f"C{k}" for k in range(10) if k != 7]
"""Of curves; without grey, which is what comes about by chance."""


def check_figures(folder: str) -> Path:
    """Return the directory for pictures, made, after checking that they can be drawn at all.

    Raises:
        InputError: matplotlib is missing (names the extra), or the place is no local directory.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "figures need matplotlib, which is not installed: pip install 'hydra-pipe[plots]'"
        ) from error
    matplotlib.use("Agg", force=False)
    if "://" in folder:
        raise InputError(f"--figures {folder}: pictures are written to a local directory; name one")
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--figures {folder}: cannot be made ({reason}); name another directory") from error
    return path


def comparison_figures(run: Reader, found: Mapping[str, Any], folder: str) -> list[str]:
    """Draw C(i) against the reference, and the Spearman of every test sample; return the files."""
    place = check_figures(folder)
    others = [row for row in found["methods"] if row["method"] != found["reference"]]
    points = scatter(run, found["reference"], [row["method"] for row in others])

    def dots(axes: Sequence[Any]) -> None:
        for axis, (method, (base, values)) in zip(axes, points.items(), strict=True):
            axis.scatter(base, values, s=4, alpha=0.5, linewidths=0, rasterized=True)
            axis.axhline(0, color="0.7", linewidth=0.5, zorder=0)
            axis.axvline(0, color="0.7", linewidth=0.5, zorder=0)
            axis.set(title=method, xlabel=f"C(i), {found['reference']}", ylabel="C(i)")

    def bars(axes: Sequence[Any]) -> None:
        edges = np.linspace(-1, 1, 41)
        for row in others:
            axes[0].hist(row["spearman_by_test"], edges, histtype="step", linewidth=1.5, label=row["method"])
        what = {"samples": "test samples", "classes": "classes", "mean": "means"}[found["targets"]]
        axes[0].set(xlabel=f"Spearman with {found['reference']}", ylabel=what)
        axes[0].legend(loc="upper left", frameon=False)

    return [
        draw_panels(place / "contributions.png", len(points), dots),
        draw_panels(place / "spearman.png", 1, bars),
    ]


def evaluation_figures(found: Mapping[str, Any], folder: str) -> list[str]:
    """Draw the scores with their intervals, the removal curves and the reach; return the files."""
    place, files = check_figures(folder), []
    if found["lds"]:
        files.append(draw_panels(place / "lds.png", 1, lambda axes: _scores(axes[0], found)))
    if found["removal"]:
        files.append(draw_panels(place / "removal.png", 2, lambda axes: _curves(axes, found["removal"])))
    if found["smoothness"]:
        files.append(
            draw_panels(place / "smoothness.png", 1, lambda axes: _reach(axes[0], found["smoothness"]))
        )
    return files


def _scores(axis: Any, found: Mapping[str, Any]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in found["lds"]))
    fractions = list(dict.fromkeys(row["fraction"] for row in found["lds"]))
    width = 0.8 / len(methods)
    for m, method in enumerate(methods):
        rows = [row for row in found["lds"] if row["method"] == method]
        score = np.array([row["lds"] for row in rows])
        # A bootstrap's interval need not hold the score itself: no bar points inwards.
        error = np.maximum([score - [r["low"] for r in rows], [r["high"] for r in rows] - score], 0)
        at = np.array([fractions.index(row["fraction"]) for row in rows]) + (m + 0.5) * width - 0.4
        axis.bar(at, score, width, yerr=error, capsize=2, label=method)
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set_xticks(range(len(fractions)), [f"{100 * f:g}% kept" for f in fractions])
    axis.set(ylabel="linear datamodelling score")
    _legend(axis)


def _curves(axes: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    rankings = list(dict.fromkeys(row["ranking"] for row in rows))
    for axis, direction in zip(axes, ("helpful", "harmful"), strict=True):
        for number, ranking in enumerate(rankings):
            chosen = [r for r in rows if r["ranking"] == ranking and r["direction"] in (direction, "any")]
            if not chosen:
                continue
            share = [100 * row["share"] for row in chosen]
            by_chance = chosen[0]["direction"] == "any"
            style = (
                {"color": "0.5", "linestyle": "--"}
                if by_chance
                else {"color": COLOURS[number % len(COLOURS)]}
            )
            axis.plot(share, [r["loss_change"] for r in chosen], marker="o", label=ranking, **style)
        axis.axhline(0, color="0.7", linewidth=0.5, zorder=0)
        axis.set(
            title=f"most {direction} removed", xlabel="removed, %", ylabel="change of the mean test loss"
        )
    _legend(axes[-1])


def _reach(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method, what in dict.fromkeys((row["method"], row["what"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["what"]) == (method, what)]
        axis.plot(
            [100 * row["removed"] for row in chosen],
            [row["correlation"] for row in chosen],
            marker="o" if what == "removal" else ".",
            linestyle="-" if what == "removal" else ":",
            color=COLOURS[methods.index(method) % len(COLOURS)],
            label=f"{method}, {what}",
        )
    axis.set(xscale="log", xlabel="removed (or as large a change), %", ylabel="correlation with the change")
    axis.xaxis.set_major_formatter("{x:g}")
    _legend(axis)


def _legend(axis: Any) -> None:
    """Put the legend beside the axis, where it hides nothing."""
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def draw_panels(path: Path, panels: int, draw: Callable[[Sequence[Any]], None]) -> str:
    """Write a picture of some axes side by side, which ``draw`` fills; return its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels + 1.5, 4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw(list(axes))
    with staged(str(path.resolve()), sync=True) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return str(path)
