"""Detectors that need nothing but the record: statistics of every sample's own visits.

Letters: E epochs, N training samples, n of them judged, C classes. A sample's visit in an epoch is the step whose batch
holds it, in train mode, before the update; y is its given class. Its own probability is ``exp(-loss)``, which is what
the model gives y where the loss is cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...storage.errors import IncompleteStage, InputError
from ..plan.untrained import check_recorded
from .case import Case, Floats, Integers, Scorer, Scores

if TYPE_CHECKING:
    from ...storage.visits import Visits

EARLY = 5
"""Epochs of ``early-loss``."""

_COUNTED = 4_000_000
"""Counters at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """The visits of the judged samples.

    Attributes:
        uri: Of the run.
        loss: (E, n).
        margin: (E, n), or None.
        other: (E, n), or None.
        probability: (n, C), or None.
        foreign: Whether labels are no classes of the outputs, such as 1 .. C of C outputs: then label y is not
            output y for any sample, and nothing that was read off the outputs by label is given.
    """

    uri: str
    loss: Floats
    margin: Floats | None
    other: Integers | None
    probability: Floats | None
    foreign: bool

    def margins(self, name: str) -> Floats:
        """Return the margins, which the detector ``name`` needs.

        Raises:
            InputError: There are none.
        """
        if self.foreign:
            raise InputError(
                f"{self.uri}: some labels are no classes of the model's outputs, so that label y is not output y, which {name} "
                "needs; let labels() number the outputs from 0, or use loss, final-loss, early-loss or variability"
            )
        if self.margin is None:
            raise InputError(
                f"{self.uri}: the record has no margins, which {name} needs: labels are unknown, or the model's outputs "
                "are not (B, classes); use loss, final-loss, early-loss or variability"
            )
        return self.margin

    def own_probability(self) -> Floats:
        """Return ``exp(-loss)``, (E, n), at most 1."""
        return np.minimum(np.exp(-self.loss), 1.0)


def judged_visits(case: Case) -> Judged:
    """Return the visits of a case's samples.

    Raises:
        IncompleteStage: The run was recorded without.
    """
    found: Visits | None = case.run.visits()
    if found is None:
        check_recorded(case.run, "the visits' statistics")
        raise IncompleteStage(
            f"{case.run.uri} was recorded without visits; record it again with --visits on --overwrite"
        )
    at = case.tracked
    # A visit has a margin wherever it has a loss, unless its label is no class of the output. One such label in the
    # whole record is enough: where labels are 1 .. C, those below C have margins, too, of the wrong class.
    foreign = found.margin is not None and bool((np.isnan(found.margin) & np.isfinite(found.loss)).any())
    margin, other, probability = (
        (None, None, None) if foreign else (found.margin, found.other, found.probability)
    )
    return Judged(
        uri=case.run.uri,
        loss=found.loss[:, at].astype(np.float64),
        margin=None if margin is None else margin[:, at].astype(np.float64),
        other=None if other is None else other[:, at].astype(np.int64),
        probability=None if probability is None else probability[at].astype(np.float64),
        foreign=foreign,
    )


