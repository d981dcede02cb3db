"""Whether a decision helped: every arm trained with every seed, resumable, and what that says.

Accuracies and losses are those after the last epoch, never of the best one, on test samples that did not select
where there are such. Letters: K seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...storage import layout
from ...storage.contributions import write_table
from ...storage.documents import dump
from ...storage.errors import InputError, SpecError
from ...storage.files import write_bytes
from ...storage.schemas import RETRAINED
from ...storage.typed import to_json
from ...workers.training.relabelled import check_replaceable
from ...workers.training.same_data import check_same_data, data_digests
from ..drive.stages import Runner, Stage, run_stage
from ..executors.events import Observer
from ..executors.ray import make_executor
from ..plan.survey import Survey, compute_of
from ..reading.decisions import RELABEL, Decision
from ..reading.outcomes import ArmOutcome, Outcome, Spread
from ..reading.reader import Reader
from ..spec.spec import RunSpec
from ..units.retrain_cleaned import CleanedWork, Treatment, seeds_of, test_losses_of
from ..vocabulary import CLEAN, CLEAN_OUTCOME, CLEAN_RETRAIN, Way
from .arms import BEFORE, RANDOM, Comparison

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Retraining:
    """What is retrained, and how.

    Attributes:
        run: The run.
        spec: Where and how the work is done.
        surveyed: Its recipe.
        decision: What is judged.
        comparison: Its arms.
        seeds: K.
        way: How is trained.
    """

    run: Reader
    spec: RunSpec
    surveyed: Survey
    decision: Decision
    comparison: Comparison
    seeds: int
    way: Way

    def treatments(self) -> list[tuple[str, int, Treatment]]:
        """Return (arm, seed, what is trained), arm after arm."""
        return [
            (arm.name, seed, arm.treatment(self.way, seed))
            for arm in self.comparison.arms
            for seed in seeds_of(self.surveyed.recipe, self.seeds)
        ]


def check_way(run: Reader, rule: str, way: Way, seeds: int, first: int, papers: bool) -> None:
    """Refuse what a way of retraining cannot do, before a decision is written.

    Args:
        run: The run.
        rule: Of the decision.
        way: How is trained.
        seeds: K.
        first: The run's own seed.
        papers: Whether the papers' reading is asked for.

    Raises:
        SpecError: K is negative, or other labels are asked of a way that repeats the record.
        InputError: The run has no record with a seed that such a way needs.
    """
    if seeds < 0:
        raise SpecError(f"--retrain {seeds}: must be 0 or more seeds")
    if papers and not seeds:
        raise SpecError("--papers-reading says how to retrain; add --retrain K")
    if way == "subset" or not seeds:
        return
    if rule == RELABEL or papers:
        raise SpecError(
            f"--way {way} repeats the recorded training, which has its labels; other labels need --way subset"
        )
    there = {first, *run.members()}
    for seed in range(first, first + seeds):
        if seed not in there:
            raise InputError(
                f"--way {way} repeats recorded trainings, and {run.uri} has none with seed {seed}; use --way subset, "
                f"fewer --retrain, or record them with hydra-pipe run ... --seeds {seeds}"
            )


def retrain(asked: Retraining, observer: Observer) -> Outcome:
    """Do the retrainings that are not there yet, sum them up, store that in the run and return it.

    Raises:
        RecipeError: Labels cannot be replaced, or the data change with the seed.
        HydraError: Whatever went wrong in a training; those that are done are kept.
    """
    run, recipe, treatments = asked.run, asked.surveyed.recipe, asked.treatments()
    for arm in asked.comparison.arms:
        if len(arm.index):
            check_replaceable(recipe, arm.index, asked.surveyed.train_labels)
    if asked.seeds > 1:
        data = data_digests(recipe)
        for seed in seeds_of(recipe, asked.seeds)[1:]:
            check_same_data(recipe, seed, data)
    units = {treatment.unit: treatment for _, _, treatment in treatments}
    executor = make_executor(asked.spec)
    try:
        runner = Runner(directory=run.directory, executor=executor, observer=observer)
        stage = Stage(
            name=CLEAN_RETRAIN,
            units=[treatment.as_unit() for treatment in units.values()],
            handler=lambda: CleanedWork(
                uri=run.uri,
                recipe=recipe,
                compute=compute_of(asked.spec),
                n_test=asked.surveyed.n_test,
            ),
            total=sum(one.steps(recipe.batch_size, recipe.epochs) for one in units.values()),
            label="step",
            kept=sum(unit not in units for unit in run.directory.units(CLEAN_RETRAIN)),
        )
        run_stage(runner, stage)
    finally:
        executor.close()
    return _summed(asked, treatments)


def _summed(asked: Retraining, treatments: Sequence[tuple[str, int, Treatment]]) -> Outcome:
    directory, values = asked.run.directory, asked.decision.values
    reading = directory.ledger.remember()
    decided = directory.manifest(CLEAN, asked.decision.name)
    directory.ledger.use([] if decided is None else [decided])
    judging = None if values.judging is None else np.asarray(values.judging)
    measured: dict[str, tuple[float, float]] = {}
    for _, _, treatment in treatments:
        if treatment.unit not in measured:
            measured[treatment.unit] = _measured(test_losses_of(directory, treatment.unit), judging)
    arm, seed, unit, samples = zip(
        *((name, seed, one.unit, len(one.kept)) for name, seed, one in treatments), strict=True
    )
    table = pa.table(
        {
            "arm": arm,
            "seed": seed,
            "unit": unit,
            "samples": samples,
            "accuracy": [measured[one][0] for one in unit],
            "loss": [measured[one][1] for one in unit],
        }
    )
    outcome = Outcome(
        decision=asked.decision.name,
        way=asked.way,
        seeds=tuple(seeds_of(asked.surveyed.recipe, asked.seeds)),
        judging=asked.surveyed.n_test if judging is None else len(judging),
        trust=values.trust,
        arms=arm_outcomes(table),
        notes=asked.comparison.notes,
    )
    name = asked.decision.name
    files = [layout.decision(name, file) for file in (layout.OUTCOME_TABLE, layout.OUTCOME_SUMMARY)]
    directory.drop(CLEAN_OUTCOME, name)
    write_table(directory.path(files[0]), table.cast(RETRAINED), RETRAINED)
    write_bytes(directory.path(files[1]), dump(to_json(outcome), seal=True))
    directory.commit(CLEAN_OUTCOME, name, files, {}, reading)
    return outcome


def _measured(table: pa.Table, judging: npt.NDArray[np.int64] | None) -> tuple[float, float]:
    """Return accuracy (NaN: unknown) and mean loss on the test samples that judge."""
    mine = slice(None) if judging is None else np.isin(table["test_index"].to_numpy(), judging)
    correct, loss = table["correct"].to_numpy()[mine], table["loss"].to_numpy()[mine]
    known = correct[correct >= 0]
    return (float(known.mean()) if len(known) else math.nan), float(loss.mean())


def arm_outcomes(table: pa.Table) -> tuple[ArmOutcome, ...]:
    """Return what the retrainings of each arm say together.

    Args:
        table: One row a (arm, seed); see ``storage.schemas.RETRAINED``.
    """
    names = list(dict.fromkeys(table["arm"].to_pylist()))
    owner = np.asarray(table["arm"].to_pylist())

    def column(name: str, arm: str) -> Floats:
        values: Floats = table[name].to_numpy()[owner == arm].astype(np.float64)
        return values

    def compared(arm: str, other: str) -> Spread | None:
        if arm == other or other not in names:
            return None
        by = "accuracy" if np.isfinite(column("accuracy", arm)).all() else "loss"
        return spread(column(by, arm) - column(by, other))

    return tuple(
        ArmOutcome(
            arm=arm,
            samples=float(column("samples", arm).mean()),
            loss=spread(column("loss", arm)),
            losses=tuple(column("loss", arm).tolist()),
            accuracy=spread(accuracy) if np.isfinite(accuracy := column("accuracy", arm)).all() else None,
            accuracies=tuple(accuracy.tolist()) if np.isfinite(accuracy).all() else (),
            to_before=compared(arm, BEFORE),
            to_random=compared(arm, RANDOM),
        )
        for arm in names
    )


def spread(values: Floats) -> Spread:
    """Return mean, standard deviation and the 95% interval of the mean by Student's t, of K values."""
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Spread(mean=mean)
    from scipy import stats

    std = float(values.std(ddof=1))
    half = float(stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return Spread(mean=mean, std=std, low=mean - half, high=mean + half)
