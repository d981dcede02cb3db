"""Decisions: what was made of suspicions, read from a run or from a folder that somebody copied.

A decision belongs to the labels it was made for: `Decision.check` refuses others.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...storage import layout
from ...storage.arrays import Source
from ...storage.documents import load
from ...storage.errors import CorruptStore, IncompleteStage, InputError, SpecMismatch
from ...storage.files import read_bytes
from ...storage.schemas import DECISION
from ...storage.tables import read_table
from ...storage.typed import from_json
from ...storage.uri import check_uri, join
from ..vocabulary import CLEAN
from .detections import labels_digest
from .unit_values import DecisionValues

if TYPE_CHECKING:
    from .reader import Reader

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

KEEP, DROP, RELABEL, DOWNWEIGHT = "keep", "drop", "relabel", "downweight"
"""What is done with a sample: column ``action``. The last three are the rules, too."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decision:
    """What to do with each of N training samples.

    Attributes:
        name: Of the decision.
        folder: Where it was read from.
        table: One row a training sample, ascending; see ``storage.schemas.DECISION``.
        weights: (N,) float64: 0 for what is dropped, mean 1 over what is kept.
        values: What it was made from and for.
    """

    name: str
    folder: str
    table: pa.Table
    weights: Floats
    values: DecisionValues

    @property
    def keep(self) -> Integers:
        """Train indices that stay, ascending."""
        return np.flatnonzero(self._action() != DROP).astype(np.int64)

    @property
    def drop(self) -> Integers:
        """Train indices that go, ascending."""
        return np.flatnonzero(self._action() == DROP).astype(np.int64)

    @property
    def relabel(self) -> dict[int, int]:
        """New label by train index, of those that get one."""
        index = np.flatnonzero(self._action() == RELABEL)
        label = self.table["suggested_label"].to_numpy()[index]
        return dict(zip(index.tolist(), label.astype(int).tolist(), strict=True))

    def check(self, labels: Sequence[int] | npt.ArrayLike) -> None:
        """Refuse labels that are not those which the decision was made for.

        Args:
            labels: One a training sample, in the order of ``train_index``; -1: none.

        Raises:
            SpecMismatch: They are others; says how many samples, or which label differs first.
            InputError: They are no integers, one a sample.
        """
        given = np.asarray(labels)
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
            raise InputError(
                f"labels of shape {given.shape} and type {given.dtype}: give one integer a training sample, -1 for none"
            )
        if labels_digest(given) == self.values.labels_sha256:
            return
        made = f"decision {self.name} was made for other data"
        if len(given) != self.values.n_train:
            raise SpecMismatch(
                f"{made}: {self.values.n_train} labels, and these are {len(given)}; make one for these with hydra-pipe clean"
            )
        known = self.table["given_label"].to_numpy().astype(np.int64)
        other = np.flatnonzero(known != given)
        first = f"train_index {other[0]} has label {known[other[0]]} there and {given[other[0]]} here"
        raise SpecMismatch(
            f"{made}: {len(other)} of {len(given)} labels differ ({first}); make one for these with hydra-pipe clean"
        )

    def relabelled(self, labels: Sequence[int] | npt.ArrayLike) -> Integers:
        """Return ``labels`` with those that the decision replaces, (N,); see `check` for what is refused."""
        self.check(labels)
        found = np.array(labels, dtype=np.int64)
        changed = self.relabel
        found[list(changed)] = list(changed.values())
        return found

    def _action(self) -> npt.NDArray[np.object_]:
        return np.asarray(self.table["action"].to_pylist(), dtype=object)


