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

from .panels import panels
from .ranking import auc, pearson, ranks, spearman

if TYPE_CHECKING:
    from ..handle import Run

Floats = npt.NDArray[np.float64]

DRAWS = 400
"""Resamples of a bootstrap."""
BOOTSTRAP_TESTS = 512
"""Test samples a resample looks at; more would not narrow the interval by anything that shows."""
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Lds:
    """A linear datamodelling score.

    Attributes:
        score: Mean over the test samples of the rank correlation over retrainings.
        low: Lower end of the 95% interval, over resampled retrainings and test samples.
        high: Upper end.
        by_test: (M,) the correlations.
        draws: (DRAWS,) the score of each resample; draw d of every method is the same resample.
    """

    score: float
    low: float
    high: float
    by_test: Floats
    draws: Floats


def predict(run: Run, method: str, taken_Un: Floats) -> Floats:
    """Return the predicted changes of the test losses, (U, M).

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
        low, high = interval(np.array(draws[name]))
        found[name] = Lds(
            score=float(by_test.mean()), low=low, high=high, by_test=by_test, draws=np.array(draws[name])
        )
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


def own_class(run: Run, method: str, train_label: npt.NDArray[Any], test_label: npt.NDArray[Any]) -> Floats:
    """Return each training sample's mean contribution to the test samples of its own label, (n,).

    A sample with a wrong label tends to harm the very class it claims to belong to. NaN where a
    label does not occur among the test samples.
    """
    total, count = np.zeros(len(train_label)), np.zeros(len(train_label))
    for span, block in panels(run, method):
        same = train_label[:, None] == test_label[span][None, :]
        total += np.where(same, block, 0.0).sum(1)
        count += same.sum(1)
    mean: Floats = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return mean


def recommendation(
    by_fraction: Mapping[float, Mapping[str, Lds]], cost: Mapping[str, float | None]
) -> list[str]:
    """Say, per share of samples kept, which method to trust: the best, and the cheapest as good.

    Two methods count as equally good where the 95% interval of the difference of their scores (the
    same resamples for both) holds 0.
    """
    lines = []
    for fraction, found in sorted(by_fraction.items()):
        best = max(found, key=lambda name: found[name].score)
        top = found[best]
        share = f"{100 * (1 - fraction):g}% removed"
        text = f"{share}: {best} has LDS {top.score:.3f} ({top.low:.3f} to {top.high:.3f})"
        if top.low <= 0:
            lines.append(f"{text}; no method is told from chance here: trust none at this size")
            continue
        equal = [name for name in found if name != best and interval(top.draws - found[name].draws)[0] <= 0]
        cheaper = _cheapest(equal, cost, cost.get(best))
        if cheaper is not None:
            text += (
                f"; {cheaper} ({found[cheaper].score:.3f}) is not told from it and costs less: use {cheaper}"
            )
        else:
            others = f", not told from it: {', '.join(equal)}" if equal else ""
            text += f": trust {best}{others}"
        lines.append(text)
    return lines


def _cheapest(names: Sequence[str], cost: Mapping[str, float | None], limit: float | None) -> str | None:
    known = {name: value for name in names if (value := cost.get(name)) is not None}
    if limit is None or not known:
        return None
    cheapest = min(known, key=lambda name: known[name])
    return cheapest if known[cheapest] < limit else None
