"""Answers off the contributions of one method: of a test sample, a training sample, two classes, two sets.

Contributions are read in bounded blocks, those of one sample or those that a filter leaves.
Letters: n tracked training samples, M targets.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pa_dataset

from ...storage import layout
from ...storage.errors import CorruptStore, HydraError, InputError
from ..analysis.top import no_such_target
from ..reading.detections import Detection
from ..reading.panels import read_block, targets
from ..spec.targets import TargetSet
from ..vocabulary import CLASSES, MEAN, SAMPLES
from .explanation import ClassTotals, Explanation, Histogram, Influence, Question, SampleFacts, Totals
from .looks import Looks

if TYPE_CHECKING:
    from ..reading.reader import Reader

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BINS = 24
"""Bars of a histogram."""

_BATCH_ROWS = 262_144


class Answers:
    """One method of a run, asked about some of its contributions."""

    def __init__(self, run: Reader, looks: Looks, method: str, k: int, detection: Detection | None) -> None:
        self.run, self.looks, self.method, self.k, self.detection = run, looks, method, k, detection
        table = run.samples(method)
        self.tracked: Integers = table["train_index"].to_numpy().astype(np.int64)
        self.labels: Integers = table["label"].to_numpy().astype(np.int64)
        self.targets: TargetSet = targets(run, method)
        self.ranks: dict[int, tuple[int, bool]] = {}
        if detection is not None:
            columns = (
                detection.table[name].to_pylist() for name in ("train_index", "rank", "is_label_issue")
            )
            self.ranks = {i: (rank, flagged) for i, rank, flagged in zip(*columns, strict=True)}
        noisy = run.noisy()
        self.original: dict[int, int] = (
            {} if noisy is None else dict(zip(noisy[0].tolist(), noisy[1].tolist(), strict=True))
        )

    # ------------------------------------------------------------------ questions

    def test(self, test: int) -> Explanation:
        """Explain the prediction of a test sample."""
        self._needs_samples(f"test sample {test}")
        at = int(self._places(self.targets.test_index, [test], "test sample", "--test")[0])
        values = read_block(self.run, self.method, self.tracked, self.targets, slice(at, at + 1))[:, 0]
        subject = self._facts("test", test)

        def row(i: int, value: float) -> tuple[int, int, int, int, float]:
            return int(self.tracked[i]), int(self.labels[i]), test, subject.label, value

        return self._explanation(
            "test",
            f"the prediction of test sample {test}",
            values,
            row,
            groups=self.labels,
            subject=subject,
            option=f"--test {test}",
            where=f"test_index = {test}",
        )

    def train(self, train: int) -> Explanation:
        """Explain what a training sample did to every target."""
        at = int(self._places(self.tracked, [train], "training sample", "--track")[0])
        held = self.targets
        whole = slice(0, len(held))
        values = read_block(self.run, self.method, self.tracked[at : at + 1], held, whole)[0]
        label = int(self.labels[at])

        def row(j: int, value: float) -> tuple[int, int, int, int, float]:
            return train, label, int(held.test_index[j]), int(held.label[j]), value

        return self._explanation(
            "train",
            f"what training sample {train} did",
            values,
            row,
            groups=held.label,
            subject=self._facts("train", train),
            option=f"--train {train}",
            where=f"train_index = {train}",
        )

    def classes(self, train_class: int, test_class: int) -> Explanation:
        """Sum what the samples of one class did to those of another."""
        if self.run.noted.kind_of(self.method) == MEAN:
            raise no_such_target(self.run, self.method, f"class {test_class}", (SAMPLES, CLASSES))
        for label, known, what in (
            (train_class, self.labels, "training"),
            (test_class, self.targets.label, "test"),
        ):
            if label < 0 or label not in known:
                there = ", ".join(map(str, np.unique(known[known >= 0]).tolist()))
                raise InputError(
                    f"class {label}: method {self.method} of {self.run.uri} has {what} samples of "
                    + (
                        f"classes {there}; choose one of them"
                        if there
                        else "no class; use --train-set and --test-set"
                    )
                )
        wanted = (pa_dataset.field("train_label") == train_class) & (
            pa_dataset.field("test_label") == test_class
        )
        return self._streamed(
            "classes",
            f"training class {train_class} to test class {test_class}",
            wanted,
            int((self.labels == train_class).sum()) * int((self.targets.label == test_class).sum()),
            option=f"--classes {train_class},{test_class}",
            where=f"train_label = {train_class} AND test_label = {test_class}",
        )

    def sets(self, train: Sequence[int], test: Sequence[int]) -> Explanation:
        """Sum what some training samples did to some test samples."""
        self._needs_samples("a set of test samples")
        train, test = sorted(set(map(int, train))), sorted(set(map(int, test)))
        if not train or not test:
            raise InputError("a set holds no sample; give at least one training and one test sample")
        self._places(self.tracked, train, "training sample", "--track")
        self._places(self.targets.test_index, test, "test sample", "--test")
        wanted = pa_dataset.field("train_index").isin(pa.array(train, pa.int32()))
        wanted = wanted & pa_dataset.field("test_index").isin(pa.array(test, pa.int32()))
        return self._streamed(
            "sets",
            f"{len(train):,} training samples to {len(test):,} test samples",
            wanted,
            len(train) * len(test),
            option="--train-set FILE --test-set FILE",
            where=f"train_index IN ({_few(train)}) AND test_index IN ({_few(test)})",
        )

    # ------------------------------------------------------------------ parts

    def _explanation(
        self,
        question: Question,
        asked: str,
        values: Floats,
        row: Any,
        *,
        groups: Integers,
        subject: SampleFacts,
        option: str,
        where: str,
    ) -> Explanation:
        """Sum up values that are all at hand."""
        totals = _totals(values)
        order = np.argsort(-values, kind="stable")
        best = [row(int(i), float(values[i])) for i in order[: self.k] if values[i] > 0]
        worst = [row(int(i), float(values[i])) for i in order[::-1][: self.k] if values[i] < 0]
        counts, edges = np.histogram(values, BINS)
        by_class = tuple(
            ClassTotals(label=int(label), totals=_totals(values[groups == label]))
            for label in np.unique(groups)
        )
        histogram = Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))
        return self._finished(
            question,
            asked,
            totals,
            best,
            worst,
            subject,
            option,
            where,
            by_class=by_class,
            histogram=histogram,
        )

    def _streamed(
        self, question: Question, asked: str, wanted: Any, expected: int, *, option: str, where: str
    ) -> Explanation:
        """Sum up the contributions that a filter leaves, batch by batch."""
        names = ["train_index", "train_label", "test_index", "test_label", "contribution"]
        totals, best, worst = Totals(), list[Any](), list[Any]()
        for columns in self._batches(names, wanted):
            values = columns[-1].astype(np.float64)
            totals = _joined(totals, _totals(values))
            order = np.argsort(-values, kind="stable")
            chosen = np.unique(np.concatenate([order[: self.k], order[-self.k :]]))
            rows = [(*(int(c[i]) for c in columns[:-1]), float(values[i])) for i in chosen]
            best = sorted([*best, *(r for r in rows if r[-1] > 0)], key=lambda r: (-r[-1], r[:-1]))[: self.k]
            worst = sorted([*worst, *(r for r in rows if r[-1] < 0)], key=lambda r: (r[-1], r[:-1]))[: self.k]
        if totals.pairs != expected:
            raise CorruptStore(
                f"{self.run.uri}: {asked} are {totals.pairs:,} contributions and {expected:,} were expected; see "
                f"`hydra-pipe verify {self.run.uri}`"
            )
        return self._finished(question, asked, totals, best, worst, None, option, where)

    def _batches(self, names: list[str], wanted: Any) -> Iterator[list[npt.NDArray[Any]]]:
        dataset = self.run.contributions(self.method)
        batches = dataset.to_batches(
            columns=names, filter=wanted, batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=1
        )
        for batch in batches:
            if batch.num_rows:
                yield [batch[name].to_numpy(zero_copy_only=False) for name in names]

    def _finished(
        self,
        question: Question,
        asked: str,
        totals: Totals,
        best: Sequence[Any],
        worst: Sequence[Any],
        subject: SampleFacts | None,
        option: str,
        where: str,
        **more: Any,
    ) -> Explanation:
        helpful, harmful = self._influences(best, totals), self._influences(worst, totals)
        named: dict[tuple[Any, int], None] = {}
        for one in (*helpful, *harmful):
            named |= {("train", one.train_index): None}
            named |= {("test", one.test_index): None} if one.test_index >= 0 else {}
        if subject is not None:
            named.pop((subject.part, subject.index), None)
        samples = [self._facts(part, index) for part, index in named]
        whole = self._confident([*([] if subject is None else [subject]), *samples])
        path = self.run.directory.path(layout.table_parts("contributions", self.method))
        return Explanation(
            run=self.run.uri,
            recipe=self.run.recipe,
            method=self.method,
            question=question,
            asked=asked,
            subject=whole[0] if subject is not None else None,
            totals=totals,
            helpful=helpful,
            harmful=harmful,
            samples=tuple(whole[subject is not None :]),
            detection=None if self.detection is None else self.detection.name,
            command=f"hydra-pipe explain {shlex.quote(self.run.uri)} {option} --method {self.method} -k {self.k}",
            query=f"SELECT * FROM read_parquet('{_sql(path)}') WHERE {where} ORDER BY contribution DESC;",
            **more,
        )

    def _influences(self, rows: Sequence[Any], totals: Totals) -> tuple[Influence, ...]:
        found: list[Influence] = []
        for rank, (train, train_label, test, test_label, value) in enumerate(rows, start=1):
            side = totals.positive if value > 0 else totals.negative
            found.append(
                Influence(
                    rank=rank,
                    train_index=train,
                    train_label=train_label,
                    test_index=test,
                    test_label=test_label,
                    contribution=value,
                    share=abs(value) / totals.absolute,
                    share_of_side=value / side,
                    suspicion_rank=self.ranks.get(train, (None, False))[0],
                )
            )
        return tuple(found)

    def _facts(self, part: Any, index: int) -> SampleFacts:
        """Return what the run knows of a sample."""
        shown = self.looks.look(part, index)
        text = shown if isinstance(shown, str) else None
        if part == "train":
            at = int(np.searchsorted(self.tracked, index))
            rank, flagged = self.ranks.get(index, (None, None))
            return SampleFacts(
                part=part,
                index=index,
                label=int(self.labels[at]),
                original_label=self.original.get(index),
                suspicion_rank=rank,
                flagged=flagged,
                text=text,
            )
        stored = self._test_columns
        places = np.flatnonzero(stored["test_index"] == index) if stored else np.zeros(0, int)
        if not len(places):
            held = self.targets
            at = int(np.flatnonzero(held.test_index == index)[0])
            return SampleFacts(part=part, index=index, label=int(held.label[at]), text=text)
        at, loss = int(places[0]), float(stored["loss"][int(places[0])])
        label = int(stored["label"][at])
        # Right where the loss is a cross entropy; the forward pass, where there is one, has the last word.
        own = float(np.exp(-loss)) if label >= 0 and loss >= 0 else None
        return SampleFacts(
            part=part,
            index=index,
            label=label,
            predicted=int(stored["prediction"][at]),
            loss=loss,
            label_confidence=own,
            text=text,
        )

    @cached_property
    def _test_columns(self) -> Mapping[str, npt.NDArray[Any]]:
        try:
            store = self.run.test_gradients()
        except HydraError:  # an estimator that needs no test gradients
            return {}
        return {name: store.column(name) for name in ("test_index", "loss", "label", "prediction")}

    def _confident(self, samples: Sequence[SampleFacts]) -> list[SampleFacts]:
        """Return the samples with what the trained model says of them, where it can be asked."""
        if self.looks.trained is None:
            return list(samples)
        found: list[SampleFacts] = []
        for one in samples:
            outputs = self.looks.outputs(one.part, [one.index])
            assert outputs is not None
            row = None if outputs.probability is None else outputs.probability[0]
            predicted = int(outputs.prediction[0])
            # Outputs are scores of classes only where there are classes.
            own = float(row[one.label]) if row is not None and 0 <= one.label < len(row) else None
            best = (
                float(row[predicted])
                if row is not None and own is not None and 0 <= predicted < len(row)
                else None
            )
            found.append(
                replace(
                    one,
                    predicted=predicted,
                    loss=float(outputs.loss[0]),
                    label_confidence=own,
                    confidence=best,
                )
            )
        return found

    def _needs_samples(self, asked: str) -> None:
        if self.run.noted.kind_of(self.method) != SAMPLES:
            raise no_such_target(self.run, self.method, asked, (SAMPLES,))

    def _places(self, held: Integers, wanted: Sequence[int], what: str, option: str) -> Integers:
        """Return where samples are among those that the method holds, ascending."""
        at = np.searchsorted(held, wanted)
        missing = [index for index, p in zip(wanted, at, strict=True) if p >= len(held) or held[p] != index]
        if missing:
            raise InputError(
                f"{what} {missing[0]} is not in {self.run.uri} ({self.method}), which holds {len(held):,}, from "
                f"{held.min()} to {held.max()}; choose one of them, or run again with another {option}"
            )
        return at


def _totals(values: Floats) -> Totals:
    up, down = values > 0, values < 0
    return Totals(
        pairs=len(values),
        sum=float(values.sum()),
        positive=float(values[up].sum()),
        negative=float(values[down].sum()),
        helpful=int(up.sum()),
        harmful=int(down.sum()),
    )


def _joined(one: Totals, other: Totals) -> Totals:
    names = ("pairs", "sum", "positive", "negative", "helpful", "harmful")
    return Totals(**{name: getattr(one, name) + getattr(other, name) for name in names})


def _few(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:20])) + (", ..." if len(indices) > 20 else "")


def _sql(path: str) -> str:
    return path.replace("'", "''")
