"""Where a replay is cut into segments of steps: at states that the record kept.

T steps, K segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

NEAR = 0.02
"""Share of a segment by which a border may lie off its place where a checkpoint is there already."""


def wanted_borders(steps: int, segments: int, kept: Sequence[int]) -> list[int]:
    """Return after which steps states must be kept beside those that are, so that segments are equally long.

    Args:
        steps: T.
        segments: K.
        kept: Steps after which the record keeps states anyway.
    """
    found = []
    for ideal in _ideal(steps, segments):
        nearest = min(kept, key=lambda step: abs(step - ideal))
        if abs(nearest - ideal) > NEAR * steps / segments:
            found.append(round(ideal))
    return sorted({step for step in found if 0 < step < steps})


def cut_at(stands: Sequence[int], segments: int) -> list[tuple[int, int]]:
    """Return the segments as (first step, one past the last), at most K of them.

    Each border is the kept state nearest to where it would make segments equally long; where two fall together
    there is one segment less.

    Args:
        stands: Steps after which states are kept, ascending from 0 to T.
        segments: K.
    """
    steps = stands[-1]
    inner = {min(stands, key=lambda step: abs(step - ideal)) for ideal in _ideal(steps, segments)}
    borders = [0, *sorted(inner - {0, steps}), steps]
    return list(itertools.pairwise(borders))


def _ideal(steps: int, segments: int) -> list[float]:
    return [k * steps / segments for k in range(1, segments)]
