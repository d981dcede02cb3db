"""The paper's second experiment: two clusters of signs of contributions within each given class.

Letters: n judged samples, n_c of a given class, q test samples looked at.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...storage.errors import InputError
from ..vocabulary import SAMPLES
from .case import Booleans, Case, Floats, Integers, Scores
from .contributions import method_of, own_targets, selected_panels, streamed

MOST_TESTS = 1000
"""Test samples whose contributions are clustered."""
LEAST = 4
"""Samples of a class from which on it is clustered."""
MOST_LINKED = 10_000
"""Samples of a class that average linkage takes: all their distances are held at once."""


def cluster(case: Case) -> Scores:
    """Return on which side of two clusters each sample lies, and how far: above 0 in the wrong one.

    The signs (+1, -1) of C(i, j) for up to `MOST_TESTS` test samples, each column standardised within the class,
    are parted into two clusters. With distances a to the middle of the right cluster and b to that of the wrong
    one, the suspicion is (a - b) / (a + b), plus 1 in the wrong cluster, minus 1 in the right one.

    Raises:
        InputError: There are no given labels, or no contributions to single test samples; or a class is too large
            for average linkage.
    """
    own = own_targets(case)
    if own.kind != SAMPLES:
        raise InputError(
            f"cluster looks at single test samples, and {method_of(case)} of {case.run.uri} has targets {own.kind!r}; "
            "name a method with targets 'samples', or another detector"
        )
    if not (case.given >= 0).any():
        raise InputError(
            f"cluster parts each given class in two, and the training samples of {case.run.uri} have no labels; "
            "give the recipe a labels() method, or name another detector"
        )
    signs = _signs(case, len(own))
    suspicion, small, alike, by_size = np.full(case.n, np.nan), [], [], []
    for label in np.unique(case.given[case.given >= 0]).tolist():
        at = np.flatnonzero(case.given == label)
        if len(at) < LEAST:
            small.append(label)
            continue
        rows = signs[at].astype(np.float32)
        rows -= rows.mean(0)
        spread = rows.std(0)
        rows /= np.where(spread > 0, spread, 1)
        if not spread.any():
            alike.append(label)
            continue
        second = _parted(case, rows, label)
        wrong, sized = _wrong_part(case, at, second, label)
        if sized and case.options.wrong_cluster != "smaller":
            by_size.append(label)
        suspicion[at] = _sides(rows, wrong)
    return Scores(
        suspicion=suspicion,
        suggested=np.full(case.n, -1, dtype=np.int64),
        reason=[_reason(s) for s in suspicion.tolist()],
        notes={
            "tests": signs.shape[1],
            "clusters": case.options.clusters,
            "wrong_cluster": case.options.wrong_cluster,
            "too_small": small,
            "all_alike": alike,
            "named_by_size": by_size,
        },
    )


def jaccard(suspicion: Floats, given: Integers, wrong: Booleans) -> dict[str, object]:
    """Return how well the two parts of each class agree with the truth: the paper's Table 4.

    The Jaccard index is |A and B| / |A or B|, A being the samples of a part and B those it should hold.

    Args:
        suspicion: (n,) of `cluster`: above 0 in the wrong cluster; NaN: not clustered.
        given: (n,) given labels.
        wrong: (n,) whether the label is really wrong.

    Returns:
        ``classes`` (``label``, ``correct`` and ``wrong`` each), and the means ``correct`` and ``wrong``.
    """
    rows = []
    for label in np.unique(given[np.isfinite(suspicion)]).tolist():
        at = (given == label) & np.isfinite(suspicion)
        part, truth = suspicion[at] > 0, wrong[at]
        rows.append({"label": label, "correct": _overlap(~part, ~truth), "wrong": _overlap(part, truth)})
    means = {
        key: float(np.mean([row[key] for row in rows])) if rows else None for key in ("correct", "wrong")
    }
    return {**means, "classes": rows}


def _overlap(a: Booleans, b: Booleans) -> float:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def _signs(case: Case, count: int) -> npt.NDArray[np.int8]:
    """Return the signs of the contributions to the chosen test samples, (n, q); 0 counts as +1."""
    looked = np.arange(count) if case.selecting is None else case.selecting
    if len(looked) > MOST_TESTS:
        draw = np.random.Generator(np.random.PCG64(case.options.seed))
        looked = np.sort(draw.choice(looked, MOST_TESTS, replace=False))
    signs = np.empty((case.n, len(looked)), dtype=np.int8)
    for at, block in selected_panels(case):
        chosen = np.isin(at, looked)
        signs[:, np.searchsorted(looked, at[chosen])] = np.where(block[:, chosen] < 0, -1, 1)
    return signs


def _parted(case: Case, rows: npt.NDArray[np.float32], label: int) -> Booleans:
    """Return which samples of a class are in the second of two clusters."""
    if case.options.clusters == "average":
        if len(rows) > MOST_LINKED:
            raise InputError(
                f"class {label} has {len(rows):,} samples, and average linkage holds the distances of all pairs: at "
                f"most {MOST_LINKED:,} samples a class; use kmeans"
            )
        from sklearn.cluster import AgglomerativeClustering

        found = AgglomerativeClustering(n_clusters=2, metric="cosine", linkage="average").fit_predict(rows)
    else:
        from sklearn.cluster import KMeans

        found = KMeans(n_clusters=2, n_init=10, random_state=case.options.seed).fit_predict(rows)
    second: Booleans = np.asarray(found) == 1
    return second


def _wrong_part(case: Case, at: Integers, second: Booleans, label: int) -> tuple[Booleans, bool]:
    """Return which samples of a class are in the cluster that is called wrong, and whether its size said so.

    No truth is asked. Of two of one size the one without the class's first sample is called wrong.
    """
    chosen, lower = case.options.wrong_cluster, None
    if chosen == "harm":
        lower = -streamed(case).harm[at]
    elif chosen == "contribution" and label in (found := streamed(case)).classes:
        lower = found.by_class[at, np.searchsorted(found.classes, label)]
    if lower is not None:
        return (second if lower[second].mean() < lower[~second].mean() else ~second), False
    size = int(second.sum())
    smaller = size < len(at) - size or (2 * size == len(at) and not second[0])
    return (second if smaller else ~second), True


def _sides(rows: npt.NDArray[np.float32], wrong: Booleans) -> Floats:
    """Return the signed distances of the samples of a class, (n_c,)."""
    to_right, to_wrong = (
        np.linalg.norm(rows - rows[part].mean(0), axis=1).astype(np.float64) for part in (~wrong, wrong)
    )
    both = to_right + to_wrong
    side: Floats = np.where(wrong, 1.0, -1.0) + (to_right - to_wrong) / np.where(both > 0, both, 1)
    return side


def _reason(suspicion: float) -> str:
    if np.isnan(suspicion):
        return "its class was not clustered"
    return f"clusters with those called {'wrong' if suspicion > 0 else 'right'}"
