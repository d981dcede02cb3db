"""How many of the most suspicious samples are flagged.

No rule is right at shares under 1%: those that flag so few say that each should be looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ...storage.errors import InputError, SpecError
from ..spec.checks import near
from .case import Floats, Integers

Flag = Literal["auto", "known", "two-means", "mixture", "confident", "none"]
FLAGS: tuple[Flag, ...] = get_args(Flag)
UNKNOWN_SHARE = "--flag known: the share of wrong labels is not known; give it with --share, or the wrong samples with --truth FILE"
INSPECT = 0.01
"""Share of flagged samples below which a person should look at each."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Flagged:
    """What a rule flags.

    Attributes:
        rule: Its name; never ``auto``.
        count: How many of the most suspicious.
        cut: Suspicion of the last of them; None: none is flagged.
        separation: Difference of the means of both parts over their pooled standard deviation; None: one part is
            empty, or neither varies.
        inspect: Whether so few are flagged that each should be looked at.
    """

    rule: Flag
    count: int
    cut: float | None
    separation: float | None
    inspect: bool


def check_flag(flag: str, share: float | None) -> Flag:
    """Return a rule's name.

    Raises:
        SpecError: There is no such rule; or a share is out of range, or given to another rule.
    """
    if flag not in FLAGS:
        raise SpecError(f"--flag {flag}: {near(flag, list(FLAGS))}")
    if share is not None and flag not in ("auto", "known"):
        raise SpecError(f"--share {share:g}: {flag} finds its own; leave one of them out")
    if share is not None and not 0 < share < 1:
        raise SpecError(f"--share {share:g}: must be above 0 and below 1, the share of wrong labels")
    return flag


def apply_flag(
    flag: Flag,
    ordered: Floats,
    *,
    share: float | None,
    estimated: Callable[[], int],
    seed: int,
) -> Flagged:
    """Return what a rule flags.

    Args:
        flag: The rule. ``auto`` is ``known`` where the share is, else ``none``.
        ordered: (n,) suspicion, most suspicious first, NaN last.
        share: Of wrong labels, where that is known.
        estimated: Returns how many labels the detector ``confident`` takes for wrong.
        seed: Of two-means and of the mixture.

    Raises:
        InputError: ``known``, and the share is not.
    """
    rule: Flag = flag
    if rule == "auto":
        rule = "none" if share is None else "known"
    said = ordered[~np.isnan(ordered)]
    if rule == "none":
        return Flagged(rule=rule, count=0, cut=None, separation=None, inspect=False)
    if rule == "known":
        if share is None:
            raise InputError(UNKNOWN_SHARE)
        count = round(share * len(ordered))
    elif rule == "confident":
        count = estimated()
    else:
        count = _parted(rule, said, seed)
    count = min(count, len(said))
    return Flagged(
        rule=rule,
        count=count,
        cut=float(said[count - 1]) if count else None,
        separation=separation(said, count),
        inspect=count < INSPECT * len(ordered),
    )


def separation(ordered: Floats, count: int) -> float | None:
    """Return how far the first ``count`` are above the others, in pooled standard deviations."""
    above, below = ordered[:count], ordered[count:]
    if not len(above) or not len(below) or len(ordered) < 3:
        return None
    inside = ((above - above.mean()) ** 2).sum() + ((below - below.mean()) ** 2).sum()
    pooled = float(np.sqrt(inside / (len(ordered) - 2)))
    return float(above.mean() - below.mean()) / pooled if pooled > 0 else None


def _parted(rule: Flag, ordered: Floats, seed: int) -> int:
    """Return how many are in the upper of two parts; none where all are alike."""
    if len(np.unique(ordered)) < 2:
        return 0
    # On the scale of their spread: scikit-learn's tolerances know no contributions of 1e-9.
    values = ((ordered - ordered.mean()) / ordered.std())[:, None]
    part: Integers
    if rule == "two-means":
        from sklearn.cluster import KMeans

        found = KMeans(n_clusters=2, n_init=10, random_state=seed).fit(values)
        part, centre = found.labels_, found.cluster_centers_[:, 0]
    else:
        from sklearn.mixture import GaussianMixture

        mixed = GaussianMixture(2, random_state=seed).fit(values)
        part, centre = mixed.predict(values), mixed.means_[:, 0]
    # A wide component also claims the far lower end: from the top down to the first that is not of the upper part.
    lower = np.flatnonzero(part != centre.argmax())
    return int(lower[0]) if len(lower) else len(ordered)
