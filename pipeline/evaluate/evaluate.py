"""Evaluate: the truth by retraining, and every method of a run held against it.

Retrainings are units of the stage ``evaluate/retrain``: committed one by one, resumed by the same
command, shared by all methods. What is computed from them is one small unit of ``evaluate/scores``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from ...storage import layout
from ...storage.contributions import write_table
from ...storage.documents import dump, load
from ...storage.errors import IncompleteStage, SpecError
from ...storage.files import read_bytes, write_bytes
from ...storage.rundir import RunDirectory
from ...storage.uri import is_local
from ...workers.determinism import preserved_generators, restored_process
from ...workers.recipe import Recipe
from ..drive.seeds import naming, recorded
from ..executors.base import Executor
from ..executors.events import Note, Observer, StageFinished, StageStarted, UnitSkipped, null
from ..executors.ray import make_executor
from ..plan.provenance import look_and_check
from ..plan.stored_spec import REPEATED, stored_spec
from ..plan.survey import compute_of, resolve_recipe
from ..reading.reader import Reader, open_reader
from ..spec.targets import kind_of
from ..units.retrain import Change, RetrainTasks, Trial, leave_one_out, perturbations, subsets, unchanged
from ..vocabulary import EVALUATE_SCORES, RETRAIN, SUMMARY, Way
from .outcomes import Evidence, tracked_samples
from .removal import removals
from .report import summarize, tables


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What an evaluation asks.

    Attributes:
        methods: Which estimators; None: all that are complete and have the finest targets there are.
            Those named are scored over the coarsest targets among them.
        subsets: Random subsets a fraction, for the linear datamodelling score.
        fractions: Shares of the tracked samples that subsets keep.
        seed: Of every random choice.
        retraining: How the rest is trained, ``weighted``, ``rescaled`` or ``subset``; see
            ``workers.training.retrain``. Single samples and random weights are always ``weighted``.
        leave_one_out: How many single samples are removed.
        remove: Shares of the tracked samples that the removal curves take away.
        perturb: Sizes of the random changes of all weights that measure how smooth training is.
        seeds: Retrain with as many seeds of the run and average the losses: the expected training.

    Raises:
        SpecError: A number is out of its range.
    """

    methods: Sequence[str] | None = None
    subsets: int = 120
    fractions: tuple[float, ...] = (0.5, 0.9, 0.99)
    seed: int = 0
    retraining: Way = "rescaled"
    leave_one_out: int = 0
    remove: tuple[float, ...] = (0.02, 0.1, 0.3)
    perturb: tuple[float, ...] = (0.03, 0.1, 0.3)
    seeds: int = 1

    def __post_init__(self) -> None:
        if self.retraining not in get_args(Way):
            raise SpecError(f"retraining {self.retraining!r}: must be one of {', '.join(get_args(Way))}")
        for name, least in (("subsets", 0), ("leave_one_out", 0), ("seed", 0), ("seeds", 1)):
            if getattr(self, name) < least:
                raise SpecError(f"{name} {getattr(self, name)}: must be at least {least}")
        if self.subsets in (1, 2):
            raise SpecError(f"subsets {self.subsets}: a rank correlation needs at least 3; or 0 for none")
        for name in ("fractions", "remove", "perturb"):
            for value in getattr(self, name):
                if not 0 < value < 1:
                    raise SpecError(f"{name} {value:g}: must be above 0 and below 1")


