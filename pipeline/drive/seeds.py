"""Several seeds: the same run again inside the first one, and the average of their contributions.

The run itself is the first member, with the recipe's seed s. The others, with seeds s + 1 and on, are
whole runs in ``seeds/seed=N``: the same data, the same tracked and tested samples, other initial
weights, batch order, dropout and augmentation. More can be added later. The average is a method of
its own in the first run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from ...storage.errors import HydraError, InputError, SpecMismatch
from ...storage.rundir import RunDirectory
from ...workers.recipe import Recipe
from ...workers.training.made_of import of_another_seed
from ...workers.training.same_data import check_same_data, data_digests, with_seed
from ..executors.base import Executor, Report, Unit
from ..executors.events import Note, Observer, StageFinished, StageStarted
from ..plan.compatibility import place, stored_run
from ..plan.plan import cut
from ..plan.survey import Survey
from ..reading.reader import Reader, open_reader
from ..spec.spec import RunSpec, averaged
from ..units.average import AverageTasks, content
from ..units.tasks import Tasks
from ..vocabulary import ADJOINT, INDEX, RECORD, REDUCE, TEST_GRADIENTS, TRAJECTORY
from .drive import _Driver, make_driver
from .run_info import average_entry, target_notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A run with another seed: what to run, and the recipe's numbers."""

    seed: int
    spec: RunSpec
    surveyed: Survey


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
    make_driver(spec, surveyed, executor, observer).drive(stages)
    drive_members(spec, surveyed, directory, data, executor, observer, stages)
    if REDUCE in stages:
        average(spec, surveyed, directory, spec.method, executor, observer)


def check_data(spec: RunSpec, surveyed: Survey, directory: RunDirectory) -> Mapping[str, str]:
    """Return digests of the data, which must be the same with the seeds that are not recorded yet.

    Raises:
        RecipeError: They are others with another seed.
        SpecMismatch: They are others than when the first seeds were recorded.
    """
    stored = stored_run(directory, spec, surveyed)
    data = data_digests(surveyed.recipe)
    before = (stored or {}).get("seeds", {}).get("data", data)
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


def drive_members(
    spec: RunSpec,
    surveyed: Survey,
    directory: RunDirectory,
    data: Mapping[str, str],
    executor: Executor,
    observer: Observer,
    stages: Sequence[str],
) -> list[Member]:
    """Do the stages for all seeds but the first; return their runs."""
    info = directory.read()
    known = info.get("seeds", {}).get("others", [])
    info["seeds"] = {
        "first": surveyed.recipe.seed,
        "others": sorted({*known, *_others(spec, surveyed)}),
        "data": dict(data),
    }
    directory.write(info)
    members = [_member(spec, surveyed, directory, seed) for seed in _others(spec, surveyed)]
    todo = [m for m in members if REDUCE in stages or not _has(directory.of_seed(m.seed), stages)]
    drivers = {}
    for m in todo:
        with naming(m.seed):
            drivers[m.seed] = make_driver(m.spec, m.surveyed, executor, observer)
    if RECORD in stages:
        _record_ahead(drivers, executor, observer)
    for seed, driver in drivers.items():
        count = seed - surveyed.recipe.seed + 1
        observer(Note(message=f"seed {seed}, {count} of {spec.seeds}: {driver.directory.uri}"))
        with naming(seed):
            driver.drive(stages)
    return members


def average(
    spec: RunSpec,
    surveyed: Survey,
    directory: RunDirectory,
    source: str,
    executor: Executor,
    observer: Observer,
) -> None:
    """Average the method ``source`` over all ``spec.seeds`` runs, which must hold it.

    Raises:
        IncompleteStage: One of them does not.
    """
    shaped = replace(spec, mode=ADJOINT, hessian="none", exact_rank=0, seeds=1, memory=None)
    _Average(shaped, surveyed, directory, executor, observer, source, seeds_of(spec, surveyed)).drive()


def announce(directory: RunDirectory, source: str, seeds: Sequence[int]) -> None:
    """Note in ``run.json`` that a method is to be averaged, so that ``status`` knows what is missing."""
    info = directory.read()
    info["methods"].setdefault(averaged(source, len(seeds)), {"state": "partial"}).update(
        average_entry(source, seeds)
    )
    directory.write(info)


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


def _has(directory: RunDirectory, stages: Sequence[str]) -> bool:
    """Whether record and test gradients, as far as they are asked for, are committed."""
    needed = {RECORD: TRAJECTORY, TEST_GRADIENTS: INDEX}
    return all(stage in needed and directory.manifest(stage, needed[stage]) for stage in stages)


