"""Rules: which suspects are dropped, relabelled or given less weight, and what should be looked at first.

Letters: N training samples, k of them chosen by the rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...storage.errors import InputError, SpecError
from ..reading.decisions import DOWNWEIGHT, DROP, KEEP, RELABEL
from ..reading.unit_values import ClassCounts
from .suspects import LIST, Suspects, no_order, read_list

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FLAGGED = "flagged"
LEAST_WEIGHT = 0.01
"""Weight, before scaling, of a sample whose score is below it: less weight is not no weight."""
MUCH, FEW = 1.5, 5
"""A class is warned of that loses more than so many times its share, and at least so many samples."""

_CUTS = (
    f"must be {FLAGGED}, a share above 0 and below 1 (or 5%), a whole number from 1 to the {{}} judged samples, or a file "
    "that is there with one train_index a line"
)

Cut = str | float | Sequence[int] | Integers
"""Which samples: ``flagged``, a share (below 1, or text such as ``5%``), a number, or a list (file or indices)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rule:
    """What is done, and with which suspects.

    Attributes:
        kind: ``drop``, ``relabel`` or ``downweight``.
        cut: Which.
    """

    kind: str
    cut: Cut


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ruling:
    """What a rule does with every training sample.

    Attributes:
        cut: In words: ``flagged``, ``5%``, a number or ``list``.
        chosen: Train indices that it is for, ascending, (k,).
        action: (N,) text.
        weight: (N,) mean 1 over what is kept, 0: dropped.
        label: (N,) labels afterwards.
        classes: Counts by class.
        warnings: One line each.
        notes: One line each.
    """

    cut: str
    chosen: Integers
    action: npt.NDArray[np.object_]
    weight: Floats
    label: Integers
    classes: tuple[ClassCounts, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def the_rule(drop: Cut | None, relabel: Cut | bool, downweight: Cut | bool) -> Rule:
    """Return the one rule that was given.

    Raises:
        SpecError: None was given, or several.
    """
    given = [
        Rule(kind=kind, cut=FLAGGED if cut is True else cut)
        for kind, cut in ((DROP, drop), (RELABEL, relabel), (DOWNWEIGHT, downweight))
        if cut is not None and cut is not False
    ]
    if len(given) != 1:
        said = " and ".join(f"--{rule.kind}" for rule in given) or "none"
        raise SpecError(
            f"exactly one of --drop, --relabel and --downweight makes a decision, not {said}; give one"
        )
    return given[0]


def apply_rule(rule: Rule, suspects: Suspects) -> Ruling:
    """Return what a rule does.

    Raises:
        InputError: It finds nothing to do, or leaves nothing.
        SpecError: Share or number are out of their range, or a list cannot be read.
    """
    cut, chosen = choose(rule, suspects)
    count = len(suspects.given)
    action = np.full(count, KEEP, dtype=object)
    weight, label = np.ones(count), suspects.given.copy()
    notes: list[str] = []
    if rule.kind == DROP:
        if len(chosen) == count:
            raise InputError(
                f"--drop {cut}: that is all {count} training samples and nothing would be left; drop fewer"
            )
        action[chosen], weight[chosen] = DROP, 0.0
    elif rule.kind == RELABEL:
        chosen = _with_suggestion(chosen, suspects, cut, notes)
        action[chosen], label[chosen] = RELABEL, suspects.suggested[chosen]
    else:
        chosen = _with_score(chosen, suspects, cut, notes)
        action[chosen], weight[chosen] = DOWNWEIGHT, np.maximum(suspects.score[chosen], LEAST_WEIGHT)
    kept = action != DROP
    weight[kept] /= weight[kept].mean()
    classes = _classes(suspects.given, action, label)
    return Ruling(
        cut=cut,
        chosen=chosen,
        action=action,
        weight=weight,
        label=label,
        classes=classes,
        warnings=tuple(_warnings(classes, count)),
        notes=tuple(notes),
    )


def choose(rule: Rule, suspects: Suspects) -> tuple[str, Integers]:
    """Return which samples a cut is for: in words, and their train indices, ascending."""
    cut, what, order = rule.cut, f"--{rule.kind}", suspects.order
    if not isinstance(cut, (str, float, int, np.integer, np.floating)):
        return LIST, read_list(cut, len(suspects.given), what)
    text = cut.strip() if isinstance(cut, str) else str(cut)
    if text == FLAGGED:
        found = np.flatnonzero(suspects.flagged).astype(np.int64)
        if not len(found):
            raise InputError(
                f"{what} {FLAGGED}: detection {suspects.name} flagged none of {len(order)} samples; give a share or a "
                "number, or detect again with another --flag"
            )
        return FLAGGED, found
    number = _number(text)
    if number is None:
        if not Path(text).expanduser().is_file():
            raise SpecError(f"{what} {text}: {_CUTS.format(len(order))}")
        return LIST, read_list(text, len(suspects.given), what)
    if not suspects.scored:
        raise no_order(suspects, f"{what} {text}")
    percent = text.endswith("%")
    if percent or 0 < number < 1:
        share = number / 100 if percent else number
        if not 0 < share < 1:
            raise SpecError(
                f"{what} {text}: a share must be above 0% and below 100% of the {len(order)} judged samples"
            )
        size = max(1, math.floor(share * len(order) + 0.5))
        return f"{100 * share:g}%", np.sort(order[:size])
    if not 1 <= number <= len(order) or number != int(number):
        raise SpecError(f"{what} {text}: {_CUTS.format(len(order))}")
    return str(int(number)), np.sort(order[: int(number)])


def _number(text: str) -> float | None:
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*%?|[+-]?(nan|inf)", text):
        return None
    return float(text.removesuffix("%"))


def _with_suggestion(chosen: Integers, suspects: Suspects, cut: str, notes: list[str]) -> Integers:
    if not suspects.scored:
        raise no_order(suspects, "--relabel")
    there = (suspects.suggested[chosen] >= 0) & (suspects.suggested[chosen] != suspects.given[chosen])
    if not there.any():
        raise InputError(
            f"--relabel {cut}: detection {suspects.name} suggests no other label for any of {len(chosen)} samples; use "
            "--drop or --downweight, or a detection that suggests labels"
        )
    if not there.all():
        notes.append(
            f"{int((~there).sum())} of {len(chosen)} samples have no other label suggested and are kept as they are"
        )
    found: Integers = chosen[there]
    return found


def _with_score(chosen: Integers, suspects: Suspects, cut: str, notes: list[str]) -> Integers:
    if not suspects.scored:
        raise no_order(suspects, "--downweight")
    there = np.isfinite(suspects.score[chosen])
    if not there.any():
        raise InputError(
            f"--downweight {cut}: none of {len(chosen)} samples has a score; choose samples that were judged"
        )
    if not there.all():
        notes.append(f"{int((~there).sum())} of {len(chosen)} samples were not judged and keep their weight")
    found: Integers = chosen[there]
    return found


def _classes(given: Integers, action: npt.NDArray[np.object_], label: Integers) -> tuple[ClassCounts, ...]:
    kept = action != DROP
    names = np.unique(np.concatenate([given, label[kept]]))
    return tuple(
        ClassCounts(
            label=int(name),
            before=int((given == name).sum()),
            dropped=int(((given == name) & ~kept).sum()),
            relabelled=int(((given == name) & (action == RELABEL)).sum()),
            downweighted=int(((given == name) & (action == DOWNWEIGHT)).sum()),
            after=int((kept & (label == name)).sum()),
        )
        for name in names
    )


def _warnings(classes: Sequence[ClassCounts], count: int) -> list[str]:
    lost = sum(one.dropped + one.relabelled for one in classes)
    found = []
    for one in classes:
        mine = one.dropped + one.relabelled
        if one.label < 0 or not mine:
            continue
        fair = lost * one.before / count
        if one.lost > 0.5:
            found.append(
                f"class {one.label} loses {mine} of {one.before} samples, more than half: look at them first"
            )
        elif mine > MUCH * fair and mine >= FEW:
            found.append(
                f"class {one.label} loses {mine} of {one.before} samples, {mine / fair:.1f} times its share: look at "
                "them first"
            )
    return found
