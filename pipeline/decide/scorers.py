"""The detectors, by the names that ``--by`` takes."""

from __future__ import annotations

from .case import Scorer

SCORERS: dict[str, Scorer] = {}
"""In the order in which people are shown them."""