def load_decision(
    folder: str, labels: Sequence[int] | npt.ArrayLike | None = None, *, source: Source = read_bytes
) -> Decision:
    """Return the decision in a folder, whole or not at all; it needs no run.

    Args:
        folder: Path or address of ``decisions/<name>``, or of a copy.
        labels: Of the data it is to be used with; None: not checked.
        source: What reads its files; that of a run goes by the run's manifests.

    Raises:
        IncompleteStage: There is no decision.
        CorruptStore: A file was changed after it was written, or files contradict each other.
        SpecMismatch: It was made for other labels.
    """
    place = check_uri(folder)

    def read(name: str) -> bytes:
        try:
            return source(join(place, name))
        except FileNotFoundError:
            raise IncompleteStage(
                f"{place} holds no whole decision: {name} is missing; copy the whole folder, or run hydra-pipe clean"
            ) from None

    document = load(read(layout.DECISION_MANIFEST), join(place, layout.DECISION_MANIFEST))
    values = from_json(DecisionValues, document, join(place, layout.DECISION_MANIFEST))
    data = {name: read(name) for name in values.sha256}
    for name, content in data.items():
        if hashlib.sha256(content).hexdigest() != values.sha256[name]:
            raise CorruptStore(
                f"{join(place, name)} is not the file that {layout.DECISION_MANIFEST} speaks of; copy the folder again, "
                "or run hydra-pipe clean with --overwrite"
            )
    try:
        table = read_table(
            join(place, layout.DECISION_TABLE), DECISION, source=lambda uri: data[layout.DECISION_TABLE]
        )
        weights = np.load(io.BytesIO(data[layout.SAMPLE_WEIGHTS]), allow_pickle=False)
    except (KeyError, ValueError, EOFError, OSError) as error:
        raise CorruptStore(
            f"{place}: cannot be read ({error}); run hydra-pipe clean with --overwrite"
        ) from None
    found = Decision(name=place.rsplit("/", 1)[-1], folder=place, table=table, weights=weights, values=values)
    problems = contradictions(found, data)
    if problems:
        raise CorruptStore(f"{place}: {problems[0]}; run hydra-pipe clean with --overwrite")
    if labels is not None:
        found.check(labels)
    return found


def decision_names(run: Reader) -> list[str]:
    """Return the names of the decisions that a run holds, ascending."""
    return run.directory.units(CLEAN)


def read_decision(run: Reader, name: str) -> Decision:
    """Return a decision of a run.

    Raises:
        IncompleteStage: The run has none of that name.
        CorruptStore: See `load_decision`.
    """
    there = decision_names(run)
    if name not in there:
        raise IncompleteStage(
            f"{run.uri} has no decision {name!r}; it has {', '.join(there) or 'none'}; make one with "
            f"`hydra-pipe clean {run.uri} --drop flagged`"
        )
    return load_decision(run.directory.path(layout.decision_folder(name)), source=run.directory.vouched)


def contradictions(decision: Decision, data: dict[str, bytes]) -> list[str]:
    """Return how the files of a decision contradict each other, one line each.

    Args:
        decision: As read.
        data: Contents of its files by name.
    """
    found: list[str] = []
    count, weights = decision.values.n_train, decision.weights
    if not np.array_equal(decision.table["train_index"].to_numpy(), np.arange(count)):
        return [f"{layout.DECISION_TABLE} does not hold train_index 0 to {count - 1}"]
    for name, expected in ((layout.KEEP_LIST, decision.keep), (layout.DROP_LIST, decision.drop)):
        if data.get(name) != numbers(expected):
            found.append(f"{name} does not hold what {layout.DECISION_TABLE} says")
    if weights.shape != (count,) or weights.dtype != np.float64:
        return [
            *found,
            f"{layout.SAMPLE_WEIGHTS} holds {weights.dtype} of shape {weights.shape}, not ({count},)",
        ]
    if not np.array_equal(weights, decision.table["weight"].to_numpy()):
        found.append(f"{layout.SAMPLE_WEIGHTS} does not hold the weights of {layout.DECISION_TABLE}")
    if not np.isfinite(weights).all() or (weights[decision.drop] != 0).any() or (weights < 0).any():
        found.append(
            f"{layout.SAMPLE_WEIGHTS} is not 0 where samples are dropped, and not finite or negative elsewhere"
        )
    elif len(decision.keep) and abs(weights[decision.keep].mean() - 1) > 1e-9:
        found.append(
            f"{layout.SAMPLE_WEIGHTS} has mean {weights[decision.keep].mean():.6g} over what is kept, not 1"
        )
    if labels_digest(decision.table["given_label"].to_numpy()) != decision.values.labels_sha256:
        found.append(f"the labels of {layout.DECISION_TABLE} are not those of {layout.DECISION_MANIFEST}")
    changed = decision.relabel
    if (layout.NEW_LABELS in data) != (decision.values.rule == RELABEL):
        found.append(f"{layout.NEW_LABELS} is there without a reason, or missing")
    elif layout.NEW_LABELS in data and data[layout.NEW_LABELS] != new_labels(changed):
        found.append(f"{layout.NEW_LABELS} does not hold what {layout.DECISION_TABLE} says")
    return found


def numbers(index: Integers) -> bytes:
    """Return a list as other tools read it: one number a line."""
    return "".join(f"{i}\n" for i in index.tolist()).encode()


def new_labels(changed: dict[int, int]) -> bytes:
    """Return new labels as CSV."""
    return ("train_index,label\n" + "".join(f"{i},{label}\n" for i, label in changed.items())).encode()
