"""The detectors, by the names that ``--by`` takes."""

from __future__ import annotations

from .case import Scorer
from .gradients import OUTLIER_GRADIENT, SELF_INFLUENCE, SELF_TRACIN
from .outputs import KNN

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (SELF_INFLUENCE, SELF_TRACIN, OUTLIER_GRADIENT, KNN)
}
"""In the order in which people are shown them."""