def _member(spec: RunSpec, surveyed: Survey, directory: RunDirectory, seed: int) -> Member:
    # A share is drawn with the run's seed; the other seeds look at the same samples.
    track = tuple(surveyed.tracked.tolist()) if str(spec.track).endswith("%") else spec.track
    test = tuple(surveyed.tested.tolist()) if str(spec.test).endswith("%") else spec.test
    out = directory.of_seed(seed).uri
    own = replace(spec, seeds=1, seed=seed, out=out, track=track, test=test)
    # All that the survey found but the recipe itself is the same with every seed: `check_data`.
    made = of_another_seed(surveyed.made_of)
    other = replace(surveyed, recipe=with_seed(surveyed.recipe, seed), made_of=made, notes=())
    return Member(seed=seed, spec=own, surveyed=other)


@dataclass(kw_only=True)
class _RecordTasks:
    """Handler that records several members at a time; ``tasks`` by unit."""

    tasks: Mapping[str, tuple[int, Tasks]]

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        seed, task = self.tasks[unit.name]
        with naming(seed):
            return task(Unit(stage=RECORD, name=TRAJECTORY, arguments={}), report)


def _record_ahead(drivers: Mapping[int, _Driver], executor: Executor, observer: Observer) -> None:
    """Record the members that are new side by side: a record alone keeps one worker busy."""
    fresh = {seed: driver for seed, driver in drivers.items() if not driver.directory.stages()}
    if len(fresh) < 2:
        return
    begun, tasks = time.monotonic(), {}
    for seed, driver in fresh.items():
        driver.directory.clear_litter()
        driver.directory.write(driver.info)
        tasks[f"seed-{seed}"] = (seed, driver._tasks(RECORD))
    units = [Unit(stage=RECORD, name=name, arguments={}) for name in tasks]
    steps = sum(driver.plan.steps for driver in fresh.values())
    observer(StageStarted(stage=RECORD, units=len(units), total=steps, unit_label="step"))
    executor.run(RECORD, units, _RecordTasks(tasks=tasks), observer)
    observer(StageFinished(stage=RECORD, seconds=time.monotonic() - begun))


class _Average(_Driver):
    """The one stage of an average, with the driver's mechanics."""

    def __init__(
        self,
        spec: RunSpec,
        surveyed: Survey,
        directory: RunDirectory,
        executor: Executor,
        observer: Observer,
        source: str,
        seeds: Sequence[int],
    ) -> None:
        self.source, self.seeds = source, list(seeds)
        self.members = [directory, *(directory.of_seed(seed) for seed in self.seeds[1:])]
        self.name = averaged(source, len(self.seeds))
        # Tiles follow from the numbers of samples alone; shards there are none.
        plan = cut(spec, surveyed, {}, shards=1)
        super().__init__(spec, surveyed, plan, directory, executor, observer, directory.read())
        self.method = self.base = self.name
        self.options = {}
        self.reduce_stage = f"{self.name}/{REDUCE}"

    def drive(self, stages: Sequence[str] = ()) -> None:
        """Average."""
        for seed, member in zip(self.seeds, self.members, strict=True):
            with naming(seed):
                open_reader(member.uri).method(self.source)
        self.digests = tuple(content(member, self.source) for member in self.members)
        made = self.directory.manifests(self.reduce_stage)
        if any(tuple(m.values.get("members", self.digests)) != self.digests for m in made):
            self.observer(Note(message=f"{self.name} is averaged again: a member's contributions changed"))
            self.directory.drop(self.reduce_stage)
        self.directory.write(self.info)
        self._reduce_method(self.name)
        self.info["methods"][self.name]["state"] = "complete"
        self.directory.write(self.info)

    def _tasks(self, stage: str) -> Tasks:
        given = super()._tasks(stage)
        values = {field.name: getattr(given, field.name) for field in fields(given)}
        uris = tuple(member.uri for member in self.members)
        return AverageTasks(**values, source=self.source, members=uris, digests=self.digests)

    def _info(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        info = {**stored, "methods": {k: dict(v) for k, v in stored.get("methods", {}).items()}}
        info["stages"] = {k: dict(v) for k, v in stored.get("stages", {}).items()}
        entry = info["methods"].setdefault(self.name, {"state": "partial"})
        entry.update(average_entry(self.source, self.seeds), **target_notes(self.spec, self.plan))
        info["method"] = self.name
        return info
