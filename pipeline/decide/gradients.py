"""Detectors that look at gradients: self-influence, and outliers among the gradients.

Letters: N training samples, n judged ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...storage.errors import InputError, SpecError
from ..compare.ranking import ranks
from .case import Case, Options, Scorer, Scores
from .gradient_rows import rows_of
from .passes import aligned

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def score_self_influence(case: Case) -> Scores:
    """Judge by C(i, i) = -(1/N) <g_i(w_T), hypergradient_i>: how much training on a sample lowered its own loss.

    What no other sample explains has to be learned by heart: large = suspicious (or hard).
    """
    index, product = case.passes.self_influence(case.method)
    found = -product / case.run.noted.training_size
    return _plain(found[aligned(case.tracked, index, case.run.uri)], {"method": case.method})


def score_self_tracin(case: Case) -> Scores:
    """Judge by TracIn of a sample with itself: sum over checkpoints k of eta_k |g_i(w_k)|^2.

    eta_k as the estimator ``tracin`` weighs its checkpoints; needs a record and no hypergradients.
    """
    index, found = case.passes.self_tracin()
    return _plain(found[aligned(case.tracked, index, case.run.uri)], {})


def _plain(suspicion: Floats, notes: dict[str, object]) -> Scores:
    return Scores(suspicion=suspicion, suggested=np.full(len(suspicion), -1, dtype=np.int64), notes=notes)


def score_outliers(case: Case) -> Scores:
    """Judge by how far a sample's gradient is out: its norm, or an isolation forest over all of them.

    Costs a forward pass a sample for the last layer of a model under cross entropy, else a forward and a backward
    one; for a forest memory for n rows of at most ``MOST_DIMENSIONS`` float32 numbers, above 1 GiB on disk.

    Raises:
        SpecError: An option is none, or two exclude each other.
        InputError: No such layer; a class is asked for where there are no labels; one sample alone.
    """
    asked = case.options
    _check(case, asked)
    rows = rows_of(case)
    notes = {"way": rows.way, "dimensions": rows.dimensions}
    if asked.scorer == "iforest":
        matrix = rows.matrix(asked.seed, unit=asked.normalise == "unit")
        if matrix.shape[1] < rows.dimensions:
            notes["projected_to"] = matrix.shape[1]
        groups = _classes(case.given) if asked.per_class else [np.arange(case.n)]
        return _plain(isolation(matrix, groups, asked.seed), notes)
    absolute, length = rows.norms()
    if asked.normalise == "unit":
        found = absolute / np.where(length > 0, length, 1.0)
    else:
        found = absolute if asked.scorer == "l1" else length
    if asked.per_class:
        return _plain(within_class(found, case.given), notes)
    middle = float(np.median(found))
    what = f"{asked.scorer.upper()} norm of its gradient"
    return Scores(
        suspicion=found,
        suggested=np.full(case.n, -1, dtype=np.int64),
        reason=[f"{what} is {value:.3g}, the median is {middle:.3g}" for value in found],
        notes=notes,
    )


def _check(case: Case, asked: Options) -> None:
    for name, value, known in (
        ("scorer", asked.scorer, ("l1", "l2", "iforest")),
        ("normalise", asked.normalise, ("none", "unit")),
        ("rows", asked.rows, ("gradients", "hypergradients")),
    ):
        if value not in known:
            raise SpecError(f"{name} {value!r}: must be one of {', '.join(known)}")
    if asked.scorer == "l2" and asked.normalise == "unit":
        raise SpecError(
            "normalise unit: makes every L2 norm 1 and leaves nothing to rank by; use scorer l1 or iforest"
        )
    if asked.scorer == "iforest" and case.n < 2:
        raise InputError(
            f"outlier-gradient: {case.n} sample is judged, and a forest takes at least 2; track more"
        )
    if asked.per_class and (case.given < 0).any():
        missing = int((case.given < 0).sum())
        raise InputError(
            f"outlier-gradient: {missing:,} of {case.n:,} samples have no label and belong to no class; "
            "leave per_class out, or give the recipe labels()"
        )


def _classes(label: Integers) -> list[Integers]:
    return [np.flatnonzero(label == one) for one in np.unique(label)]


def isolation(matrix: npt.NDArray[np.float32], groups: list[Integers], seed: int) -> Floats:
    """Return minus the scores of scikit-learn's isolation forest with its defaults, a forest a group, (n,).

    100 trees of at most 256 samples. A group of one has nothing to be isolated from: NaN.
    """
    from sklearn.ensemble import IsolationForest

    out = np.full(len(matrix), np.nan)
    for group in groups:
        if len(group) > 1:
            mine = matrix if len(group) == len(matrix) else matrix[group]
            out[group] = -IsolationForest(random_state=seed).fit(mine).score_samples(mine)
    return out


def within_class(values: Floats, label: Integers) -> Floats:
    """Return each value's rank within its class over the size of that class, in 0 .. 1; ties share theirs."""
    out = np.empty(len(values))
    for group in _classes(label):
        out[group] = (1 + ranks(values[group])) / len(group)
    return out


SELF_INFLUENCE = Scorer(
    name="self-influence",
    needs="gradients",
    what="own contribution C(i, i): hypergradient times own gradient",
    score=score_self_influence,
)
SELF_TRACIN = Scorer(
    name="self-tracin",
    needs="gradients",
    what="TracIn of a sample with itself, over checkpoints",
    score=score_self_tracin,
)
OUTLIER_GRADIENT = Scorer(
    name="outlier-gradient",
    needs="gradients",
    what="gradients that lie far out: by norm or isolation forest",
    score=score_outliers,
    options=("layer", "scorer", "per_class", "normalise", "rows", "seed"),
)
