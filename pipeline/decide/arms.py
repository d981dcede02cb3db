"""What a decision is compared with: the arms of its retrainings.

``before``: nothing is done. ``cleaned``: the decision. ``random``: of each class as many samples as the decision is
for, at random among those that were judged, another draw with every seed. ``loss``, ``margin``: as many samples,
those of the highest loss or lowest margin, means over their visits in the recorded training. ``exact``: the samples
that are known to be wrong. Of the papers' reading ``true-labels`` (what the decision keeps, on its true labels) and
``random-true-labels``. Letters: N training samples, E epochs, k samples that the decision is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...storage.errors import SpecError
from ..reading.decisions import DROP
from ..reading.reader import Reader
from ..units.retrain_cleaned import Treatment
from ..vocabulary import Way
from .rules import Ruling
from .suspects import Suspects

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BEFORE, CLEANED, RANDOM, EXACT_NOISE = "before", "cleaned", "random", "exact"
LOSS, MARGIN = "loss", "margin"
TRUE_LABELS, RANDOM_TRUE_LABELS = "true-labels", "random-true-labels"

_DRAW = 12
"""Tells the draws of the random arm from others with the same seed."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Arm:
    """One way to treat the training samples.

    Attributes:
        name: Of the arm.
        weight: From the seed to (N,) weights, 0: dropped.
        index: Train indices with another label, ascending.
        label: Those labels.
    """

    name: str
    weight: Callable[[int], Floats]
    index: Integers
    label: Integers

    def treatment(self, way: Way, seed: int) -> Treatment:
        """Return what one training gets."""
        return Treatment(way=way, seed=seed, weight=self.weight(seed), index=self.index, label=self.label)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """All arms, and what is to be said of those that are not there.

    Attributes:
        arms: In the order in which they are shown.
        notes: One line each.
    """

    arms: tuple[Arm, ...]
    notes: tuple[str, ...]


def comparison(run: Reader, suspects: Suspects, ruling: Ruling, rule: str, papers: bool) -> Comparison:
    """Return the arms of a decision.

    Args:
        run: The run; its record knows visits and wrong labels.
        suspects: What the decision was made from.
        ruling: The decision.
        rule: Its kind.
        papers: Whether to add the papers' reading.

    Raises:
        SpecError: The papers' reading is asked for where there are no known wrong labels, or nothing is dropped.
    """
    given, chosen = suspects.given, ruling.chosen
    count, size = len(given), len(chosen)
    pool = suspects.order if suspects.scored and (suspects.rank[chosen] > 0).all() else np.arange(count)
    nothing = np.empty(0, dtype=np.int64)
    notes: list[str] = []

    def dropping(index: Integers) -> Floats:
        weight = np.ones(count)
        weight[index] = 0.0
        return weight

    def fixed(name: str, weight: Floats, index: Integers = nothing, label: Integers = nothing) -> Arm:
        return Arm(name=name, weight=lambda seed: weight, index=index, label=label)

    def at_random(seed: int) -> Floats:
        return dropping(random_alike(given, chosen, pool, seed))

    changed = np.flatnonzero(ruling.label != given).astype(np.int64)
    arms = [
        fixed(BEFORE, np.ones(count)),
        fixed(CLEANED, ruling.weight, changed, ruling.label[changed]),
        Arm(name=RANDOM, weight=at_random, index=nothing, label=nothing),
    ]
    for name, sign in ((LOSS, 1.0), (MARGIN, -1.0)):
        mean = mean_over_visits(run, name)
        if mean is None:
            notes.append(f"no arm {name}: the record of this run keeps no {name} of each visit")
            continue
        worst = np.nan_to_num(sign * mean[pool], nan=-np.inf)
        arms.append(fixed(name, dropping(pool[np.argsort(-worst, kind="stable")][:size])))
    noisy = run.noisy()
    wrong, true = (nothing, nothing) if noisy is None else (np.asarray(one, dtype=np.int64) for one in noisy)
    if 0 < len(wrong) < count:
        arms.append(fixed(EXACT_NOISE, dropping(wrong)))
    else:
        notes.append(f"no arm {EXACT_NOISE}: the run knows of no wrong labels")
    if papers:
        if rule != DROP or not len(wrong):
            raise SpecError(
                "--papers-reading trains what --drop keeps on its true labels, and needs a run with known wrong labels "
                "(such as --set label_noise=0.5); leave it out"
            )
        arms.append(fixed(TRUE_LABELS, dropping(chosen), wrong, true))
        arms.append(Arm(name=RANDOM_TRUE_LABELS, weight=at_random, index=wrong, label=true))
    if rule != DROP:
        notes.append(f"random, loss and margin drop {size} samples, as many as the decision changes")
    return Comparison(arms=tuple(arms), notes=tuple(notes))


def random_alike(given: Integers, chosen: Integers, pool: Integers, seed: int) -> Integers:
    """Return as many samples of each class as are chosen, at random from a pool, ascending.

    Args:
        given: Labels, (N,).
        chosen: Train indices, (k,).
        pool: Train indices to draw from; holds the chosen ones.
        seed: Of the draw; another class draws with another generator.
    """
    found = []
    for label in np.unique(given[chosen]):
        members = np.sort(pool[given[pool] == label])
        draw = np.random.Generator(np.random.PCG64([seed, _DRAW, int(label) + 1]))
        found.append(draw.permutation(members)[: int((given[chosen] == label).sum())])
    return np.sort(np.concatenate(found)).astype(np.int64)


def mean_over_visits(run: Reader, name: str) -> Floats | None:
    """Return the mean over its visits of each sample's ``loss`` or ``margin``, (N,); None: the record has none.

    NaN for a sample that was never visited.
    """
    visits = run.visits()
    visits_EN = None if visits is None else visits.loss if name == LOSS else visits.margin
    if visits_EN is None:
        return None
    known = np.isfinite(visits_EN)
    total = np.where(known, visits_EN, 0).sum(0, dtype=np.float64)
    seen = known.sum(0)
    found: Floats = np.where(seen > 0, total / np.maximum(seen, 1), np.nan)
    return found
