"""``run.json`` as values: what a run was asked for, and how far its methods and stages have come.

Everything is optional: older and half-finished runs are read as far as they go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ...storage import layout
from ...storage.errors import CorruptStore
from ...storage.rundir import RunDirectory
from ...storage.typed import from_json, null_field, rest_field, to_json
from ..vocabulary import FAST, KINDS, PARTIAL, SAMPLES, SEEDS, State


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """What was seen before the expensive stage of a method; see ``drive.preflight``.

    Attributes:
        warnings: One line each.
        skipped: Why nothing was measured; None: it was.
        rest: What was measured, by name.
    """

    warnings: tuple[str, ...] = ()
    skipped: str | None = None
    rest: Mapping[str, Any] = rest_field()


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodEntry:
    """One method of a run.

    Attributes:
        state: How far it is.
        mode: How it is made; None: not known.
        options: What it depends on beyond the run's identity.
        targets: Kind of its targets; None: test samples.
        n_targets: Their number; None: as many as test samples are tracked.
        shards: Units of its replay (or blocks of test samples).
        asked_shards: What was asked for.
        segments: How many segments of the steps were planned; None: one.
        asked_segments: What was asked for.
        prepare_rows: Tracked samples that a unit prepares.
        source: Of an average: the method that is averaged.
        seeds: Of an average: over which seeds.
        preflight: What its preflight saw.
        store_dtype: What its hypergradients are stored as; None: as the run's dtype.
    """

    state: State = PARTIAL
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    targets: str | None = None
    n_targets: int | None = None
    shards: int | None = None
    asked_shards: int | str | None = None
    segments: int | None = None
    asked_segments: int | str | None = None
    prepare_rows: int | None = None
    source: str | None = None
    seeds: tuple[int, ...] | None = None
    preflight: Preflight | None = None
    store_dtype: str | None = None
    rest: Mapping[str, Any] = rest_field()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEntry:
    """What is noted of a stage.

    Attributes:
        units: How many it has, the closing one included.
        seconds: Wall time that went into it.
        rows: Samples of a unit, where the stage itself decided.
    """

    units: int | None = None
    seconds: float | None = None
    rows: int | None = None
    rest: Mapping[str, Any] = rest_field()


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutEntry:
    """How a run was cut: shards, rows of a chunk of its stores, and the memory that its tiles are made for."""

    shards: int | None = None
    chunk_rows: int | None = None
    test_chunk_rows: int | None = None
    reduce_memory: int | None = None
    rest: Mapping[str, Any] = rest_field()


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What recipe and selections came to: a changed index file or dataset shows here.

    Attributes:
        n_train: N.
        n_test: Size of the test set.
        dimension: D.
        steps: T.
        tracked: Digest of the train indices that are tracked.
        tested: Digest of the test indices.
    """

    n_train: int | None = None
    n_test: int | None = None
    dimension: int | None = None
    steps: int | None = None
    tracked: str | None = None
    tested: str | None = None

    def differences(self, now: Chosen) -> list[str]:
        """Return one line a value that is known here and another one ``now``."""
        pairs = ((item.name, getattr(self, item.name), getattr(now, item.name)) for item in fields(self))
        return [
            f"{name}: stored {stored}, now {value}"
            for name, stored, value in pairs
            if stored is not None and stored != value
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedsEntry:
    """The trainings with several seeds.

    Attributes:
        first: The run's own seed.
        others: Those of the runs inside it.
        data: Digests of the data, which are the same for all.
    """

    first: int | None = None
    others: tuple[int, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """What the conservation law came to; see ``workers.recursion.conservation``.

    Attributes:
        checked: Whether it applies.
        reason: Why it does not.
        worst: Parameter that is farthest off.
        error: By how much.
        limit: What rounding allows.
    """

    checked: bool
    reason: str | None = None
    worst: str | None = None
    error: float | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """What speaks for the numbers of a method.

    Attributes:
        law: What the conservation law says.
        update: Steps on which the optimiser's formula was held against what it did.
        ways: How per-sample gradients were had; see ``PerSampleGradients.told``.
        test_ways: How test gradients were.
        products: How products with the Hessian were had.
        field: How an update that is no gradient was differentiated.
        differences: Whether products were held against differences of the gradient.
        running_statistics: Whether there are some, held constant.
        matrix: What stands in the Hessian's place; None: nothing.
    """

    law: Law
    update: int | None = null_field()
    ways: Mapping[str, Any] | None = null_field()
    test_ways: Mapping[str, Any] | None = null_field()
    products: Any = None
    field: Any = null_field()  # noqa: RUF009 (the name of the attribute misleads the rule)
    differences: Any = None
    running_statistics: bool | None = None
    matrix: str | None = None
    rest: Mapping[str, Any] = rest_field()


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryEntry:
    """What a run came to.

    Attributes:
        peak_bytes: Largest resident set of a worker.
        predicted_bytes: What the plan said.
        disk_bytes: Of all results.
        predicted_disk_bytes: What the plan said.
        seconds: Of all stages.
        predicted_seconds: What the plan said.
        closing: Final losses and accuracies, by name.
    """

    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    disk_bytes: int | None = None
    predicted_disk_bytes: int | None = None
    seconds: float | None = None
    predicted_seconds: float | None = None
    closing: Mapping[str, Any] = rest_field()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """The contents of ``run.json``; what only people and other programs read is in ``rest``.

    Attributes:
        method: The method that was asked for last.
        n_train: N.
        n_test: Size of the test set.
        n_tracked: n.
        n_test_tracked: M.
        dimension: D.
        steps: T.
        conservation: Whether the recipe obeys the conservation law.
        identity: What decides the run's numbers; see ``RunSpec.identity``.
        spec: What was asked for last.
        chosen: What recipe and selections came to.
        made_of: Digests of what the run was made from; None: made before there were any.
        layout: How it was cut.
        methods: By name.
        stages: By name.
        seeds: None: it has one.
        trust: By method.
        summary: What it came to.
    """

    method: str | None = None
    n_train: int | None = None
    n_test: int | None = None
    n_tracked: int | None = None
    n_test_tracked: int | None = None
    dimension: int | None = None
    steps: int | None = None
    conservation: bool | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    chosen: Chosen = field(default_factory=Chosen)
    made_of: Mapping[str, Any] | None = None
    layout: LayoutEntry = field(default_factory=LayoutEntry)
    methods: Mapping[str, MethodEntry] = field(default_factory=dict)
    stages: Mapping[str, StageEntry] = field(default_factory=dict)
    seeds: SeedsEntry | None = None
    trust: Mapping[str, Trust] = field(default_factory=dict)
    summary: SummaryEntry = field(default_factory=SummaryEntry)
    rest: Mapping[str, Any] = rest_field()

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> RunInfo:
        """Return what a run's ``run.json`` holds.

        Raises:
            CorruptStore: A value has not the type of its field; names it.
        """
        return from_json(cls, data, where)

    def to_json(self) -> dict[str, Any]:
        """Return it as ``run.json`` holds it."""
        found: dict[str, Any] = to_json(self)
        return found

    def entry(self, method: str) -> MethodEntry:
        """Return what is noted of a method; an empty entry where that is nothing."""
        return self.methods.get(method, MethodEntry())

    def kind_of(self, method: str) -> str:
        """Return the kind of targets of a method."""
        return self.entry(method).targets or SAMPLES

    def coarsest(self, methods: Iterable[str]) -> str:
        """Return the coarsest kind of targets of some methods."""
        order: list[str] = list(KINDS)
        return max((self.kind_of(method) for method in methods), key=order.index)

    def method_names(self) -> list[str]:
        """Return the methods: those there are and the one being made.

        ``hydra`` comes first; those with classes for targets, then with the mean, come last.
        """
        names = [*self.methods, *([] if self.method in (None, *self.methods) else [str(self.method)])]
        order: list[str] = list(KINDS)
        return sorted(names, key=lambda name: (order.index(self.kind_of(name)), name != FAST))

    def warnings(self) -> list[str]:
        """Return what the preflight of each method warned of, one line each."""
        found = []
        for name in self.method_names():
            seen = self.entry(name).preflight
            found += [f"{name}: {text}" for text in (seen.warnings if seen else ())]
        return found

    def target_count(self, method: str) -> int | None:
        """Return how many targets a method has: the test samples, unless it notes another number."""
        count = self.entry(method).n_targets
        return self.n_test_tracked if count is None else count

    def averages(self, method: str) -> list[int]:
        """Return the seeds that a method is averaged over; empty where it is none."""
        entry = self.entry(method)
        return list(entry.seeds or ()) if entry.mode == SEEDS else []

    @property
    def reduce_memory(self) -> int | None:
        """Bytes that the tiles of the tables were cut for; None: not yet."""
        found = self.layout.reduce_memory
        older = self.identity.get("reduce_memory")
        return older if found is None and isinstance(older, int) else found

    @property
    def training_size(self) -> int:
        """N, of a run that was surveyed.

        Raises:
            CorruptStore: Nothing says so.
        """
        if self.n_train is None:
            raise CorruptStore("run.json has no n_train; restore the file, or record the run again")
        return self.n_train

    @property
    def other_seeds(self) -> tuple[int, ...]:
        """Seeds of the runs inside this one."""
        return self.seeds.others if self.seeds else ()

    def with_method(self, method: str, **changes: Any) -> RunInfo:
        """Return it with fields of a method's entry changed; a new entry begins as ``partial``."""
        return replace(self, methods={**self.methods, method: replace(self.entry(method), **changes)})

    def with_stage(self, stage: str, **changes: Any) -> RunInfo:
        """Return it with fields of a stage's entry changed."""
        entry = replace(self.stages.get(stage, StageEntry()), **changes)
        return replace(self, stages={**self.stages, stage: entry})


def read_info(directory: RunDirectory) -> RunInfo:
    """Return the contents of a run's ``run.json``.

    Raises:
        RunNotFound: There is none.
        CorruptStore: It cannot be read, or a value has not the type of its field.
    """
    return RunInfo.from_json(directory.read(), directory.path(layout.RUN_INFO))


def update_info(directory: RunDirectory, change: Callable[[RunInfo], RunInfo]) -> None:
    """Change a run's ``run.json`` as it is now; where nothing changes it stays as it is.

    Args:
        directory: The run; it need not be one yet.
        change: From what is noted (nothing, in a new run) to what shall be.
    """

    def changed(stored: dict[str, object]) -> Mapping[str, object]:
        before = RunInfo.from_json(stored, directory.path(layout.RUN_INFO))
        after = change(before)
        return stored if after == before else after.to_json()

    directory.update(changed)
