"""The detectors, by the names that ``--by`` takes."""

from __future__ import annotations

from .case import Scorer
from .gradients import OUTLIER_GRADIENT, SELF_INFLUENCE, SELF_TRACIN
from .outputs import KNN
from .visits import BY_VISITS

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (*BY_VISITS, KNN, SELF_INFLUENCE, SELF_TRACIN, OUTLIER_GRADIENT)
}
"""In the order in which people are shown them."""