def evaluate(
    run: Reader | str,
    recipe: Recipe | str | None = None,
    *,
    questions: Questions | None = None,
    observer: Observer | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Retrain, score every method, store the summary in the run and return it.

    Args:
        run: The run, or where it is.
        recipe: What the run was made from. Needed unless that is a built-in recipe: code that a
            stored run names is never imported unasked.
        questions: What to ask.
        observer: Hears of everything that happens.
        overrides: Fields of `RunSpec` that say where the work is done: ``executor``, ``address``,
            ``workers``, ``gpus_per_actor``, ``cpus_per_actor``, ``device``, ``recipe_args``, ...

    Raises:
        InputError: The recipe has to be named, or a method is unknown.
        IncompleteStage: The run has no complete method, or no record.
        ReplayDiverged: Training with nothing changed does not give the recorded weights.
    """
    with restored_process():
        found = run if isinstance(run, Reader) else open_reader(run)
        return _Evaluation(found, recipe, questions or Questions(), observer or null, overrides).evaluate()


class _Evaluation:
    """One evaluation of one run."""

    def __init__(
        self,
        run: Reader,
        recipe: Recipe | str | None,
        questions: Questions,
        observer: Observer,
        overrides: Mapping[str, Any],
    ) -> None:
        self.run, self.questions, self.observer = run, questions, observer
        complete = run.methods()
        if not complete:
            raise IncompleteStage(f"{run.uri} has no complete method to evaluate; finish the run first")
        kind = kind_of(run.info, complete[0])  # the finest come first
        alike = [name for name in complete if kind_of(run.info, name) == kind]
        self.methods = list(dict.fromkeys(run.method(m) for m in questions.methods or alike))
        if not questions.methods and len(alike) < len(complete):
            coarser = ", ".join(name for name in complete if name not in alike)
            self.observer(
                Note(message=f"not scored: {coarser} (no targets {kind!r}); name them with --methods")
            )
        self.trajectory = run.trajectory()
        self.tracked, self.tested = tracked_samples(run, self.methods)
        self.spec = stored_spec(run, recipe, overrides, command="evaluate", free=REPEATED)
        with preserved_generators():
            self.recipe = resolve_recipe(self.spec)
        look_and_check(run.uri, run.info, self.spec, observer)
        self.n_train = int(run.info["n_train"])
        self.places = [(run.directory, self.recipe), *recorded(run, self.recipe, questions.seeds)]

    def evaluate(self) -> dict[str, Any]:
        executor = make_executor(self.spec)
        try:
            # First and alone: it stops a wrong recipe before hundreds of retrainings, and some
            # rankings are made of what it measures.
            self._retrain(executor, [unchanged()])
            places = [directory for directory, _ in self.places]
            evidence = Evidence(self.run, self.tracked, self.tested, unchanged().unit, self.methods, places)
            trials = self._trials(evidence)
            changes = {trial.change.unit: trial.change for trial in trials}
            self._retrain(executor, [unchanged(), *changes.values()])
        finally:
            executor.close()
        evidence.load(trials)
        summary = summarize(evidence, self.methods, self._asked())
        self._store(summary, evidence)
        return summary

    def _trials(self, evidence: Evidence) -> list[Trial]:
        asked, tracked, way = self.questions, self.tracked, self.questions.retraining
        trials: list[Trial] = []
        for fraction in asked.fractions if asked.subsets else ():
            if not 0 < round(fraction * len(tracked)) < len(tracked):
                raise SpecError(
                    f"fractions {fraction:g}: of {len(tracked)} tracked samples that keeps "
                    f"{round(fraction * len(tracked))}; some must stay and some must go"
                )
            trials += subsets(tracked, fraction, asked.subsets, asked.seed, way)
        if asked.leave_one_out:
            trials += leave_one_out(tracked, asked.leave_one_out, asked.seed)
        trials += removals(evidence, self.methods, asked.remove, asked.seed, way)
        return trials + perturbations(tracked, self.n_train, asked.perturb, asked.seed)

    def _retrain(self, executor: Executor, changes: Sequence[Change]) -> None:
        """Do the retrainings that are not committed yet, with every seed."""
        for directory, recipe in self.places:
            if len(self.places) == 1:
                self._retrain_one(executor, changes, directory, recipe)
                continue
            self.observer(Note(message=f"retraining with seed {recipe.seed}"))
            with naming(recipe.seed):
                self._retrain_one(executor, changes, directory, recipe)

    def _retrain_one(
        self, executor: Executor, changes: Sequence[Change], directory: RunDirectory, recipe: Recipe
    ) -> None:
        begun, observer = time.monotonic(), self.observer
        steps = len(self.trajectory.batches)
        observer(
            StageStarted(stage=RETRAIN, units=len(changes), total=steps * len(changes), unit_label="step")
        )
        todo = []
        for change in changes:
            manifest = directory.manifest(RETRAIN, change.unit)
            problems = [] if manifest is None else directory.check(manifest, digests=is_local(directory.uri))
            if manifest is not None and not problems:
                observer(UnitSkipped(stage=RETRAIN, unit=change.unit))
                continue
            if problems:
                observer(Note(message=f"{RETRAIN} {change.unit} is done again: {problems[0]}"))
                directory.drop(RETRAIN, change.unit)
            todo.append(change.as_unit())
        if todo:
            tasks = RetrainTasks(
                uri=directory.uri,
                recipe=recipe,
                compute=compute_of(self.spec),
                n_train=self.n_train,
                tracked=self.tracked,
                tested=self.tested,
            )
            self._note(directory, len(todo), 0.0)
            executor.run(RETRAIN, todo, tasks, observer)
            self._note(directory, 0, time.monotonic() - begun)
        seconds = time.monotonic() - begun
        observer(StageFinished(stage=RETRAIN, seconds=seconds))

    def _note(self, directory: RunDirectory, coming: int, seconds: float) -> None:
        """Write into ``run.json`` how many retrainings there are, with those to come, and their time."""
        info = directory.read()  # read anew: a run may have added a method meanwhile
        entry = info.setdefault("stages", {}).setdefault(RETRAIN, {})
        entry["units"] = len(directory.manifests(RETRAIN)) + coming + 1
        entry["seconds"] = float(entry.get("seconds", 0.0)) + seconds
        directory.write(info)

    def _asked(self) -> dict[str, Any]:
        asked = self.questions
        return {
            field.name: list(value) if isinstance(value := getattr(asked, field.name), tuple) else value
            for field in fields(asked)
            if field.name != "methods"
        }

    def _store(self, summary: dict[str, Any], evidence: Evidence) -> None:
        directory = self.run.directory
        large = tables(summary, evidence)
        directory.drop(EVALUATE_SCORES)
        write_bytes(directory.path(layout.EVALUATION_SUMMARY), dump(summary))
        files = [layout.EVALUATION_SUMMARY]
        for name, (table, schema) in large.items():
            relative = layout.evaluation(name)
            write_table(directory.path(relative), table, schema)
            files.append(relative)
        directory.commit(EVALUATE_SCORES, SUMMARY, files, {})


def read_summary(run: Reader) -> dict[str, Any]:
    """Return what the last evaluation of a run found.

    Raises:
        IncompleteStage: It was never evaluated.
    """
    if run.directory.manifest(EVALUATE_SCORES, SUMMARY) is None:
        raise IncompleteStage(f"{run.uri} was not evaluated yet; run `hydra-pipe evaluate {run.uri}`")
    address = run.directory.path(layout.EVALUATION_SUMMARY)
    return load(read_bytes(address), address)


__all__ = ["Questions", "evaluate", "read_summary"]
