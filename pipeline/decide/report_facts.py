"""What a report tells, read from a run: ranked samples, whom they harm, classes, scores and trust.

Letters: R ranked samples shown, Q targets, N training samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pa_dataset

from ...storage import layout
from ...storage.errors import CorruptStore, IncompleteStage
from ..analysis.found import Found, found_curve
from ..analysis.interclass import Interclass, interclass
from ..reading.detections import Detection
from ..reading.panels import targets
from ..spec.targets import TargetSet
from ..vocabulary import MEAN, SAMPLES

if TYPE_CHECKING:
    from ..reading.reader import Reader

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]
Document = Mapping[str, Any]
"""What a run or an analysis says of itself, as JSON has it."""

MOST_ROWS = 8_000
"""Ranked samples that are looked at, at most: more than fit on a page in any case."""

HARMED = 3
"""Test samples that are named for each ranked sample."""

_BATCH_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Harmed:
    """A target that a training sample harms.

    Attributes:
        test_index: Of the test sample; -1: the target is a class or the mean.
        label: Of the target; -1: none.
        contribution: C(i, j), negative.
    """

    test_index: int
    label: int
    contribution: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """One ranked training sample.

    Attributes:
        rank: 1 is the most suspicious.
        train_index: Which it is.
        given: Its label; -1: none.
        suggested: The label that the detection suggests; -1: none.
        score: 0 to 1, low is bad; without a detection C(i).
        flagged: Whether the detection flagged it.
        reason: Why, in words.
        original: The label before it was made wrong on purpose; None: it was not, or nobody knows.
        worst_class: Label of the class that it harms most in the mean; -1: it harms none.
        worst_mean: Mean contribution to that class.
        harmed: The targets that it harms most, most harmed first.
    """

    rank: int
    train_index: int
    given: int
    suggested: int
    score: float
    flagged: bool
    reason: str
    original: int | None
    worst_class: int = -1
    worst_mean: float = 0.0
    harmed: tuple[Harmed, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCount:
    """Samples of a class: of the training set, flagged, wrong on purpose, of the test set."""

    label: int
    train: int
    flagged: int
    wrong: int
    test: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Facts:
    """What a report tells.

    Attributes:
        run: The run.
        method: Whose contributions.
        detection: What ranked the samples; None: they are ranked by C(i).
        ranking: (n,) train indices, most suspicious first.
        rows: The first R of them.
        asked: How many rows were asked for.
        scores: (n,) what they are ranked by: suspicion, or C(i) without a detection.
        truth: What the ranking finds; None: no wrong labels are known.
        counts: By class, ascending.
        interclass: Eq. 23; None: no classes.
        moves: (given, suggested) and how many flagged samples move so; of all judged ones where none is flagged.
        summary: See ``analysis.summary.summary``.
        evaluation: What ``hydra-pipe evaluate`` found; None: it did not run.
        epochs: Passes over the training set; None: unknown.
    """

    run: Reader
    method: str
    detection: Detection | None
    ranking: Integers
    rows: tuple[Ranked, ...]
    asked: int
    scores: Floats
    truth: Found | None
    counts: tuple[ClassCount, ...]
    interclass: Interclass | None
    moves: Mapping[tuple[int, int], int]
    summary: Document
    evaluation: Document | None
    epochs: int | None


def gather(
    run: Reader, method: str, detection: Detection | None, rows: int, progress: Progress | None = None
) -> Facts:
    """Read what a report tells; contributions are streamed once."""
    from ..evaluate.evaluate import read_summary

    table = _ranked(run, method) if detection is None else detection.table.sort_by("rank")
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "reason"}
    ranking = columns["train_index"].astype(np.int64)
    noisy = run.noisy()
    wrong = {} if noisy is None else dict(zip(noisy[0].tolist(), noisy[1].tolist(), strict=True))
    head = table.slice(0, min(rows, MOST_ROWS)).to_pylist()
    held = targets(run, method)
    harm = _contributions(run, method, held, ranking[: len(head)], progress)
    ranked = tuple(_row(row, wrong, held, harm[at].astype(np.float64)) for at, row in enumerate(head))
    try:
        evaluation: Document | None = read_summary(run)
    except IncompleteStage:
        evaluation = None
    epochs = run.trajectory().attrs.get("epochs")
    return Facts(
        run=run,
        method=method,
        detection=detection,
        ranking=ranking,
        rows=ranked,
        asked=min(rows, len(ranking)),
        scores=columns["score" if detection is None else "suspicion"].astype(np.float64),
        truth=_truth(detection, ranking, wrong),
        counts=_counts(run, method, held, columns, wrong),
        interclass=interclass(run, method),
        moves=_moves(columns),
        summary=_summary(run, method),
        evaluation=evaluation,
        epochs=epochs if isinstance(epochs, int) else None,
    )


def _truth(detection: Detection | None, ranking: Integers, wrong: Mapping[int, int]) -> Found | None:
    """Return what the ranking finds; the numbers are those that ``detect`` printed, where it measured the same."""
    found = found_curve(ranking, wrong) if wrong else None
    measured = None if detection is None else detection.values.measures
    if found is None or measured is None or measured["wrong"] != found.wrong:
        return found
    recall = {one["share"]: one["found"]["value"] for one in measured["recall"]}
    return replace(found, auroc=measured["auroc"]["value"], recall=recall)


def _summary(run: Reader, method: str) -> Document:
    from ..analysis.summary import summary

    return summary(run, method)


def _ranked(run: Reader, method: str) -> pa.Table:
    """Return the samples of a method in the form of a detection, lowest C(i) first."""
    table = run.samples(method)
    value = table["contribution"].to_numpy()
    index = table["train_index"].to_numpy()
    order = np.lexsort((index, value))
    n = len(order)
    reasons = [f"mean contribution to the test samples {value[i]:+.3g}" for i in order]
    return pa.table(
        {
            "train_index": index[order],
            "given_label": table["label"].to_numpy()[order],
            "suggested_label": np.full(n, -1, np.int16),
            "score": value[order],
            "rank": np.arange(1, n + 1),
            "is_label_issue": np.zeros(n, bool),
            "reason": reasons,
        }
    )


def _contributions(
    run: Reader, method: str, held: TargetSet, chosen: Integers, progress: Progress | None
) -> npt.NDArray[np.float32]:
    """Return the contributions of R training samples to all targets, (R, Q); streams the table once."""
    if run.noted.kind_of(method) == MEAN or not len(chosen):
        return np.zeros((len(chosen), 0), dtype=np.float32)
    by_sample = run.noted.kind_of(method) == SAMPLES
    key, tests = ("test_index", held.test_index) if by_sample else ("test_label", held.label)
    order = np.sort(chosen)
    place = np.full(int(order[-1]) + 1, -1, dtype=np.int32)
    place[chosen] = np.arange(len(chosen))
    block = np.full((len(chosen), len(tests)), np.nan, dtype=np.float32)
    train = pa_dataset.field("train_index")
    # Row groups without any of them are not read; the rest is sorted out here, which is faster than `isin`.
    wanted = (train >= int(order[0])) & (train <= int(order[-1]))
    dataset = run.contributions(method)
    total, done = (run.noted.n_tracked or 0) * len(tests), 0
    batches = dataset.scanner(
        columns=["train_index", key, "contribution"],
        filter=wanted,
        batch_size=_BATCH_ROWS,
        batch_readahead=2,
        fragment_readahead=1,
    ).to_batches()
    for batch in batches:
        at = batch["train_index"].to_numpy(zero_copy_only=False)
        rows = place[at]
        inside = np.flatnonzero(rows >= 0)
        if len(inside):
            test = np.searchsorted(tests, batch[key].to_numpy(zero_copy_only=False)[inside])
            block[rows[inside], test] = batch["contribution"].to_numpy(zero_copy_only=False)[inside]
        done += batch.num_rows
        if progress is not None:
            progress(done, max(done, total))
    if np.isnan(block).any():
        missing = int(chosen[int(np.flatnonzero(np.isnan(block).any(1))[0])])
        raise CorruptStore(
            f"{run.uri}: method {method} lacks contributions of training sample {missing}, which is ranked; see "
            f"`hydra-pipe verify {run.uri}`, or name the --method that tracks it"
        )
    return block


def _row(row: Document, wrong: Mapping[int, int], held: TargetSet, values: Floats) -> Ranked:
    """Return a ranked sample with whom it harms most."""
    worst: list[Harmed] = []
    label, mean = -1, 0.0
    if len(values):
        order = np.argsort(values, kind="stable")[:HARMED]
        worst = [
            Harmed(
                test_index=int(held.test_index[j]), label=int(held.label[j]), contribution=float(values[j])
            )
            for j in order
            if values[j] < 0
        ]
        known = held.label >= 0
        if known.any():
            counts = np.bincount(held.label[known])
            sums = np.bincount(held.label[known], weights=values[known])
            means = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
            if means.min() < 0:
                label, mean = int(means.argmin()), float(means.min())
    return Ranked(
        rank=int(row["rank"]),
        train_index=int(row["train_index"]),
        given=int(row["given_label"]),
        suggested=int(row["suggested_label"]),
        score=float(row["score"]),
        flagged=bool(row["is_label_issue"]),
        reason=str(row["reason"]),
        original=wrong.get(int(row["train_index"])),
        worst_class=label,
        worst_mean=mean,
        harmed=tuple(worst),
    )


def _counts(
    run: Reader,
    method: str,
    held: TargetSet,
    columns: Mapping[str, npt.NDArray[Any]],
    wrong: Mapping[int, int],
) -> tuple[ClassCount, ...]:
    samples = run.samples(method)
    label, index = samples["label"].to_numpy(), samples["train_index"].to_numpy()
    flagged = columns["given_label"][columns["is_label_issue"].astype(bool)]
    bad = label[np.isin(index, list(wrong))] if wrong else label[:0]
    tests = np.repeat(held.label, held.count)

    def of(labels: Sequence[int] | npt.NDArray[Any]) -> dict[int, int]:
        return dict(zip(*(part.tolist() for part in np.unique(labels, return_counts=True)), strict=True))

    train, marked, known, test = (of(labels) for labels in (label, flagged, bad, tests))
    return tuple(
        ClassCount(
            label=c,
            train=train.get(c, 0),
            flagged=marked.get(c, 0),
            wrong=known.get(c, 0),
            test=test.get(c, 0),
        )
        for c in sorted({*train, *test} - {-1})
    )


def _moves(columns: Mapping[str, npt.NDArray[Any]]) -> dict[tuple[int, int], int]:
    given, suggested = columns["given_label"], columns["suggested_label"]
    flagged = columns["is_label_issue"].astype(bool)
    chosen = (suggested >= 0) & (given >= 0) & (given != suggested)
    if (chosen & flagged).any():
        chosen &= flagged
    pairs, counts = np.unique(np.stack([given[chosen], suggested[chosen]]), axis=1, return_counts=True)
    return {(int(a), int(b)): int(c) for a, b, c in zip(*pairs, counts, strict=True)}


def detection_table(run: Reader, detection: Detection) -> str:
    """Return the address of a detection's table."""
    return run.directory.path(layout.detection(detection.name))
