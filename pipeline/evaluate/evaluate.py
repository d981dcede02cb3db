"""Evaluate: the truth by retraining, and every method of a run held against it.

Retrainings are units of the stage ``evaluate/retrain``: committed one by one, resumed by the same
command, shared by all methods. What is computed from them is one small unit of ``evaluate/scores``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any, get_args

from ...storage import layout
from ...storage.contributions import write_table
from ...storage.documents import dump, load
from ...storage.errors import IncompleteStage, SpecError
from ...storage.files import write_bytes
from ...storage.ledger import Reading
from ...storage.rundir import RunDirectory
from ...workers.determinism import preserved_generators, restored_process
from ...workers.recipe import Recipe
from ..drive.seeds import naming, recorded
from ..drive.stages import Runner, Stage, run_stage
from ..drive.writing import writing
from ..executors.base import Executor
from ..executors.events import Note, Observer, null
from ..executors.ray import make_executor
from ..plan.provenance import look_and_check
from ..plan.stored_spec import REPEATED, stored_spec
from ..plan.survey import Integers, compute_of, resolve_recipe
from ..reading.reader import Reader, open_reader
from ..spec.checks import whole
from ..spec.spec import RunSpec
from ..units.retrain import Change, RetrainWork, unchanged
from ..vocabulary import EVALUATE_SCORES, RETRAIN, SUMMARY, Way
from .outcomes import Evidence, tracked_samples
from .removal import removals
from .report import summarize, tables
from .trials import Trial, leave_one_out, perturbations, subsets


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
        limits = (
            ("subsets", 0, 10**5),
            ("leave_one_out", 0, 10**6),
            ("seed", 0, 2**63 - 1),
            ("seeds", 1, 1000),
        )
        for name, least, most in limits:
            whole(least, most)(name, getattr(self, name))
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
        waits = bool(overrides.get("wait"))
        with writing(found.directory, observer or null, command="evaluate", wait=waits) as told:
            return _evaluated(open_reader(found.uri), recipe, questions or Questions(), told, overrides)


def _evaluated(
    found: Reader,
    recipe: Recipe | str | None,
    questions: Questions,
    observer: Observer,
    overrides: Mapping[str, object],
) -> dict[str, object]:
    reading = found.directory.ledger.remember()
    evaluation = _prepared(found, recipe, questions, observer, overrides)
    executor = make_executor(evaluation.spec)
    with ExitStack() as held:
        held.callback(executor.close)
        for directory, _ in evaluation.places[1:]:
            held.enter_context(
                writing(directory, observer, command="evaluate --seeds", wait=evaluation.spec.wait)
            )
        evidence = _retrained(evaluation, executor)
    summary = summarize(evidence, evaluation.methods, _spoken(evaluation.questions))
    _store(found.directory, summary, evidence, reading)
    return summary


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Evaluation:
    """One evaluation of one run.

    Attributes:
        run: The run.
        questions: What is asked.
        observer: Hears of everything that happens.
        methods: What is scored.
        spec: Where and how it is retrained.
        places: The runs with their recipes, one a seed.
        tracked: Train indices, (n,).
        tested: Test indices, (M,).
        steps: T.
    """

    run: Reader
    questions: Questions
    observer: Observer
    methods: list[str]
    spec: RunSpec
    places: list[tuple[RunDirectory, Recipe]]
    tracked: Integers
    tested: Integers
    steps: int

    @property
    def n_train(self) -> int:
        """N."""
        return self.run.noted.training_size


def _prepared(
    run: Reader,
    recipe: Recipe | str | None,
    questions: Questions,
    observer: Observer,
    overrides: Mapping[str, Any],
) -> _Evaluation:
    """Find what is scored and with what, and what speaks against it; see `evaluate`."""
    complete = run.methods()
    if not complete:
        raise IncompleteStage(f"{run.uri} has no complete method to evaluate; finish the run first")
    kind = run.noted.kind_of(complete[0])  # the finest come first
    alike = [name for name in complete if run.noted.kind_of(name) == kind]
    methods = list(dict.fromkeys(run.method(m) for m in questions.methods or alike))
    if not questions.methods and len(alike) < len(complete):
        coarser = ", ".join(name for name in complete if name not in alike)
        observer(Note(message=f"not scored: {coarser} (no targets {kind!r}); name them with --methods"))
    steps = len(run.trajectory().batches)
    tracked, tested = tracked_samples(run, methods)
    spec = stored_spec(run, recipe, overrides, command="evaluate", free=REPEATED)
    with preserved_generators():
        resolved = resolve_recipe(spec)
    look_and_check(run.uri, run.noted, spec, observer)
    return _Evaluation(
        run=run,
        questions=questions,
        observer=observer,
        methods=methods,
        spec=spec,
        places=[(run.directory, resolved), *recorded(run, resolved, questions.seeds)],
        tracked=tracked,
        tested=tested,
        steps=steps,
    )


def _retrained(evaluation: _Evaluation, executor: Executor) -> Evidence:
    """Do all retrainings and return what they showed."""
    # First and alone: it stops a wrong recipe before hundreds of retrainings, and some
    # rankings are made of what it measures.
    _retrain(evaluation, executor, [unchanged()])
    evidence = Evidence(
        evaluation.run,
        evaluation.tracked,
        evaluation.tested,
        unchanged().unit,
        evaluation.methods,
        [directory for directory, _ in evaluation.places],
    )
    trials = _trials(evaluation, evidence)
    changes = {trial.change.unit: trial.change for trial in trials}
    _retrain(evaluation, executor, [unchanged(), *changes.values()])
    evidence.load(trials)
    return evidence


def _trials(evaluation: _Evaluation, evidence: Evidence) -> list[Trial]:
    asked, tracked, way = evaluation.questions, evaluation.tracked, evaluation.questions.retraining
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
    trials += removals(evidence, evaluation.methods, asked.remove, asked.seed, way)
    return trials + perturbations(tracked, evaluation.n_train, asked.perturb, asked.seed)


def _retrain(evaluation: _Evaluation, executor: Executor, changes: Sequence[Change]) -> None:
    """Do the retrainings that are not committed yet, with every seed."""
    for directory, recipe in evaluation.places:
        runner = Runner(directory=directory, executor=executor, observer=evaluation.observer)
        stage = _stage(evaluation, runner, recipe, changes)
        if len(evaluation.places) == 1:
            run_stage(runner, stage)
            continue
        runner.note(f"retraining with seed {recipe.seed}")
        with naming(recipe.seed):
            run_stage(runner, stage)


def _stage(evaluation: _Evaluation, runner: Runner, recipe: Recipe, changes: Sequence[Change]) -> Stage:
    directory, wanted = runner.directory, {change.unit for change in changes}
    return Stage(
        name=RETRAIN,
        units=[change.as_unit() for change in changes],
        handler=lambda: RetrainWork(
            uri=directory.uri,
            recipe=recipe,
            compute=compute_of(evaluation.spec),
            n_train=evaluation.n_train,
            tracked=evaluation.tracked,
            tested=evaluation.tested,
        ),
        total=evaluation.steps * len(changes),
        label="step",
        kept=sum(unit not in wanted for unit in directory.units(RETRAIN)),
    )


def _spoken(asked: Questions) -> dict[str, Any]:
    return {
        field.name: list(value) if isinstance(value := getattr(asked, field.name), tuple) else value
        for field in fields(asked)
        if field.name != "methods"
    }


def _store(directory: RunDirectory, summary: dict[str, Any], evidence: Evidence, reading: Reading) -> None:
    large = tables(summary, evidence)
    directory.drop(EVALUATE_SCORES)
    write_bytes(directory.path(layout.EVALUATION_SUMMARY), dump(summary))
    files = [layout.EVALUATION_SUMMARY]
    for name, (table, schema) in large.items():
        relative = layout.evaluation(name)
        write_table(directory.path(relative), table, schema)
        files.append(relative)
    directory.commit(EVALUATE_SCORES, SUMMARY, files, {}, reading)


def read_summary(run: Reader) -> dict[str, Any]:
    """Return what the last evaluation of a run found.

    Raises:
        IncompleteStage: It was never evaluated.
    """
    if run.directory.manifest(EVALUATE_SCORES, SUMMARY) is None:
        raise IncompleteStage(f"{run.uri} was not evaluated yet; run `hydra-pipe evaluate {run.uri}`")
    address = run.directory.path(layout.EVALUATION_SUMMARY)
    return load(run.directory.vouched(address), address)


__all__ = ["Questions", "evaluate", "read_summary"]
