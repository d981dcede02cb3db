"""What a decision is made from: a stored detection, or a list of training samples.

Letters: N training samples, n of them judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ...storage.errors import CorruptStore, IncompleteStage, InputError, SpecError, SpecMismatch
from ..reading.detections import Detection, detection_names, labels_digest, read_detection
from ..reading.reader import Reader
from ..reading.unit_values import DetectionValues
from ..spec.selection import select
from .chosen import chosen_detection

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]
AnyKind = TypeVar("AnyKind", np.int64, np.float64, np.bool_)

LIST = "list"
"""What is said to have judged where a list was given."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Suspects:
    """Every training sample, with what was said of it; (N,) each.

    Attributes:
        name: The detection's, or `LIST`.
        values: How the detection was made; None: there is none.
        given: Labels, -1: none.
        suggested: Label suggested instead, -1: none.
        suspicion: High = bad; NaN where nothing judged.
        score: In 0 .. 1, low = bad; likewise.
        rank: 1 is the most suspicious; 0 where nothing judged.
        flagged: Whether it was flagged.
        reason: In words, "" where nothing was said.
    """

    name: str
    values: DetectionValues | None
    given: Integers
    suggested: Integers
    suspicion: Floats
    score: Floats
    rank: Integers
    flagged: Booleans
    reason: Sequence[str]

    @property
    def order(self) -> Integers:
        """Train indices that were judged, most suspicious first, (n,)."""
        judged = np.flatnonzero(self.rank)
        return judged[np.argsort(self.rank[judged], kind="stable")].astype(np.int64)

    @property
    def scored(self) -> bool:
        """Whether a detection ranked them: a list does not."""
        return self.values is not None


def listed(chosen: str | Sequence[int] | Integers, given: Integers, what: str) -> Suspects:
    """Return the samples of a list as suspects: all flagged, none before another.

    Args:
        chosen: Path of a file with one train index a line, or the indices.
        given: Labels, (N,).
        what: Name of the option, for messages.

    Raises:
        SpecError: See ``spec.selection.select``.
    """
    count = len(given)
    index = read_list(chosen, count, what)
    flagged = np.zeros(count, dtype=bool)
    flagged[index] = True
    unknown = np.full(count, np.nan)
    return Suspects(
        name=LIST,
        values=None,
        given=given,
        suggested=np.full(count, -1, dtype=np.int64),
        suspicion=unknown,
        score=unknown,
        rank=flagged.astype(np.int64),
        flagged=flagged,
        reason=["listed" if one else "" for one in flagged.tolist()],
    )


def read_list(chosen: str | Sequence[int] | Integers, total: int, what: str) -> Integers:
    """Return the positions in a file or sequence, ascending; text is always a file's name here.

    Raises:
        SpecError: There is no such file, or see ``spec.selection.select``.
    """
    if isinstance(chosen, str):
        path = Path(chosen).expanduser()
        if not path.is_file():
            raise SpecError(f"{what} {chosen}: no such file; give a text file with one train_index a line")
        chosen = (
            f"{path.parent}/{path.name}"  # with a folder before it a name such as 5 or 1:3 is a file's, too
        )
    return select(chosen, total=total, labels=None, seed=0, what=what)


def detected(detection: Detection, given: Integers) -> Suspects:
    """Return what a detection says of every training sample.

    Args:
        detection: As stored.
        given: Labels of all samples, (N,).

    Raises:
        SpecMismatch: It was made for other labels.
        CorruptStore: Its table names samples that are not there.
    """
    table, count = detection.table, len(given)
    index = table["train_index"].to_numpy().astype(np.int64)
    if len(index) and (index.min() < 0 or index.max() >= count or len(np.unique(index)) < len(index)):
        raise CorruptStore(
            f"detection {detection.name} does not name each of {count} training samples at most once; detect again"
        )
    made_for = table["given_label"].to_numpy().astype(np.int64)
    other = np.flatnonzero(made_for != given[index])
    if len(other):
        first = index[other[0]]
        raise SpecMismatch(
            f"detection {detection.name} was made for other labels: {len(other)} of {len(index)} differ (train_index "
            f"{first} has label {made_for[other[0]]} there and {given[first]} here); detect again"
        )
    digest = detection.values.labels_sha256
    tracked = given[np.sort(index)]
    if digest is not None and digest not in (labels_digest(given), labels_digest(tracked)):
        raise SpecMismatch(f"detection {detection.name} was made for other labels; detect again")

    def spread(name: str, full: npt.NDArray[AnyKind]) -> npt.NDArray[AnyKind]:
        full[index] = table[name].to_numpy(zero_copy_only=False)
        return full

    reason = [""] * count
    for i, text in zip(index.tolist(), table["reason"].to_pylist(), strict=True):
        reason[i] = text
    return Suspects(
        name=detection.name,
        values=detection.values,
        given=given,
        suggested=spread("suggested_label", np.full(count, -1, dtype=np.int64)),
        suspicion=spread("suspicion", np.full(count, np.nan)),
        score=spread("score", np.full(count, np.nan)),
        rank=spread("rank", np.zeros(count, dtype=np.int64)),
        flagged=spread("is_label_issue", np.zeros(count, dtype=np.bool_)),
        reason=reason,
    )


def choose_detection(run: Reader, name: str | None, note: Callable[[str], None]) -> Detection:
    """Return the detection to decide upon.

    Args:
        run: The run.
        name: Of the detection; None: see `chosen.chosen_detection`.
        note: Is told which was chosen of several.

    Raises:
        IncompleteStage: There is none, or none of that name.
    """
    if name is not None:
        return read_detection(run, name)
    there = detection_names(run)
    if not there:
        raise IncompleteStage(
            f"{run.uri} has no detection to decide upon; make one with `hydra-pipe detect {run.uri}`, or give a list of "
            "train indices with --list"
        )
    found = chosen_detection(run)
    assert found is not None  # there is one
    if len(there) > 1:
        note(
            f"detection {found.name} is taken, the best of {len(there)} that needs no choice ({', '.join(there)}); choose with --detection"
        )
    return found


def no_order(suspects: Suspects, what: str) -> InputError:
    """Return what to raise where a list cannot be cut."""
    return InputError(
        f"{what}: a list has no order, score or suggestion; use --drop flagged, which drops all of {suspects.name}, or a "
        "detection (--detection NAME)"
    )
