"""Pictures of detections: how much is found by looking, and where the cut lies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compare.figures import check_figures, draw_panels

if TYPE_CHECKING:
    from ..reading.detections import Detection

__all__ = ["check_figures", "detection_figures"]

BINS = 60
CLIPPED = 0.5
"""Percent at either end of the suspicions that a histogram puts into its last bins."""


def detection_figures(found: Sequence[Detection], folder: str) -> list[str]:
    """Draw the share of wrong labels found by inspecting, where it is known, and histograms; return the files."""
    place, files = check_figures(folder), []
    measured = [detection for detection in found if detection.values.measures]
    if measured:
        files.append(draw_panels(place / "found.png", 1, lambda axes: _curves(axes[0], measured)))
    for detection in found:
        place_of = place / f"suspicion-{detection.name}.png"
        files.append(draw_panels(place_of, 1, partial(_histogram, detection)))
    return files


def _curves(axis: Any, found: Sequence[Detection]) -> None:
    share = 0.0
    for detection in found:
        measures = detection.values.measures or {}
        share = measures["wrong"] / measures["judged"]
        inspected, caught = np.array(measures["curve"]).T
        axis.plot(100 * inspected, 100 * caught, label=detection.name)
    axis.plot([0, 100 * share, 100], [0, 100, 100], color="0.5", linestyle=":", label="perfect")
    axis.plot([0, 100], [0, 100], color="0.5", linestyle="--", label="random")
    axis.set(xlabel="inspected, %", ylabel="wrong labels found, %")
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _histogram(detection: Detection, axes: Sequence[Any]) -> None:
    (axis,) = axes
    values = detection.table["suspicion"].to_numpy()
    values = values[np.isfinite(values)]
    if len(values):
        low, high = np.percentile(values, [CLIPPED, 100 - CLIPPED])
        cut = detection.values.cut
        if cut is not None:  # it is seen wherever it lies
            low, high = min(low, cut), max(high, cut)
        axis.hist(np.clip(values, low, high), bins=BINS, color="C0")
        if cut is not None:
            axis.axvline(
                cut, color="C3", linestyle="--", label=f"flagged from here: {detection.values.flagged:,}"
            )
            axis.legend(frameon=False, fontsize="small")
    axis.set(title=detection.name, xlabel="suspicion", ylabel="training samples", yscale="log")
