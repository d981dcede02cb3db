"""Timing that survives a noisy machine: candidates take turns, the first round is dropped, medians.

Two figures are only compared when they were measured in the same process in alternation, and then
by the median of the ratios of neighbours: what slows the machine for a while slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def clock(function: Callable[[], object]) -> float:
    """Return how many seconds one call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def take_turns(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each candidate in each round, measured A B C A B C …

    Args:
        candidates: What to call, by name.
        rounds: Rounds that count.
        warm_up: Rounds before those, dropped.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + rounds):
        for name, function in candidates.items():
            seconds = clock(function)
            if turn >= warm_up:
                taken[name].append(seconds)
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratios of neighbouring measurements."""
    return [a / b for a, b in zip(above, below, strict=True)]


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and upper quartile, or both extremes of fewer than four values."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4)
    return low, high
