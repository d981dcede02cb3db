"""What the manifest of a unit says beside its files, as values: one class a kind of stage.

A field is None where the unit was committed by a version that did not note it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...storage.rundir import Manifest, RunDirectory
from ...storage.typed import from_json, null_field, rest_field


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitValues:
    """What every unit notes.

    Attributes:
        rows: Rows of its stage that it is about.
        start: The first of them.
        seconds: Wall time of the work.
        peak_bytes: Largest resident set of the worker meanwhile.
    """

    rows: int | None = None
    start: int | None = None
    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordValues(UnitValues):
    """The record.

    Attributes:
        steps: T.
        dimension: D.
        checked_steps: Steps on which the optimiser's formula was held against what it did.
        visits: Which arrays of the samples' visits there are; empty: none.
        loop: Whether a loop of the user's own was recorded, which no command can train again.
        closing: Final losses and accuracies, by name; None where there is none.
    """

    steps: int | None = None
    dimension: int | None = None
    checked_steps: int | None = None
    visits: tuple[str, ...] = ()
    loop: bool = False
    closing: Mapping[str, Any] = rest_field()


@dataclass(frozen=True, kw_only=True, slots=True)
class TestGradientValues(UnitValues):
    """A block of test samples.

    Attributes:
        ways: How their gradients were had.
        loss: Of each; None: not finite.
        label: Of each, -1: none.
        prediction: Of each, -1: none.
    """

    ways: Mapping[str, Any] | None = None
    loss: tuple[float | None, ...] = ()
    label: tuple[int, ...] = ()
    prediction: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LossValues:
    """What storing rows in fewer numbers or bits loses, on a sample; see ``workers.replay.sampled``.

    Attributes:
        train_index: Of the sampled rows, (S,).
        test_index: Of the sampled targets, (T,).
        whole: Contributions by whole rows, (S, T).
        stored: By what is stored of them.
    """

    train_index: tuple[int, ...]
    test_index: tuple[int, ...]
    whole: tuple[tuple[float, ...], ...]
    stored: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayValues(UnitValues):
    """A shard of tracked samples, or a block of targets.

    Attributes:
        steps: T.
        ways: How per-sample gradients were had; see ``PerSampleGradients.told``.
        law: What the shard adds to the conservation law; see ``RowSums.values``.
        lawful: Whether every target of the block obeys it.
        loss: What storing its rows in fewer numbers or bits loses; None: nothing.
        products: How products with the Hessian were had.
        field: How an update that is no gradient was differentiated.
        differences: Whether products were held against differences of the gradient.
        running_statistics: Whether there are some.
        matrix: What stands in the Hessian's place; None: nothing.
        segments: Of the training, whose sums the rows are; None: they come from one replay.
    """

    steps: int | None = None
    ways: Mapping[str, Any] | None = None
    law: Mapping[str, Any] | None = None
    lawful: bool | None = None
    loss: LossValues | None = None
    products: Any = None
    field: Any = None
    differences: Any = None
    running_statistics: bool | None = None
    matrix: str | None = None
    segments: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialValues:
    """What one batch showed of the ways to per-sample gradients; fields but ``number`` as of ``persample.one_batch.Trial``."""

    number: int
    verdicts: tuple[str, ...]
    random: bool
    coupled: bool | None = null_field()
    rows: int
    graph: int | None = null_field()
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WaysValues(UnitValues):
    """A share of the trials of the ways to per-sample gradients, made once for all segments.

    Attributes:
        trials: Of this share.
        parts: How many shares there are.
    """

    trials: tuple[TrialValues, ...] = ()
    parts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvatureValues(UnitValues):
    """EKFAC's curvature.

    Attributes:
        steps: Of its checkpoints.
        attrs: What the estimate says of itself.
    """

    steps: tuple[int, ...] = ()
    attrs: Mapping[str, Any] = rest_field()


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthValues(UnitValues):
    """How exact tangents grow; see ``workers.reference.growth``. None where it is not finite."""

    growth: float | None = None
    peak: float | None = None
    peak_step: int | None = None
    rounding: float | None = None
    deviation: float | None = None
    limit: float | None = None
    train_index: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectionsValues(UnitValues):
    """The leading directions.

    Attributes:
        directions: How many there are.
        share: Of the targets' gradients that they hold.
    """

    directions: int | None = None
    share: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReduceValues(UnitValues):
    """A block of a method's tables.

    Attributes:
        interclass: [train class, test class, sum of contributions, pairs], one a pair of classes.
        members: Of an average: digests of what was averaged.
    """

    interclass: tuple[tuple[float, ...], ...] = ()
    members: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateValues(UnitValues):
    """A block of an estimator; ``notes`` are its own."""

    notes: Mapping[str, Any] = rest_field()


@dataclass(frozen=True, kw_only=True, slots=True)
class ByEpochValues(UnitValues):
    """A shard, or an epoch, of a comparison over training.

    Attributes:
        question: What was asked; work that answers another question is done again.
        epoch: After which an influence function was asked.
    """

    question: Mapping[str, Any] | None = None
    epoch: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainValues(UnitValues):
    """A retraining.

    Attributes:
        way: How it trained.
        changed: Training samples whose weight it changed.
        loss: Mean over the test samples; None: not finite.
        accuracy: Share of right predictions, where classes are known.
    """

    way: str
    changed: int
    loss: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionValues(UnitValues):
    """A detection.

    Attributes:
        by: The detector.
        method: Whose contributions or hypergradients it looked at; None: none.
        options: Of the detector, by field.
        selecting: Test indices that it looked at, where they were split; None: all or none.
        judging: Those that it did not look at, kept for judging what is decided; None: there was no split.
        labels_sha256: Of the given labels; see ``decide.detection.labels_digest``.
        flag: Rule that flagged.
        flagged: How many samples.
        cut: Suspicion from which on samples are flagged; None: none is.
        separation: Of the two parts that the rule saw, in pooled standard deviations; None: the rule sees none.
        inspect: Whether so few are flagged that each should be looked at before anything is done.
        measures: AUROC and others, where wrong labels are known; see ``decide.measures``.
        notes: Of the detector.
    """

    by: str
    method: str | None = None
    options: Mapping[str, Any] | None = None
    selecting: tuple[int, ...] | None = None
    judging: tuple[int, ...] | None = None
    labels_sha256: str | None = None
    flag: str | None = None
    flagged: int = 0
    cut: float | None = None
    separation: float | None = None
    inspect: bool = False
    measures: Mapping[str, Any] | None = None
    notes: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCounts:
    """Samples of a class before and after a decision.

    Attributes:
        label: The class, -1: no label.
        before: Samples given this label.
        dropped: Of these.
        relabelled: Of these, to another class.
        downweighted: Of these.
        after: Samples that are kept and have this label then.
    """

    label: int
    before: int
    dropped: int
    relabelled: int
    downweighted: int
    after: int

    @property
    def lost(self) -> float:
        """Share of its samples that the class loses."""
        return (self.dropped + self.relabelled) / self.before if self.before else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionValues(UnitValues):
    """A decision; its ``manifest.json`` says the same.

    Attributes:
        run: Address of the run when it was made.
        recipe: Name of the recipe.
        by: The detector, or ``list``.
        detection: Name of the detection; None: it was made from a list.
        method: Whose contributions or hypergradients the detector looked at; None: none.
        rule: ``drop``, ``relabel`` or ``downweight``.
        cut: Which samples it is for, as it was asked: ``flagged``, ``5%``, a number, ``list``.
        n_train: N.
        judged: Samples that the detection judged.
        dropped, relabelled, downweighted: How many are.
        selecting: Test indices that the detector looked at; None: none, or not known.
        judging: Test indices that may judge the decision; None: all.
        trust: Whether what judges is apart from what selected, one sentence.
        labels_sha256: Of the N labels that it was made for; see ``reading.detections.labels_digest``.
        classes: Counts by class, ascending.
        warnings: What should be looked at before it is followed, one line each.
        notes: What else was found, one line each.
        sha256: Of each of its other files, by name.
    """

    run: str
    recipe: str
    by: str
    rule: str
    cut: str
    n_train: int
    judged: int
    labels_sha256: str
    trust: str
    detection: str | None = None
    method: str | None = None
    dropped: int = 0
    relabelled: int = 0
    downweighted: int = 0
    selecting: tuple[int, ...] | None = None
    judging: tuple[int, ...] | None = None
    classes: tuple[ClassCounts, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)


V = TypeVar("V", bound=UnitValues)


def values_of(kind: type[V], manifest: Manifest) -> V:
    """Return what a manifest says.

    Raises:
        CorruptStore: A value has not the type of its field; names unit and field.
    """
    return from_json(kind, manifest.values, f"manifest of {manifest.stage} {manifest.unit}")


def all_values(kind: type[V], directory: RunDirectory, stage: str) -> list[V]:
    """Return what the manifests of a stage say, sorted by unit."""
    return [values_of(kind, manifest) for manifest in directory.manifests(stage)]


def joined_ways(ways: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what the ways that units took have in common, and all that was repaired."""
    if not ways:
        return None
    repaired = sorted({name for one in ways for name in one["repaired"]})
    blocks = sum(one.get("repaired_blocks", 0) for one in ways)
    return {**ways[0], "repaired": repaired, **({"repaired_blocks": blocks} if blocks else {})}
