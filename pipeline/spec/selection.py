"""Which samples: from what the user wrote to sorted positions in a dataset."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...storage.errors import SpecError
from ...storage.files import read_given

Indices = NDArray[np.int64]

_COUNT = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"([+-]?[0-9]{1,18})?:([+-]?[0-9]{1,18})?")
_SHARE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*%")


def select(
    choice: str | int | Sequence[int] | Indices,
    *,
    total: int,
    labels: Sequence[int] | Indices | None,
    seed: int,
    what: str,
) -> Indices:
    """Return the positions that ``choice`` names, sorted, each once, shape (n,).

    ``choice`` is one of:

    * ``all``: every sample.
    * ``N``: the first N samples.
    * ``A:B``: positions A up to but not B; an end left out is the end of the dataset, a negative one
      counts from it, as in Python. Unlike in Python a position outside the dataset is refused.
    * ``F%``: that share of every class, at least one sample of each, drawn with ``seed``; a larger
      share holds the smaller one. Without labels, that share of all samples.
    * the path of a text file with one position a line; blank lines and ``#`` comments are skipped. A
      file whose name looks like one of the above is written ``./NAME``.
    * a sequence of positions, in any order.

    Args:
        choice: What the user asked for.
        total: Samples in the dataset.
        labels: Class of every sample, shape (total,), or None.
        seed: Seed of the draw of ``F%``.
        what: Name of the option, for messages: ``--track`` or ``--test``.

    Raises:
        SpecError: The choice cannot be read, is empty, names a sample twice or one that is not there.
    """
    if total < 1:
        raise SpecError(f"{what}: the dataset is empty; a run needs at least one sample")
    if isinstance(choice, int):
        choice = str(choice)
    if not isinstance(choice, str):
        return _listed(((f"{what}[{n}]", value) for n, value in enumerate(choice)), total, what)
    text = choice.strip()
    if text == "all":
        return np.arange(total, dtype=np.int64)
    if _COUNT.fullmatch(text):
        return _first(int(text), total, what)
    if match := _RANGE.fullmatch(text):
        return _range(match[1], match[2], text, total, what)
    if match := _SHARE.fullmatch(text):
        return _share(float(match[1]), total, labels, seed, what)
    return _from_file(text, total, what)


def _first(count: int, total: int, what: str) -> Indices:
    if not 1 <= count <= total:
        raise SpecError(f"{what} {count}: must be 1 to {total}, the samples there are; or use all")
    return np.arange(count, dtype=np.int64)


def _range(first: str | None, last: str | None, text: str, total: int, what: str) -> Indices:
    ends = []
    for given, default in ((first, 0), (last, total)):
        position = default if given is None else int(given)
        if not -total <= position <= total:
            raise SpecError(
                f"{what} {text}: {position} is outside a dataset of {total} samples; stay within 0:{total}"
            )
        ends.append(position + total if position < 0 else position)
    if ends[0] >= ends[1]:
        raise SpecError(f"{what} {text}: no sample lies in {ends[0]}:{ends[1]}; A must be below B in A:B")
    return np.arange(ends[0], ends[1], dtype=np.int64)


def _share(
    percent: float, total: int, labels: Sequence[int] | Indices | None, seed: int, what: str
) -> Indices:
    if not 0 < percent <= 100:
        raise SpecError(f"{what} {percent:g}%: must be above 0% and at most 100%")
    classes = np.zeros(total, dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
    if classes.shape != (total,):
        raise SpecError(
            f"{what} {percent:g}%: the recipe gives {classes.size} labels for {total} samples; "
            "labels() must return one a sample, or None"
        )
    # One random key a sample and the smallest keys of every class: shares drawn with one seed nest.
    keys = np.random.Generator(np.random.PCG64(seed)).random(total)
    chosen = []
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        count = max(1, math.floor(percent / 100 * members.size + 0.5))
        chosen.append(members[np.argsort(keys[members], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _from_file(name: str, total: int, what: str) -> Indices:
    try:
        lines = read_given(name, what).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise SpecError(f"{what} {name}: neither all, N, A:B, F% nor a file that exists") from None
    except UnicodeDecodeError:
        raise SpecError(f"{what} {name}: not a text file; write one position a line in UTF-8") from None
    stripped = ((n, line.partition("#")[0].strip()) for n, line in enumerate(lines, start=1))
    return _listed(((f"{name}, line {n}", text) for n, text in stripped if text), total, what)


def _listed(items: Iterable[tuple[str, object]], total: int, what: str) -> Indices:
    seen: dict[int, str] = {}
    for place, value in items:
        index = _integer(value)
        if index is None:
            raise SpecError(f"{place}: {str(value)[:40]!r} is no integer; write one position from 0 a line")
        if not 0 <= index < total:
            raise SpecError(
                f"{place}: {index} is outside 0 to {total - 1}, the positions of {what}; name samples that are there"
            )
        if index in seen:
            raise SpecError(f"{place}: {index} is already at {seen[index]}; name every sample once")
        seen[index] = place
    if not seen:
        raise SpecError(f"{what}: no sample is named; give at least one, or all")
    return np.array(sorted(seen), dtype=np.int64)


def _integer(value: object) -> int | None:
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"[+-]?\d{1,18}", value, re.ASCII) else None
    if isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_)):
        return int(value)
    return None
