"""How good a ranking is where wrong labels are known.

Letters: n judged samples, m of them wrong, G groups of equal suspicion, most suspicious first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .case import Booleans, Floats, Integers

SHARES = (0.05, 0.1, 0.2)
"""Shares of the samples after whose inspection the recall is taken."""
LEVEL = 0.95
DRAWS, DRAWN = 1000, 20_000_000
"""Resamples of an interval, and samples drawn for all of them at most: fewer resamples of many samples."""
FEWEST = 100
TOGETHER = 1 << 18
"""Samples drawn at a time."""
CURVE = 200
"""Points of the curve, at most."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Truth:
    """Which of the judged samples have a wrong label.

    Attributes:
        wrong: (n,).
        original: (n,) the right label, -1 where it is not known.
        source: Who says so.
    """

    wrong: Booleans
    original: Integers
    source: str

    @property
    def share(self) -> float:
        """m / n."""
        return float(self.wrong.mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """Share of the wrong labels among the most suspicious ``share`` of all."""

    share: float
    found: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """How good a ranking is.

    Attributes:
        wrong: m.
        judged: n.
        truth: Who says which labels are wrong.
        auroc: Area under the receiver's curve; 0.5 by chance.
        average_precision: Area under precision over recall; m / n by chance.
        precision: Among the m most suspicious, which is then the recall, too.
        recall: After inspecting `SHARES`.
        suggested_right: Share of the wrong ones whose suggested label is the right one; None: nothing is
            suggested, or the right ones are not known.
        draws: Resamples of the intervals.
        curve: (share inspected, share found) from (0, 0) to (1, 1).
    """

    wrong: int
    judged: int
    truth: str
    auroc: Estimate
    average_precision: Estimate
    precision: Estimate
    recall: tuple[Recall, ...]
    suggested_right: Estimate | None = None
    draws: int
    curve: tuple[tuple[float, float], ...]


def measure(suspicion: Floats, order: Integers, suggested: Integers, truth: Truth, seed: int) -> Measures:
    """Hold a ranking against the truth.

    AUROC and average precision are scikit-learn's: samples of one suspicion stand side by side. What is counted
    among the first k takes the stored order. Intervals: percentiles of a stratified bootstrap (wrong and right
    labels are drawn each among themselves, so that m stays).

    Args:
        suspicion: (n,), NaN: cannot say, which counts as least suspicious.
        order: (n,) positions, most suspicious first.
        suggested: (n,) labels, -1: none.
        truth: Holds at least one wrong and one right label.
        seed: Of the bootstrap.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    wrong = truth.wrong[order]
    group = _groups(suspicion[order])
    n, m = len(wrong), int(wrong.sum())
    wanted = (m, *(max(1, round(share * n)) for share in SHARES))
    draws = int(np.clip(DRAWN // n, FEWEST, DRAWS))
    known = truth.original[order] >= 0
    right = (suggested[order] == truth.original[order]) & known
    asked = bool((suggested >= 0).any() and known[wrong].any())
    drawn = _bootstrap(wrong, group, right, wanted, draws, seed)
    points = [roc_auc_score(wrong, -group), average_precision_score(wrong, -group)]
    found = np.cumsum(wrong)
    points += [found[k - 1] / (m if at else k) for at, k in enumerate(wanted)]
    points.append(right[wrong].mean())
    auroc, precision_mean, precision, *recall, suggestion = (
        Estimate(value=float(point), low=float(low), high=float(high))
        for point, low, high in zip(
            points, *np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0), strict=True
        )
    )
    return Measures(
        wrong=m,
        judged=n,
        truth=truth.source,
        auroc=auroc,
        average_precision=precision_mean,
        precision=precision,
        recall=tuple(Recall(share=share, found=one) for share, one in zip(SHARES, recall, strict=True)),
        suggested_right=suggestion if asked else None,
        draws=draws,
        curve=_curve(wrong),
    )


def _groups(ordered: Floats) -> Integers:
    """Return the group of each sample of a ranking, (n,) from 0: those of one suspicion are one."""
    same = (ordered[1:] == ordered[:-1]) | (np.isnan(ordered[1:]) & np.isnan(ordered[:-1]))
    return np.concatenate([[0], np.cumsum(~same)]).astype(np.int64)


def _bootstrap(
    wrong: Booleans, group: Integers, right: Booleans, wanted: Sequence[int], draws: int, seed: int
) -> Floats:
    """Return the measures of resamples, (draws, 3 + len(wanted)), in the order of `measure`.

    A resample is how often each sample is in it; nothing is sorted again.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    parts = [np.flatnonzero(wrong), np.flatnonzero(~wrong)]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    n, m = len(wrong), len(parts[0])
    rows = []
    step = max(1, TOGETHER // n)
    for first in range(0, draws, step):
        count = min(step, draws - first)
        hits, misses = (_counts(generator, part, n, count) for part in parts)
        of_wrong, of_all = np.cumsum(hits, axis=1), np.cumsum(hits + misses, axis=1)
        if len(starts) < n:
            areas = areas_of(*(np.add.reduceat(found, starts, axis=1) for found in (hits, misses)))
        else:  # all suspicions differ
            areas = areas_of(hits, misses)
        columns = list(areas)
        each = np.arange(count)
        for at, k in enumerate(wanted):
            last = (of_all < k).sum(1)
            # Of the last sample only as many copies as fit; they are all alike.
            above = (of_all[each, last] - k) * wrong[last]
            columns.append((of_wrong[each, last] - above) / (m if at else k))
        columns.append((hits * right).sum(1) / m)
        rows.append(np.stack(columns, axis=1))
    return np.concatenate(rows)


def _counts(generator: np.random.Generator, part: Integers, n: int, draws: int) -> Integers:
    """Return how often each of n samples is in resamples of a part of them, (draws, n)."""
    drawn = part[generator.integers(0, len(part), (draws, len(part)))] + n * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n).astype(np.int64)


def areas_of(hits: Integers, misses: Integers) -> tuple[Floats, Floats]:
    """Return the area under the receiver's curve, and the average precision.

    Args:
        hits: (..., G) wrong labels in each group, the most suspicious group first.
        misses: (..., G) right ones.
    """
    tp, both = np.cumsum(hits, axis=-1), np.cumsum(hits + misses, axis=-1)
    m = tp[..., -1]
    area: Floats = (misses * (2 * tp - hits)).sum(-1) / (2.0 * m * (both[..., -1] - m))
    mean: Floats = (hits * tp / np.maximum(both, 1)).sum(-1) / m
    return area, mean


def _curve(wrong: Booleans) -> tuple[tuple[float, float], ...]:
    n, found = len(wrong), np.concatenate([[0], np.cumsum(wrong)])
    at = np.unique(np.linspace(0, n, min(n, CURVE) + 1).round().astype(np.int64))
    return tuple((float(k) / n, float(found[k] / found[-1])) for k in at)
