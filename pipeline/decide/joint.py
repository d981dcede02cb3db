"""The default detector: what needs no choice, joined.

The mean margin over training ranks best alone where labels are wrong at random; the class that a sample harms most
ranks best where wrong labels have a pattern, but only on a trained net; neighbours rank well where the net is not
trained enough. Each is standardised and they are added,

    joint_i = z(-mean margin)_i + max(a, c) z(share of unlike neighbours)_i + b^4 / 2 z(harm to the class harmed most)_i

What a part is worth is seen without the truth. a and b are the shares, among the tenth of lowest margin, for which
neighbours and contributions suggest the label that the margin suggests; c is how far neighbours share labels at all, 0 by
chance and 1 always. Neighbours that mostly have wrong labels themselves, and contributions of a net that is not trained
enough, count for little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ...storage.errors import InputError
from ..executors.events import Note
from .case import UNSERVED, Case, Floats, Integers, Scores
from .contributions import harmed_class
from .outputs import score_neighbours
from .visits import loss, margin

KNN, HARMED = "knn", "harmed-class"
LOOKED_AT = 0.1
"""Share of lowest margin on which agreement is measured."""
HALF, POWER = 0.5, 4

Part = Callable[[Case], Scores]


def joint(case: Case) -> Scores:
    """Return the sum of the standardised parts that this run can serve; see above.

    Where the record has no margins, the mean loss stands for them. Where it kept no visits at all the others are
    added as they are. The suggested label is that of the margin, unless both others agree on another.

    Raises:
        InputError: None of the parts can judge the run.
    """
    found, left_out = _parts(case)
    own = found.get("margin") or found.get("loss")
    weights = dict.fromkeys(found, 1.0)
    if own is not None and HARMED in found:
        weights[HARMED] = HALF * agreement(own, found[HARMED]) ** POWER
    if own is not None and KNN in found:
        weights[KNN] = max(agreement(own, found[KNN]), likeness(found[KNN], case.given))
    total = sum(
        (weights[name] * standardised(scores.suspicion) for name, scores in found.items()), np.zeros(case.n)
    )
    return Scores(
        suspicion=total,
        suggested=voted([scores.suggested for scores in found.values()]),
        reason=_reasons(case.n, found),
        notes={"weights": weights, **({"left_out": left_out} if left_out else {})},
    )


def _reasons(n: int, found: Mapping[str, Scores]) -> list[str]:
    """Say of each sample what the parts say, in a few words."""
    said: list[list[str]] = []
    for name, scores in found.items():
        values, labels = scores.suspicion.tolist(), scores.suggested.tolist()
        if name == "margin":
            said.append([f"margin {-value:+.1f}" for value in values])
        elif name == "loss":
            said.append([f"mean loss {value:.2g}" for value in values])
        elif name == KNN:
            said.append([f"knn {100 * value:.0f}%" for value in values])
        else:
            said.append([f"harms {label}" if label >= 0 else "" for label in labels])
    return [", ".join(part for part in parts if part) for parts in zip(*said, strict=True)]


def _parts(case: Case) -> tuple[dict[str, Scores], dict[str, str]]:
    """Return what the parts say, and why others say nothing."""
    found: dict[str, Scores] = {}
    left_out: dict[str, str] = {}
    for name, part in (("margin", margin), ("loss", loss), (KNN, score_neighbours), (HARMED, harmed_class)):
        if name == "loss" and "margin" in found:
            continue
        try:
            found[name] = part(case)
        except UNSERVED as error:
            left_out[name] = str(error)
    if not found:
        raise InputError("; ".join(f"{name}: {why}" for name, why in left_out.items()))
    for name, why in left_out.items():
        case.passes.observer(Note(message=f"joint: without {name}: {why}"))
    return found, left_out


def standardised(values: Floats) -> Floats:
    """Return values less their mean over their standard deviation, 0 where all are alike or one is unknown."""
    known = np.isfinite(values)
    spread = values[known].std() if known.any() else 0.0
    if not spread > 0:
        return np.zeros_like(values)
    return np.where(known, (values - values[known].mean()) / spread, 0.0)


def agreement(own: Scores, other: Scores) -> float:
    """Return the share of the samples of lowest margin for which both suggest the same label."""
    count = max(1, round(LOOKED_AT * len(own.suspicion)))
    looked = np.argsort(-own.suspicion, kind="stable")[:count]
    a, b = own.suggested[looked], other.suggested[looked]
    return float(((a == b) & (a >= 0)).mean())


def likeness(neighbours: Scores, given: Integers) -> float:
    """Return how far neighbours share labels: 0 as by chance, 1 always.

    Args:
        neighbours: Of ``knn``, whose suspicion is the share of neighbours with another label.
        given: (n,) given labels.
    """
    shares = np.unique(given, return_counts=True)[1] / len(given)
    chance = float((shares**2).sum())
    alike = 1 - float(np.nanmean(neighbours.suspicion))
    return max(0.0, (alike - chance) / (1 - chance)) if chance < 1 else 0.0


def voted(suggestions: list[Integers]) -> Integers:
    """Return the first suggestion of each sample, or what all the others agree on instead."""
    first, others = suggestions[0], suggestions[1:]
    if len(others) < 2:
        return first
    agreed = np.all([other == others[0] for other in others], axis=0) & (others[0] >= 0)
    return np.where(agreed, others[0], first)
