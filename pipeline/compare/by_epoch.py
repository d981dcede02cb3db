"""Compare over training: the forms of the hypergradient held against the exact one epoch by epoch.

The paper's Figures 3, 4 and 5. Tracked samples are cut into shards, each a unit that replays every
form in lockstep and writes what it saw at the chosen epochs; influence functions are units of one
epoch. Committed work is kept: the same command goes on, and another question does what differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...storage import layout
from ...storage.documents import dump, load
from ...storage.errors import DoesNotFit, IncompleteStage, SpecError, SpecMismatch
from ...storage.files import read_bytes, remove, write_bytes
from ...workers.determinism import restored_process
from ...workers.estimators import make
from ...workers.estimators.influence_after import INFLUENCE
from ...workers.recipe import Recipe
from ..drive.stages import Stages, units_of
from ..executors.base import Executor, Unit
from ..executors.events import Note, Observer, null
from ..executors.ray import make_executor
from ..plan.compatibility import chosen, place, refuse_unsupported
from ..plan.provenance import check_recipe
from ..plan.sharding import Shard, spans
from ..plan.stored_spec import stored_spec
from ..plan.survey import Survey, compute_of, survey
from ..reading.reader import Reader, open_reader
from ..spec.spec import RunSpec
from ..units.by_epoch import ByEpochTasks
from ..vocabulary import (
    BY_EPOCH_SCORES,
    CURVATURE,
    EKFAC,
    EXACT,
    FAST,
    RECORD,
    SUMMARY,
    TRAJECTORY,
    by_epoch_stage,
)
from .by_epoch_measures import FollowedForms, measure

METHODS = (FAST, EKFAC, *INFLUENCE)
"""What can be followed beside the exact form."""

MEMORY_SHARE = 0.8
"""Of a worker's memory, for a shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What is looked at over training, and when.

    Attributes:
        every: Epochs between two looks; the last epoch is always one.
        methods: Of ``METHODS``; None: ``hydra``, ``hydra-ekfac`` where the run has its curvature, and
            ``influence-lissa``.
        influence_from: First epoch at which influence functions are asked; None: half of training.
        options: Of the influence estimators, by name.
        by_test: Whether influence is asked for each test sample too, which costs as many solves.
        raw_decay: Whether to follow the forms with N times the weight decay in the recursion.

    Raises:
        SpecError: A value is out of its range.
    """

    every: int
    methods: Sequence[str] | None = None
    influence_from: int | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_test: bool = False
    raw_decay: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SpecError(f"every {self.every}: must be at least 1 epoch")
        if self.influence_from is not None and self.influence_from < 1:
            raise SpecError(f"influence_from {self.influence_from}: must be at least 1 epoch")
        for name in self.methods or ():
            if name not in METHODS:
                raise SpecError(
                    f"{name} cannot be followed over training; use some of {', '.join(METHODS)} "
                    f"({EXACT} is always there)"
                )
        for name, options in self.options.items():
            make(name, options)


def by_epoch(
    run: Reader | str,
    course: Course,
    recipe: Recipe | str | None = None,
    *,
    observer: Observer | None = None,
    **placement: Any,
) -> dict[str, Any]:
    """Follow the run's tracked samples through training; store the measures in the run and return them.

    Args:
        run: The run, or where it is; its record must be there.
        course: What to follow.
        recipe: What the run was made from. Needed unless that is a built-in recipe: code that a
            stored run names is never imported unasked.
        observer: Hears of everything that happens.
        placement: Fields of ``RunSpec`` that say where the work is done; the rest is the run's.

    Returns:
        What `by_epoch_measures.measure` returns.

    Raises:
        SpecError: Nothing to follow at these epochs.
        InputError: The recipe must be named.
        SpecMismatch: The recipe or its data are not the run's.
        IncompleteStage: There is no record, or EKFAC is asked for and the run has no curvature.
        DoesNotFit: A single sample is too large for a worker.
        EstimatorError: An influence function does not apply at some epoch; says what to change.
    """
    with restored_process():
        found = run if isinstance(run, Reader) else open_reader(run)
        spec = stored_spec(found, recipe, placement, command="compare")
        refuse_unsupported(spec)
        surveyed = survey(spec, trial=False)
        place(spec, surveyed)
        _check_same(found, surveyed)
        check_recipe(found.uri, found.info, surveyed.made_of, observer or null)
        executor = make_executor(spec)
        try:
            return _ByEpoch(found, spec, surveyed, course, executor, observer or null).drive()
        finally:
            executor.close()


def _check_same(run: Reader, surveyed: Survey) -> None:
    before = run.info.get("chosen", {})
    differing = [
        f"{name}: stored {before[name]}, now {value}"
        for name, value in chosen(surveyed).items()
        if name in before and before[name] != value
    ]
    if differing:
        raise SpecMismatch(
            f"{run.uri} was made from other data ({'; '.join(differing)}); bring them back, or record anew"
        )


class _ByEpoch(Stages):
    """One comparison over training of one run."""

    def __init__(
        self,
        run: Reader,
        spec: RunSpec,
        surveyed: Survey,
        course: Course,
        executor: Executor,
        observer: Observer,
    ) -> None:
        super().__init__(run.directory, executor, observer, run.directory.read())
        self.info.setdefault("stages", {})
        self.run, self.spec, self.surveyed, self.course = run, spec, surveyed, course
        self._needs(RECORD, TRAJECTORY, "record")
        basis = run.directory.manifest(f"{EKFAC}/{CURVATURE}", CURVATURE)
        self.methods = list(dict.fromkeys(course.methods or self._usual(basis is not None)))
        if EKFAC in self.methods and basis is None:
            raise IncompleteStage(
                f"{run.uri} has no curvature for {EKFAC}; add it: hydra-pipe run ... --hessian ekfac on the same "
                "--out, or leave it out of --methods"
            )
        last = surveyed.recipe.epochs
        self.epochs = [*range(course.every, last, course.every), last]
        begin = course.influence_from if course.influence_from is not None else max(1, last // 2)
        self.influence_from = begin
        self.influence = {
            name: make(name, course.options.get(name, {})).options()
            for name in self.methods
            if name in INFLUENCE
        }
        for name in course.options:
            if name not in self.influence:
                raise SpecError(f"options of {name}, which is not among the methods; add it with --methods")
        if self.influence and begin > last:
            raise SpecError(f"influence_from {begin}: training has {last} epochs; use at most that")
        self.late = [epoch for epoch in self.epochs if epoch >= begin]
        self.stage = self._stage_name()
        record = {"record": run.trajectory().epoch_digest[-1][:16]}
        self.question: dict[str, dict[str, Any]] = {
            self.stage: {
                **record,
                "every": course.every,
                "curvature": basis.files[0].sha256[:16] if basis and EKFAC in self.methods else None,
            }
        }
        for name, options in self.influence.items():
            asked = {**record, "options": dict(options), "by_test": course.by_test}
            self.question[by_epoch_stage(name)] = asked

    def drive(self) -> dict[str, Any]:
        self.directory.clear_litter()
        shards = self._shards()
        replays = 2 + (EKFAC in self.methods) + self.course.raw_decay  # of each shard, side by side
        steps = self.surveyed.steps * len(shards) * replays
        self._done(self.stage, units_of(self.stage, shards), steps, "step")
        for name in self.influence:
            stage = by_epoch_stage(name)
            units = [
                Unit(stage=stage, name=f"epoch-{epoch:05d}", arguments={"epoch": epoch})
                for epoch in self.late
            ]
            self._done(stage, units, 0, "")
        forms = FollowedForms(
            stage=self.stage.rsplit("/", 1)[-1],
            methods=tuple(self.methods),
            raw_decay=self.course.raw_decay,
            epochs=tuple(self.epochs),
            influence_from=self.influence_from,
            influence={name: dict(options) for name, options in self.influence.items()},
            by_test=self.course.by_test,
        )
        found = measure(self.run, forms, seconds=self._seconds())
        self.directory.drop(BY_EPOCH_SCORES)
        write_bytes(self.directory.path(layout.BY_EPOCH_SUMMARY), dump(found))
        self.directory.commit(BY_EPOCH_SCORES, SUMMARY, [layout.BY_EPOCH_SUMMARY], {})
        return found

    @staticmethod
    def _usual(curvature: bool) -> list[str]:
        return [FAST, *([EKFAC] if curvature else []), INFLUENCE[0]]

    def _stage_name(self) -> str:
        """Return the stage of the replays; what is carried is in its name, so that answers lie side by side."""
        words = [f"every-{self.course.every}"]
        words += ["ekfac"] if EKFAC in self.methods else []
        words += ["raw-decay"] if self.course.raw_decay else []
        return by_epoch_stage("-".join(words))

    def _shards(self) -> tuple[Shard, ...]:
        """Cut the tracked samples by memory and workers; a comparison that goes on keeps its cut."""
        entry = self.info["stages"].setdefault(self.stage, {})
        total = len(self.surveyed.tracked)
        if "rows" not in entry or not self.directory.units(self.stage):
            capacity = self.executor.capacity(start=False)
            budget = self.spec.memory or int(capacity.get("memory_per_worker") or 0) or 4 << 30
            entry["rows"] = min(self._fitting(budget), math.ceil(total / int(capacity.get("slots") or 1)))
        return spans(total, int(entry["rows"]), "shard")

    def _fitting(self, budget: int) -> int:
        """Return how many samples a worker can follow."""
        itemsize = 8 if self.spec.dtype == "float64" else 4
        # Two buffers a form; EKFAC rows are rotated into a third. Every replay has its own model.
        vectors = 4 + 3 * (EKFAC in self.methods) + 4 * self.course.raw_decay
        each = vectors * self.surveyed.dimension * itemsize
        room = MEMORY_SHARE * budget - self.surveyed.process_bytes
        if room < each:
            raise DoesNotFit(
                f"following one tracked sample needs {int((each + self.surveyed.process_bytes) / MEMORY_SHARE):,} "
                f"bytes in a worker of {budget:,} bytes; use workers with more memory (--memory, fewer --workers)"
            )
        return int(room // each)

    def _done(self, stage: str, units: list[Unit], total: int, label: str) -> None:
        """Do what is missing of a stage, and again what answered another question."""
        wanted = {unit.name for unit in units}
        for manifest in self.directory.manifests(stage):
            if manifest.values.get("question") != self.question[stage]:
                message = f"{stage} {manifest.unit} is done again: it was made with other options"
                self.observer(Note(message=message))
                self.directory.drop(stage, manifest.unit)
                for entry in manifest.files:  # the new answer may have fewer
                    remove(self.directory.path(entry.path))
        others = [name for name in self.directory.units(stage) if name not in wanted]
        self._stage(stage, units, total, label, extra=len(others) + 1)

    def _seconds(self) -> dict[str, float]:
        """Return the work spent on what was followed, by stage."""
        return {
            stage: sum(float(m.values.get("seconds", 0.0)) for m in self.directory.manifests(stage))
            for stage in (self.stage, *(by_epoch_stage(name) for name in self.influence))
        }

    def _tasks(self, stage: str) -> ByEpochTasks:
        return ByEpochTasks(
            uri=self.directory.uri,
            recipe=self.surveyed.recipe,
            compute=compute_of(self.spec),
            tracked=self.surveyed.tracked,
            tested=self.surveyed.tested,
            epochs=self.epochs,
            ekfac=EKFAC in self.methods,
            raw_decay=self.course.raw_decay,
            influence=self.influence,
            by_test=self.course.by_test,
            question=self.question,
        )


def read_by_epoch(run: Reader) -> dict[str, Any]:
    """Return what the last comparison over training of a run found.

    Raises:
        IncompleteStage: There was none.
    """
    if run.directory.manifest(BY_EPOCH_SCORES, SUMMARY) is None:
        raise IncompleteStage(
            f"{run.uri} was not compared over training yet; run `hydra-pipe compare {run.uri} --every 1`"
        )
    address = run.directory.path(layout.BY_EPOCH_SUMMARY)
    return load(read_bytes(address), address)
