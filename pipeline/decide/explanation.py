"""What an explanation says: which training samples speak for a prediction, or whom a training sample moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Question = Literal["test", "train", "classes", "sets"]
"""One test sample, one training sample, a class by a class, or a set by a set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFacts:
    """What is known of a sample.

    Attributes:
        part: ``train`` or ``test``.
        index: Its train_index or test_index.
        label: Its given label; -1: none.
        original_label: What the label was before it was made wrong on purpose; None: it was not, or nobody knows.
        predicted: Class that the trained model predicts; -1: none. Of training samples only where a recipe is at hand.
        loss: At the trained weights.
        label_confidence: Probability that the model gives to the label.
        confidence: Probability that it gives to the class that it predicts.
        suspicion_rank: In the detection, 1 the most suspicious; None: it was not judged.
        flagged: Whether the detection flagged it.
        text: The recipe's own rendering, where that is a text.
        picture: File of its picture, where pictures were written.
    """

    part: Literal["train", "test"]
    index: int
    label: int
    original_label: int | None = None
    predicted: int = -1
    loss: float | None = None
    label_confidence: float | None = None
    confidence: float | None = None
    suspicion_rank: int | None = None
    flagged: bool | None = None
    text: str | None = None
    picture: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Influence:
    """One contribution among those that are looked at.

    Attributes:
        rank: From 1, by size of the contribution among those of its sign.
        train_index, train_label: Of the training sample; a label is -1 where there is none.
        test_index, test_label: Of the test sample; an index is -1 where the target is a class or the mean.
        contribution: C(i, j); positive helps.
        share: Of the sum of all sizes, 0 to 1.
        share_of_side: Of the sum of those of its sign.
        suspicion_rank: Of the training sample in the detection; None: there is none.
    """

    rank: int
    train_index: int
    train_label: int
    test_index: int
    test_label: int
    contribution: float
    share: float
    share_of_side: float
    suspicion_rank: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over the contributions that are looked at.

    Attributes:
        pairs: How many there are.
        sum: Of all.
        positive: Of those that help.
        negative: Of those that harm, at most 0.
        helpful, harmful: How many of either there are.
    """

    pairs: int = 0
    sum: float = 0.0
    positive: float = 0.0
    negative: float = 0.0
    helpful: int = 0
    harmful: int = 0

    @property
    def absolute(self) -> float:
        """The sum of all sizes."""
        return self.positive - self.negative


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassTotals:
    """Sums over the contributions of, or to, one class.

    Attributes:
        label: The class; -1: samples without one.
        totals: Over its samples.
    """

    label: int
    totals: Totals


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How contributions are spread: ``counts[k]`` lie from ``edges[k]`` to ``edges[k + 1]``."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Contributions that answer one question, summed up; see `explain`.

    Attributes:
        run: Address of the run.
        recipe: Name of its recipe.
        method: Whose contributions.
        question: What was asked.
        asked: In words.
        subject: The sample that is explained; None: there is no single one.
        totals: Over all contributions that are looked at.
        helpful: The largest ones, largest first.
        harmful: The smallest ones, smallest first.
        by_class: Of ``test``: by training class. Of ``train``: by test class. Else empty.
        histogram: Of ``test`` and ``train``; None: of the others.
        samples: The samples that ``helpful`` and ``harmful`` name.
        detection: Detection whose ranks are shown; None: the run has none.
        command: What gives the same again.
        query: The same rows in SQL, for DuckDB.
        notes: What should be known, a line each.
    """

    run: str
    recipe: str
    method: str
    question: Question
    asked: str
    subject: SampleFacts | None
    totals: Totals
    helpful: tuple[Influence, ...]
    harmful: tuple[Influence, ...]
    by_class: tuple[ClassTotals, ...] = ()
    histogram: Histogram | None = None
    samples: tuple[SampleFacts, ...] = ()
    detection: str | None = None
    command: str = ""
    query: str = ""
    notes: tuple[str, ...] = ()

    def influences(self) -> Iterator[tuple[str, Influence]]:
        """Yield each influence with its direction, ``helpful`` or ``harmful``."""
        yield from (("helpful", one) for one in self.helpful)
        yield from (("harmful", one) for one in self.harmful)

    def facts(self, part: str, index: int) -> SampleFacts | None:
        """Return what is known of a sample that is named; None where it is not among them."""
        return next((one for one in self.samples if (one.part, one.index) == (part, index)), None)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able values."""
        return asdict(self)
