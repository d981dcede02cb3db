"""Scores of predictions against real retrainings: pure numbers in, pure numbers out.

Letters: U retrainings, n tracked training samples, M test samples. A retraining is the (n,) row of
what it took away: 1 - weight_i, that is 1 for a removed sample, 0 for one left alone and negative for
one that counts more. To first order that changes the loss of test sample j by

    sum over i of  taken_i C(i, j)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..compare.ranking import auc, pearson, ranks, spearman
from ..reading.panels import panels, targets

if TYPE_CHECKING:
    from ..reading.reader import Reader

Floats = npt.NDArray[np.float64]

DRAWS = 400
"""Resamples of a bootstrap."""
BOOTSTRAP_TESTS = 512
"""Test samples a resample looks at; more would not narrow the interval by anything that shows."""
LEVEL = 0.95
MARGIN = 0.03
"""Most that a method may be behind in LDS to count as nearly as good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lds:
    """A linear datamodelling score.

    Attributes:
        score: Mean over the test samples of the rank correlation over retrainings.
        low: Lower end of the 95% interval, over resampled retrainings and test samples.
        high: Upper end.
        by_test: (M,) the correlations.
        draws: (DRAWS,) scores of resamples, around ``score``; draw d of every method is the same resample.
    """

    score: float
    low: float
    high: float
    by_test: Floats
    draws: Floats


def predict(run: Reader, method: str, taken_Un: Floats) -> Floats:
    """Return the predicted changes of the losses of the method's targets, (U, Q).

    Args:
        run: The run.
        method: Whose contributions.
        taken_Un: Rows as above, columns as ``run.samples(method)``.
    """
    return np.concatenate([taken_Un @ block for _, block in panels(run, method)], axis=1)


def lds(real_UM: Floats, predicted: Mapping[str, Floats], *, seed: int = 0) -> dict[str, Lds]:
    """Score predictions of test losses by their rank correlation with the real ones.

    Args:
        real_UM: Test losses (or their changes) after each retraining.
        predicted: Method -> predicted changes, (U, M).
        seed: Of the bootstrap.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    count, tests = real_UM.shape
    draws: dict[str, list[float]] = {name: [] for name in predicted}
    for _ in range(DRAWS):
        rows = generator.integers(count, size=count)
        columns = generator.integers(tests, size=min(tests, BOOTSTRAP_TESTS))
        grid = np.ix_(rows, columns)
        real_ranks = ranks(real_UM[grid])
        for name, values in predicted.items():
            draws[name].append(float(pearson(ranks(values[grid]), real_ranks).mean()))
    found = {}
    for name, values in predicted.items():
        by_test = spearman(values, real_UM)
        score = float(by_test.mean())
        # A resample holds retrainings twice, whose ties shift its score: only its spread is taken.
        centred = np.array(draws[name]) - np.mean(draws[name]) + score
        low, high = interval(np.clip(centred, -1, 1))
        found[name] = Lds(score=score, low=low, high=high, by_test=by_test, draws=centred)
    return found


def interval(draws: Floats) -> tuple[float, float]:
    """Return the ends of the central 95% of a bootstrap."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def explained(real: Floats, predicted: Floats) -> float:
    """Return 1 - ||real - predicted||^2 / ||real||^2: the share of the change that was foretold.

    1: all of it; 0: as good as saying that nothing changes; below: worse than that.
    """
    size = float((real**2).sum())
    return float("nan") if size == 0 else 1 - float(((real - predicted) ** 2).sum()) / size


def agreement(real_UM: Floats, predicted_UM: Floats) -> dict[str, float]:
    """Return how predicted changes agree with real ones over all retrainings and test samples.

    ``explained`` (see there), ``correlation`` (Pearson) and ``slope``: the factor on the prediction
    that would fit best; below 1 where the method exaggerates.
    """
    size = float((predicted_UM**2).sum())
    return {
        "explained": explained(real_UM, predicted_UM),
        "correlation": float(pearson(predicted_UM.ravel(), real_UM.ravel())[0]),
        "slope": float((predicted_UM * real_UM).sum()) / size if size else float("nan"),
    }


def detection(scores: Mapping[str, Floats], wrong: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Return how well each score (high: suspicious) finds the samples with a wrong label.

    ``auc`` with its bootstrap interval over samples, and ``recall``: the share of the wrong labels
    among the as many most suspicious samples as there are wrong labels.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    count, total = len(wrong), int(wrong.sum())
    resamples = [generator.integers(count, size=count) for _ in range(DRAWS)]
    rows = []
    for name, values in scores.items():
        drawn = np.array([auc(values[pick], wrong[pick]) for pick in resamples])
        low, high = interval(drawn[np.isfinite(drawn)]) if np.isfinite(drawn).any() else (np.nan, np.nan)
        worst = np.argsort(-values, kind="stable")[:total]
        rows.append(
            {
                "score": name,
                "auc": auc(values, wrong),
                "auc_low": low,
                "auc_high": high,
                "recall": float(wrong[worst].mean()) if total else float("nan"),
            }
        )
    return rows


def harm(run: Reader, method: str) -> Floats:
    """Return how much each training sample harms, over the targets it harms, (n,).

    The mean over all targets, each by its test samples, of max(0, -C(i, j)). In the mean of C(i, j) itself, the harm that a
    sample with a wrong label does is hidden by the help it gives elsewhere.
    """
    count = targets(run, method).count
    total = 0.0
    for span, block in panels(run, method):
        total = total + (np.maximum(-block, 0.0) * count[span]).sum(1)
    found: Floats = np.asarray(total) / int(count.sum())
    return found


def recommendation(
    by_fraction: Mapping[float, Mapping[str, Lds]], cost: Mapping[str, float | None]
) -> list[str]:
    """Say, per share of samples removed, which method to trust.

    It is the one with the best score, unless one at half its cost or less is nearly as good: the 95%
    interval of the difference of their scores (the same resamples for both) ends below `MARGIN`. Where that interval
    merely holds 0, more retrainings would have to tell.
    """
    lines = []
    for fraction, found in sorted(by_fraction.items()):
        best = max(found, key=lambda name: found[name].score)
        top = found[best]
        text = f"{100 * (1 - fraction):g}% removed: {best} has LDS {top.score:.3f} ({top.low:.3f} to {top.high:.3f})"
        if top.low <= 0:
            lines.append(f"{text}; no method is told from chance here: trust none at this size")
            continue
        gap = {n: interval(top.draws - s.draws) for n, s in found.items() if n != best}
        as_good = [name for name, (_, high) in gap.items() if high <= MARGIN]
        cheaper = _cheapest(as_good, cost, cost.get(best))
        if cheaper is not None:
            text += f"; {cheaper} ({found[cheaper].score:.3f}) is nearly as good at half the cost or less: trust {cheaper}"
        else:
            text += f": trust {best}"
        unclear = [name for name, (low, _) in gap.items() if low <= 0 and name not in as_good]
        if unclear:
            text += f" (more --subsets would tell it from {', '.join(unclear)})"
        lines.append(text)
    return lines


def _cheapest(names: Sequence[str], cost: Mapping[str, float | None], limit: float | None) -> str | None:
    known = {name: value for name in names if (value := cost.get(name)) is not None}
    if limit is None or not known:
        return None
    cheapest = min(known, key=lambda name: known[name])
    return cheapest if known[cheapest] <= limit / 2 else None
