"""Who is in which part, and whose label is wrong: choices that depend on their own seed only.

All draws come from ``numpy.random.RandomState``, whose stream NumPy has frozen: a newer NumPy
must not move a sample from the training to the test part of an old run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .data_images import Integers

SPLIT_SEED = 20210202
"""Seed of every built-in split; it is no option, so that indices mean the same in every run."""


def held_out_split(count: int, held_out: int) -> tuple[Integers, Integers]:
    """Return (kept, held out) positions: a random partition of ``count``, both in random order.

    Random order makes the first n of either part a fair sample of it.
    """
    order = np.random.RandomState(SPLIT_SEED).permutation(count).astype(np.int64)
    return order[held_out:], order[:held_out]


def stratified_split(labels: Integers, held_out: int) -> tuple[Integers, Integers]:
    """Return (kept, held out) positions with class shares equal to within one sample.

    Each class gives ``floor(share)`` held-out samples; the classes with the largest remainders
    (ties: the smaller class number) give one more until ``held_out`` is reached. Both parts are in
    random order.
    """
    random = np.random.RandomState(SPLIT_SEED)
    classes, counts = np.unique(labels, return_counts=True)
    # Whole numbers throughout: quotas must not depend on floating-point rounding.
    quotas, remainders = np.divmod(counts * held_out, len(labels))
    for position in np.argsort(-remainders, kind="stable")[: held_out - quotas.sum()]:
        quotas[position] += 1
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    out = random.permutation(np.concatenate(chosen)).astype(np.int64)
    kept = random.permutation(np.setdiff1d(np.arange(len(labels)), out)).astype(np.int64)
    return kept, out


NOISE_KINDS = ("uniform", "permuted", "symmetric", "pairflip", "asymmetric")


def with_label_noise(
    labels: Integers,
    *,
    share: float,
    kind: str,
    seed: int,
    classes: int,
    partners: Mapping[int, int] | None = None,
) -> Integers:
    """Return a copy of ``labels`` (n,) in which some random samples were relabelled.

    Of all samples together, ``round(share * n)`` are chosen by

    - ``"uniform"``, which gives each one of the other ``classes - 1`` classes, all equally likely: every
      chosen label is wrong;
    - ``"permuted"``, which shuffles the chosen samples' labels among themselves and so keeps the class
      counts; about one in ``classes`` then gets its own class again and is not wrong, so the share of
      wrong labels is below ``share``.

    Of every class, ``int(share * size of the class)`` are chosen by

    - ``"symmetric"``, which gives each one of the other classes, all equally likely;
    - ``"pairflip"``, which gives class y the next one, ``(y + 1) % classes``;
    - ``"asymmetric"``, which gives it the class that it is mistaken for, ``partners[y]``; classes without
      a partner stay clean.

    Raising ``share`` with the same seed keeps the samples chosen before and adds to them; they keep their
    labels too, but for ``"permuted"``.
    """
    random = np.random.RandomState(seed)
    noisy = labels.copy()
    if kind in ("symmetric", "pairflip", "asymmetric"):
        order, shift = random.permutation(len(labels)), random.randint(1, classes, size=len(labels))
        for label in range(classes) if kind != "asymmetric" else sorted(partners or {}):
            members = order[labels[order] == label]
            chosen = members[: int(share * len(members))]
            if kind == "symmetric":
                noisy[chosen] = (label + shift[chosen]) % classes
            else:
                noisy[chosen] = (label + 1) % classes if kind == "pairflip" else (partners or {})[label]
        return noisy
    chosen = random.permutation(len(labels))[: round(share * len(labels))]
    if kind == "uniform":
        # One draw a sample of the whole set, so that a larger share gives the earlier ones the same label.
        shift = random.randint(1, classes, size=len(labels))
        noisy[chosen] = (labels[chosen] + shift[chosen]) % classes
    else:
        noisy[chosen] = labels[random.permutation(chosen)]
    return noisy
