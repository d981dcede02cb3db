"""The detectors, by the names that ``--by`` takes."""

from __future__ import annotations

from .case import Scorer
from .visits import BY_VISITS

SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in BY_VISITS}
"""In the order in which people are shown them."""
