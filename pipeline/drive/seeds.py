"""Several seeds: the same run again inside the first one, and the average of their contributions.

The run itself is the first member, with the recipe's seed s. The others, with seeds s + 1 and on, are
whole runs in ``seeds/seed=N``: the same data, the same tracked and tested samples, other initial
weights, batch order, dropout and augmentation. More can be added later. The average is a method of
its own in the first run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ...storage.errors import HydraError, InputError, SpecMismatch
from ...storage.lock import stop_asked
from ...storage.rundir import RunDirectory
from ...workers.recipe import Recipe
from ...workers.training.made_of import of_another_seed
from ...workers.training.same_data import check_same_data, data_digests, with_seed
from ..executors.base import Executor, Handler, Report, Unit
from ..executors.events import Observer, StageFinished, StageStarted
from ..plan.compatibility import place, stored_run
from ..plan.plan import cut_reduce
from ..plan.sharding import itemsize_of
from ..plan.survey import Survey
from ..reading.reader import Reader, open_reader
from ..reading.run_info import RunInfo, SeedsEntry
from ..reading.unit_values import ReduceValues, all_values
from ..spec.spec import RunSpec, averaged
from ..spec.targets import target_set
from ..units.average import AverageWork, content
from ..vocabulary import ADJOINT, COMPLETE, INDEX, RECORD, REDUCE, TEST_GRADIENTS, TRAJECTORY
from .drive import Begun, begin, drive
from .gradients import record_work
from .notes import average_notes, target_notes
from .reduce import reduce_job, reduce_method
from .stages import Session, run_stages
from .writing import fence, writing


def run_seeds(
    spec: RunSpec, surveyed: Survey, executor: Executor, observer: Observer, stages: Sequence[str]
) -> None:
    """Do the stages for every seed, then average what they reduced to.

    Raises:
        RecipeError: The recipe's data change with its seed.
        HydraError: Whatever went wrong with a member; the message begins with its seed.
    """
    directory = RunDirectory(place(spec, surveyed))
    data = check_data(spec, surveyed, directory)
    first = begin(spec, surveyed, executor, observer)
    drive(first, stages)
    drive_members(first.session, data, stages)
    if REDUCE in stages:
        average(first.session, spec.method)


def check_data(spec: RunSpec, surveyed: Survey, directory: RunDirectory) -> Mapping[str, str]:
    """Return digests of the data, which must be the same with the seeds that are not recorded yet.

    Raises:
        RecipeError: They are others with another seed.
        SpecMismatch: They are others than when the first seeds were recorded.
    """
    stored = stored_run(directory, spec, surveyed)
    data = data_digests(surveyed.recipe)
    before = stored.seeds.data if stored and stored.seeds else data
    for what in dict.fromkeys([*before, *data]):
        if what.endswith("labels") and not (what in before and what in data):
            continue  # the samples hold them; earlier versions knew them by attributes alone
        if before.get(what) != data.get(what):
            raise SpecMismatch(
                f"{directory.uri}: the {what} are not those of the seeds recorded before; give the same data, "
                "or use another --out"
            )
    for seed in _others(spec, surveyed):
        there = stored is not None and directory.of_seed(seed).manifest(RECORD, TRAJECTORY) is not None
        if not there:
            check_same_data(surveyed.recipe, seed, data)
    return data


def drive_members(session: Session, data: Mapping[str, str], stages: Sequence[str]) -> list[Session]:
    """Do the stages for all seeds but the first; return what their runs are driven with.

    Args:
        session: Of the first seed's run, of a spec with several.
        data: What `check_data` returned.
        stages: As of ``drive``.
    """
    spec, surveyed = session.spec, session.surveyed
    others = _others(spec, surveyed)

    def note(info: RunInfo) -> RunInfo:
        known = tuple(sorted({*info.other_seeds, *others}))
        return replace(info, seeds=SeedsEntry(first=surveyed.recipe.seed, others=known, data=data))

    session.update(note)
    members = {seed: _member(session, seed) for seed in others}
    begun = {}
    with ExitStack() as stack:
        for seed, member in members.items():
            if REDUCE in stages or not _has(member.directory, stages):
                with naming(seed):
                    observer = stack.enter_context(held(member))
                    begun[seed] = begin(member.spec, member.surveyed, session.executor, observer)
        if RECORD in stages:
            _record_ahead(session, begun)
        for seed, one in begun.items():
            count = seed - surveyed.recipe.seed + 1
            session.note(f"seed {seed}, {count} of {spec.seeds}: {one.session.directory.uri}")
            with naming(seed):
                drive(one, stages)
    return list(members.values())


def average(session: Session, source: str) -> None:
    """Average the method ``source`` over all ``spec.seeds`` runs, which must hold it.

    Raises:
        IncompleteStage: One of them does not.
    """
    spec, surveyed, directory = session.spec, session.surveyed, session.directory
    seeds = seeds_of(spec, surveyed)
    name = averaged(source, len(seeds))
    stage = f"{name}/{REDUCE}"
    members = [directory, *(directory.of_seed(seed) for seed in seeds[1:])]
    for seed, member in zip(seeds, members, strict=True):
        with naming(seed):
            open_reader(member.uri).method(source)
    digests = tuple(content(member, source) for member in members)
    made = all_values(ReduceValues, directory, stage)
    if any(unit.members is not None and unit.members != digests for unit in made):
        session.note(f"{name} is averaged again: a member's contributions changed")
        directory.drop(stage)
    # Tiles follow from the numbers of samples alone; shards there are none.
    targets = target_set(spec.targets, surveyed.tested, surveyed.test_labels[surveyed.tested])
    row = surveyed.columns * itemsize_of(spec.dtype)
    cut = cut_reduce(len(surveyed.tracked), len(targets), row, session.reduce_memory())

    def note(info: RunInfo) -> RunInfo:
        return replace(
            info.with_method(name, **average_notes(source, seeds), **target_notes(targets)), method=name
        )

    session.update(note)

    def work() -> AverageWork:
        return AverageWork(
            uri=directory.uri,
            job=reduce_job(session, cut, method=name, base=name, targets=targets.kind, mode=ADJOINT),
            source=source,
            members=tuple(member.uri for member in members),
            digests=digests,
        )

    run_stages(session, reduce_method(session, cut, name, work))
    session.update(lambda info: info.with_method(name, state=COMPLETE))


def announce(session: Session, source: str) -> None:
    """Note in ``run.json`` that a method is to be averaged, so that ``status`` knows what is missing."""
    seeds = seeds_of(session.spec, session.surveyed)
    name = averaged(source, len(seeds))
    session.update(lambda info: info.with_method(name, **average_notes(source, seeds)))


def seeds_of(spec: RunSpec, surveyed: Survey) -> list[int]:
    """Return all seeds of a run, the first its own."""
    return [surveyed.recipe.seed, *_others(spec, surveyed)]


def recorded(run: Reader, recipe: Recipe, seeds: int) -> list[tuple[RunDirectory, Recipe]]:
    """Return the runs of all seeds but the first, with their recipes, for training them again.

    Args:
        run: The first seed's run.
        recipe: Its recipe.
        seeds: How many seeds, the first included.

    Raises:
        InputError: The run has not as many.
        IncompleteStage: One of them was not recorded.
    """
    there, found = run.members(), []
    for seed in range(recipe.seed + 1, recipe.seed + seeds):
        if seed not in there:
            raise InputError(
                f"{run.uri} has no run with seed {seed}, only {', '.join(map(str, [recipe.seed, *sorted(there)]))}; "
                f"make it with hydra-pipe run ... --seeds {seeds}, or ask for fewer --seeds"
            )
        with naming(seed):
            there[seed].trajectory()
        found.append((there[seed].directory, with_seed(recipe, seed)))
    return found


@contextmanager
def naming(seed: int) -> Iterator[None]:
    """Begin what goes wrong with the seed it went wrong with."""
    try:
        yield
    except HydraError as error:
        raise type(error)(f"seed {seed}: {error}") from error


def _others(spec: RunSpec, surveyed: Survey) -> range:
    return range(surveyed.recipe.seed + 1, surveyed.recipe.seed + spec.seeds)


def held(member: Session) -> AbstractContextManager[Observer]:
    """Hold the run of another seed: someone may work in it as in any run."""
    return writing(member.directory, member.observer, command="run --seeds", wait=member.spec.wait)


def _has(directory: RunDirectory, stages: Sequence[str]) -> bool:
    """Whether record and test gradients, as far as they are asked for, are committed."""
    needed = {RECORD: TRAJECTORY, TEST_GRADIENTS: INDEX}
    return all(stage in needed and directory.manifest(stage, needed[stage]) for stage in stages)


def _member(session: Session, seed: int) -> Session:
    """Return what the run of another seed is driven with."""
    spec, surveyed, directory = session.spec, session.surveyed, session.directory.of_seed(seed)
    # A share is drawn with the run's seed; the other seeds look at the same samples.
    track = tuple(surveyed.tracked.tolist()) if str(spec.track).endswith("%") else spec.track
    test = tuple(surveyed.tested.tolist()) if str(spec.test).endswith("%") else spec.test
    own = replace(spec, seeds=1, seed=seed, out=directory.uri, track=track, test=test)
    # All that the survey found but the recipe itself is the same with every seed: `check_data`.
    made = of_another_seed(surveyed.made_of)
    kept = None if surveyed.row_map is None else replace(surveyed.row_map, seed=seed)
    other = replace(surveyed, recipe=with_seed(surveyed.recipe, seed), made_of=made, notes=(), row_map=kept)
    return replace(session, spec=own, surveyed=other, directory=directory)


@dataclass(frozen=True, kw_only=True, slots=True)
class _RecordAhead:
    """Handler that records several members at a time; ``works`` by unit: the seed, and its own handler."""

    works: Mapping[str, tuple[int, Handler]]

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        seed, work = self.works[unit.name]
        with naming(seed):
            return work(Unit(stage=RECORD, name=TRAJECTORY), report)


def _record_ahead(session: Session, begun: Mapping[int, Begun]) -> None:
    """Record the members that are new side by side: a record alone keeps one worker busy.

    Each commits into its own run, so these are no units of a stage of this one.
    """
    fresh = {seed: one for seed, one in begun.items() if not one.session.directory.stages()}
    if len(fresh) < 2:
        return
    started, works = time.monotonic(), {}
    for seed, one in fresh.items():
        one.session.directory.clear_litter()
        one.note((RECORD,))
        works[f"seed-{seed}"] = (
            seed,
            fence(one.session.directory, record_work(one.session, one.plan.segments.count)),
        )
    units = [Unit(stage=RECORD, name=name) for name in works]
    steps = sum(one.plan.steps for one in fresh.values())
    observer = session.observer
    observer(StageStarted(stage=RECORD, units=len(units), total=steps, unit_label="step"))
    session.executor.run(RECORD, units, _RecordAhead(works=works), observer, stopping=stop_asked)
    observer(StageFinished(stage=RECORD, seconds=time.monotonic() - started))
