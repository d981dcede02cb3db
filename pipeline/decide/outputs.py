"""Detectors that look at what the trained model makes of the samples: neighbours among the features.

Letters: n judged samples, F features, C classes, k neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...storage.errors import InputError, SpecError
from .case import Case, Scorer, Scores
from .passes import aligned

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def score_neighbours(case: Case) -> Scores:
    """Judge by the labels of the k nearest samples in the space of the last layer's inputs.

    Features are standardised, nearness is their cosine. With c of k neighbours labelled otherwise, and w the share of
    those in the sum of the k similarities, the suspicion is ``(c + w) / (k + 1)``: by c, and among equal c by nearness.

    Costs a forward pass a sample, once, and n^2 F multiplications.

    Raises:
        InputError: A label is missing, or there is one class or one sample alone.
    """
    k = case.options.neighbours
    if k < 1:
        raise SpecError(f"neighbours {k}: must be at least 1")
    check_labels(case, "knn")
    found = case.passes.outputs()
    at = aligned(case.tracked, found.train_index, case.run.uri)
    near, similar = neighbours(found.feature[at], min(k, case.n - 1))
    return vote(case.given, near, similar)


def check_labels(case: Case, by: str) -> None:
    """Raise where a detector that compares labels has nothing to compare.

    Raises:
        InputError: Says what is missing.
    """
    if case.n < 2:
        raise InputError(f"{by}: {case.n} sample is judged, and it takes at least 2 to compare; track more")
    if (case.given < 0).any():
        missing = int((case.given < 0).sum())
        raise InputError(
            f"{by}: {missing:,} of {case.n:,} samples have no label; give the recipe labels(), or use another --by"
        )
    if len(np.unique(case.given)) < 2:
        raise InputError(f"{by}: all {case.n:,} samples have label {int(case.given[0])}; it takes 2 classes")


def neighbours(feature: npt.NDArray[np.floating], k: int) -> tuple[Integers, Floats]:
    """Return the k nearest others of each row, nearest first, and how similar they are, 0 .. 1: both (n, k)."""
    from sklearn.neighbors import NearestNeighbors

    wide = feature.astype(np.float64)
    spread = wide.std(0)
    wide -= wide.mean(0)
    wide /= np.where(spread > 0, spread, 1.0)  # a dead unit says nothing
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    wide /= np.where(length > 0, length, 1.0)
    # Of rows of norm 1, d^2 = 2 - 2 cosine: the same order, and scikit-learn searches it in small blocks.
    distance, near = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(wide).kneighbors()
    return near.astype(np.int64), 1 - np.clip(distance, 0, 2) ** 2 / 4


def vote(label: Integers, near: Integers, similar: Floats) -> Scores:
    """Return what neighbours say: (n,) labels, (n, k) neighbours and their similarity."""
    n, k = near.shape
    classes, given = np.unique(label, return_inverse=True)
    count, weight = np.zeros((n, len(classes))), np.zeros((n, len(classes)))
    for column in range(k):
        votes = given[near[:, column]]
        count[np.arange(n), votes] += 1
        weight[np.arange(n), votes] += similar[:, column]
    rows = np.arange(n)
    total = weight.sum(1)
    others = np.where(total > 0, (total - weight[rows, given]) / np.where(total > 0, total, 1), 0.0)
    different = k - count[rows, given]
    favoured = (count + weight / (k + 1)).argmax(1)  # the nearer ones decide between as many
    suggested = np.where(favoured != given, classes[favoured], -1)
    reason = [
        f"{int(c)} of {k} nearest samples have another label, {int(count[i, f])} of them {int(classes[f])}"
        if f != given[i]
        else f"{int(c)} of {k} nearest samples have another label"
        for i, (c, f) in enumerate(zip(different, favoured, strict=True))
    ]
    return Scores(
        suspicion=(different + others) / (k + 1),
        suggested=suggested.astype(np.int64),
        reason=reason,
        notes={"neighbours": k},
    )


KNN = Scorer(
    name="knn",
    needs="outputs",
    what="labels of the nearest samples among the last layer's inputs",
    score=score_neighbours,
    options=("neighbours",),
)