def suggested_labels(visits: Judged, given: npt.NDArray[np.int64]) -> Integers:
    """Return the class that each sample is taken for, other than the given one; -1: unknown.

    The largest mean probability where there are some, else the class that most often had the largest other output.
    """
    n = len(given)
    if visits.probability is not None and visits.probability.shape[1] > 1:
        others = _others(visits.probability, given)
        best = others.argmax(1)
        known = (given >= 0) & np.isfinite(visits.probability).all(1)
        return np.where(known, best, -1)
    suggested = np.full(n, -1, dtype=np.int64)
    if visits.other is None:
        return suggested
    classes = int(visits.other.max(initial=-1)) + 1
    step = max(1, _COUNTED // max(classes, 1))
    for start in range(0, n if classes else 0, step):
        block = visits.other[:, start : start + step]
        sample = np.broadcast_to(np.arange(block.shape[1]), block.shape)
        seen = block >= 0
        key = sample[seen] * classes + block[seen]
        counts = np.bincount(key, minlength=block.shape[1] * classes).reshape(-1, classes)
        suggested[start : start + step] = np.where(counts.any(1), counts.argmax(1), -1)
    return suggested


def _others(probability_nC: Floats, given: Integers) -> Floats:
    """Return the probabilities with -inf in the place of the given class."""
    others = probability_nC.copy()
    inside = (given >= 0) & (given < others.shape[1])
    others[np.flatnonzero(inside), given[inside]] = -np.inf
    return others


def margin(case: Case) -> Scores:
    """Area under the margin: ``-mean over the visits of (output[y] - max over k != y of output[k])``."""
    visits = judged_visits(case)
    mean = visits.margins("margin").mean(0)
    return Scores(
        suspicion=-mean,
        suggested=suggested_labels(visits, case.given),
        quality=_sigmoid(mean),
        reason=_reasons("mean margin {:+.2f} over " + _visits(visits), mean),
    )


def loss(case: Case) -> Scores:
    """Mean loss over the visits."""
    visits = judged_visits(case)
    mean = visits.loss.mean(0)
    return Scores(
        suspicion=mean,
        suggested=suggested_labels(visits, case.given),
        quality=_share(np.exp(-mean)),
        reason=_reasons("mean loss {:.3g} over " + _visits(visits), mean),
    )


def final_loss(case: Case) -> Scores:
    """Loss at the last visit."""
    visits = judged_visits(case)
    last = visits.loss[-1]
    return Scores(
        suspicion=last,
        suggested=suggested_labels(visits, case.given),
        quality=_share(np.exp(-last)),
        reason=_reasons("loss {:.3g} at the last visit", last),
    )


def early_loss(case: Case) -> Scores:
    """Mean of 1 minus the own probability over the first `EARLY` epochs: EL2N of one output."""
    visits = judged_visits(case)
    epochs = min(EARLY, len(visits.loss))
    error = 1 - visits.own_probability()[:epochs].mean(0)
    span = f"first {epochs} visits" if epochs > 1 else "first visit"
    return Scores(
        suspicion=error,
        suggested=suggested_labels(visits, case.given),
        quality=_share(1 - error),
        reason=_reasons(f"mean own probability {{:.2f}} at the {span}", 1 - error),
        notes={"epochs": epochs},
    )


def forgetting(case: Case) -> Scores:
    """Forgetting events: visits at which a sample is right (margin above 0) whose next one is wrong.

    Never learned counts as the maximum, E. Ties are broken by the mean margin, low first: the rank among all judged
    samples over n, below 1, is added.
    """
    visits = judged_visits(case)
    margins = visits.margins("forgetting")
    epochs, n = margins.shape
    _at_least_two(visits, "forgetting")
    right = margins > 0
    events = (right[:-1] & ~right[1:]).sum(0)
    learned = np.asarray(right.any(axis=0))
    count = np.where(learned, events, epochs).astype(np.float64)
    rank = np.empty(n)
    rank[np.argsort(-margins.mean(0), kind="stable")] = np.arange(n) / max(n, 1)
    reason = [
        f"forgotten {int(c)} times in {_visits(visits)}"
        if r
        else f"never predicted right in {_visits(visits)}"
        for c, r in zip(count.tolist(), learned.tolist(), strict=True)
    ]
    return Scores(
        suspicion=np.where(np.isnan(margins).any(0), np.nan, count + rank),
        suggested=suggested_labels(visits, case.given),
        reason=reason,
        notes={"never_learned": int((~learned).sum()), "ties": "by mean margin"},
    )


def variability(case: Case) -> Scores:
    """Standard deviation of the own probability over the epochs; high: ambiguous, not surely wrong."""
    visits = judged_visits(case)
    _at_least_two(visits, "variability")
    spread = visits.own_probability().std(0)
    return Scores(
        suspicion=spread,
        suggested=suggested_labels(visits, case.given),
        quality=_share(1 - 2 * spread),
        reason=_reasons("own probability varies by {:.2f} over " + _visits(visits), spread),
    )


def confident(case: Case) -> Scores:
    """Confident learning on the mean probabilities of the visits, in-sample.

    A class's threshold is the mean probability of that class among the samples that were given it. A sample counts
    for the class of largest probability among those whose threshold it reaches; if that is not its given one it is off
    the diagonal of the confident joint. Those come first; within, and among the rest, the normalised margin
    ``m = p[y] - max over k != y of p[k]`` ranks: ``suspicion = (1 - m) / 2 + [off the diagonal]``. The estimated
    number of wrong labels is that off the diagonal of the joint once its rows are scaled to the counts of the classes.

    Raises:
        InputError: There are no probabilities, no labels, or one class.
    """
    visits = judged_visits(case)
    visits.margins("confident")
    probability, given = visits.probability, case.given
    if probability is None:
        raise InputError(
            f"{visits.uri}: mean probabilities were too large to be kept, which confident needs; use margin or loss"
        )
    known = (given >= 0) & (given < probability.shape[1]) & np.isfinite(probability).all(1)
    classes = np.unique(given[known])
    if len(classes) < 2:
        raise InputError(
            f"{visits.uri}: {len(classes)} class among the judged samples, and confident needs two or more; "
            "track more samples, or use margin or loss"
        )
    rows, labels = probability[known], given[known]
    own = rows[np.arange(len(rows)), labels]
    size = np.bincount(labels, minlength=rows.shape[1])
    thresholds = np.full(rows.shape[1], np.inf)
    thresholds[classes] = np.bincount(labels, weights=own, minlength=rows.shape[1])[classes] / size[classes]
    reached = np.where(rows >= thresholds, rows, -np.inf)
    taken = np.where(np.isfinite(reached).any(1), reached.argmax(1), -1)
    off = (taken >= 0) & (taken != labels)
    # Of the joint, C x C, only the sums of its rows and what lies off its diagonal are needed.
    counted, moved = (
        np.bincount(labels[at], minlength=rows.shape[1]).astype(np.float64) for at in (taken >= 0, off)
    )
    share_wrong = np.divide(moved, counted, out=np.zeros_like(counted), where=counted > 0)
    normalised = own - _others(rows, labels).max(1)
    suspicion = np.full(case.n, np.nan)
    suspicion[known] = (1 - normalised) / 2 + off
    every = np.full(case.n, np.nan)
    every[known] = normalised
    at = np.flatnonzero(known)[off]
    reason = _reasons("normalised margin {:+.2f}", every)
    for i in at:
        reason[i] += ", counted for another class"
    return Scores(
        suspicion=suspicion,
        suggested=suggested_labels(visits, given),
        quality=1 - suspicion / 2,
        reason=reason,
        notes={"estimated_wrong": round(float((share_wrong * size).sum())), "off_diagonal": int(off.sum())},
    )


def _at_least_two(visits: Judged, name: str) -> None:
    if len(visits.loss) < 2:
        raise InputError(
            f"{visits.uri} was trained for one epoch, and {name} needs two or more; use margin or loss, or --epochs 2"
        )


def _visits(visits: Judged) -> str:
    count = len(visits.loss)
    return f"{count} visits" if count > 1 else "1 visit"


def _reasons(form: str, values: Floats) -> list[str]:
    return [form.format(value) for value in values.tolist()]


def _sigmoid(values: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(values, -700, 700)))


def _share(values: Floats) -> Floats:
    return np.clip(values, 0.0, 1.0)


BY_VISITS = (
    Scorer(name="margin", needs="record", what="mean margin over the visits, low first (AUM)", score=margin),
    Scorer(name="loss", needs="record", what="mean loss over the visits", score=loss),
    Scorer(name="final-loss", needs="record", what="loss at the last visit", score=final_loss),
    Scorer(
        name="early-loss",
        needs="record",
        what=f"1 - own probability, mean of the first {EARLY} visits (EL2N)",
        score=early_loss,
    ),
    Scorer(name="forgetting", needs="record", what="how often it was right and then wrong", score=forgetting),
    Scorer(
        name="variability", needs="record", what="spread of the own probability: ambiguous", score=variability
    ),
    Scorer(name="confident", needs="record", what="confident learning's count", score=confident),
)
"""In the order in which people are shown them."""
