"""Stages and the one runner that does them: skip what is committed, do the rest, time it, note it.

A stage is a value; what makes it looks at what is there already. A run of several is a generator that
yields one stage after the other, so that a later one can be made from what an earlier one committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from ...storage.errors import CorruptStore, IncompleteStage
from ...storage.ledger import Reading
from ...storage.lock import stop_asked
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ..executors.base import Executor, Handler, Unit, stopped
from ..executors.events import Note, Observer, StageFinished, StageStarted, UnitSkipped
from ..plan.sharding import Shard
from ..plan.survey import Survey
from ..reading.run_info import RunInfo, StageEntry, read_info, update_info
from ..spec.spec import RunSpec
from ..vocabulary import COMPLETE, INDEX, PARTIAL, RECORD
from .stores import StoreOf
from .writing import fence


@dataclass(frozen=True, kw_only=True, slots=True)
class Needed:
    """A unit that an earlier stage must have committed, and the command that does so."""

    stage: str
    unit: str
    command: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """What stages of a run are done with.

    Attributes:
        directory: Where the run is.
        executor: What does the units.
        observer: Hears of everything that happens.
    """

    directory: RunDirectory
    executor: Executor
    observer: Observer

    def note(self, message: str) -> None:
        """Tell the observer."""
        self.observer(Note(message=message))

    def info(self) -> RunInfo:
        """Return ``run.json`` as it is now."""
        return read_info(self.directory)

    def update(self, change: Callable[[RunInfo], RunInfo]) -> None:
        """Change ``run.json`` as it is now, so that nothing another command noted is lost."""
        update_info(self.directory, change)

    def require(self, *needed: Needed) -> None:
        """Raise where one of these units is not committed.

        Raises:
            IncompleteStage: Names stage, unit and command.
        """
        for one in needed:
            if self.directory.manifest(one.stage, one.unit) is None:
                raise IncompleteStage(
                    f"{self.directory.uri}: stage {one.stage} has not finished {one.unit}; "
                    f"run `hydra-pipe {one.command}` with the same options first"
                )

    def valid(self, stage: str, unit: str) -> bool:
        """Whether a unit is committed, its files are what was committed and so is what it was made from; else forget it."""
        directory = self.directory
        try:
            manifest = directory.manifest(stage, unit)
            if manifest is None:
                return False
            problems = directory.check(manifest, digests=True, recall=True)
            other = directory.ledger.other_inputs(manifest)
        except CorruptStore as error:
            problems, other = [str(error)], []
        if other:
            self.note(f"{stage} {unit} is done again: it was made from another version of {other[0]}")
            void_outdated(self)
            return False
        if not problems:
            return True
        self.note(f"{stage} {unit} is done again: {problems[0]}")
        directory.drop(stage, unit)
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Session(Runner):
    """What everything that drives a run is given.

    Attributes:
        spec: What was asked for.
        surveyed: What the recipe came to.
    """

    spec: RunSpec
    surveyed: Survey

    def reduce_memory(self) -> int:
        """Return the memory that the run's tiles are cut for: what it began with, so that bits stay the same."""
        return self.info().reduce_memory or self.spec.reduce_memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a run: its units, who does them, what they need and what they commit.

    Attributes:
        name: Of the stage.
        units: Each commits itself.
        handler: Makes what does them; called where there is something to do, after ``needs``.
        total: Steps of progress, over all units; 0: unknown.
        label: What such a step is called.
        needs: What must be there.
        store: What the units fill, made and committed before the first of them; None: none, or who
            yields the stage commits it afterwards.
        closing: Whether there is a closing unit: the store's, or one committed afterwards.
        voids: Stages whose results are void as soon as a unit is done anew, where their manifests do not
            say what they were made from: those of earlier versions.
        kept: Units of the stage that are none of ``units`` and stay.
    """

    name: str
    units: Sequence[Unit]
    handler: Callable[[], Handler]
    total: int
    label: str
    needs: Sequence[Needed] = ()
    store: StoreOf | None = None
    closing: bool = True
    voids: Sequence[str] = ()
    kept: int = 0


Stages = Generator[Stage, list[str], None]
"""Yields stages; gets back the names of the units that were done anew."""


def run_stages(runner: Runner, stages: Stages) -> None:
    """Do stages in the order in which they are yielded.

    Raises:
        IncompleteStage: What a stage needs is not there.
        RunStopped: The command was asked to stop, and units are left.
        HydraError: Whatever went wrong in a unit; committed work is kept.
    """
    try:
        stage = next(stages)
        while True:
            stage = stages.send(run_stage(runner, stage))
    except StopIteration:
        return


def run_stage(runner: Runner, stage: Stage) -> list[str]:
    """Do the units of a stage that have no valid manifest; return their names."""
    runner.require(*stage.needs)
    if stage.store is not None:
        commit_store(runner, stage.name, stage.store)
    begun, observer = time.monotonic(), runner.observer
    observer(
        StageStarted(stage=stage.name, units=len(stage.units), total=stage.total, unit_label=stage.label)
    )
    todo = []
    if stop_asked():
        raise stopped(stage.name, len(stage.units))
    runner.directory.ledger.refresh()
    before = runner.directory.ledger.contents(stage.name)
    for unit in stage.units:
        if runner.valid(stage.name, unit.name):
            observer(UnitSkipped(stage=stage.name, unit=unit.name))
        else:
            todo.append(unit)
    if todo:
        # Before the work: killed in it, nothing may be left that was made from what is replaced.
        void(runner, stage.voids)
    count = len(stage.units) + stage.kept + stage.closing
    _note_stage(runner, stage.name, count, 0.0)
    if todo:
        handler = fence(runner.directory, stage.handler())
        runner.executor.run(stage.name, todo, handler, observer, label=stage.label, stopping=stop_asked)
        runner.directory.ledger.refresh()
        _note_stage(runner, stage.name, count, time.monotonic() - begun)
        if runner.directory.ledger.contents(stage.name) != before:
            void_outdated(runner)
    observer(StageFinished(stage=stage.name, seconds=time.monotonic() - begun))
    return [unit.name for unit in todo]


def _note_stage(runner: Runner, name: str, units: int, seconds: float) -> None:
    """Note how many units a stage has and the time that went into it; write only what is news."""

    def change(info: RunInfo) -> RunInfo:
        spent = info.stages.get(name, StageEntry()).seconds
        if seconds:
            spent = (spent or 0.0) + seconds
        return info.with_stage(name, units=units, seconds=spent)

    runner.update(change)


def void(runner: Runner, stages: Sequence[str]) -> None:
    """Forget stages whose manifests do not say what they were made from: those of earlier versions."""
    directory, dropped = runner.directory, []
    for stage in stages:
        if any(manifest.inputs is None for manifest in directory.ledger.readable(stage)):
            directory.drop(stage)
            dropped.append(stage)
    _say_partial(runner, dropped)


def void_outdated(runner: Runner) -> None:
    """Forget all units that were made from another version of what is there, and what was made from them."""
    directory = runner.directory
    outdated = directory.ledger.outdated_units(directory.stages())
    for manifest in outdated:
        directory.drop(manifest.stage, manifest.unit)
    _say_partial(runner, sorted({manifest.stage for manifest in outdated}))


def _say_partial(runner: Runner, stages: Sequence[str]) -> None:
    """Note that methods with units dropped are not complete."""
    if not stages:
        return

    def change(info: RunInfo) -> RunInfo:
        for name, entry in info.methods.items():
            if entry.state == COMPLETE and any(stage.startswith(f"{name}/") for stage in stages):
                info = info.with_method(name, state=PARTIAL)
        return info

    runner.update(change)


def after_the_record(directory: RunDirectory) -> list[str]:
    """Return the stages with results that a new record makes void: all others."""
    return [stage for stage in directory.stages() if stage != RECORD]


def commit_store(runner: Runner, stage: str, store: StoreOf) -> None:
    """Make a stage's store, where that is not done, and commit its metadata and per-row columns."""
    made = make_store(runner, stage, store)
    if made is not None:
        commit_index(runner.directory, stage, store, made)


def make_store(runner: Runner, stage: str, store: StoreOf) -> RowStore | None:
    """Make a stage's store, anew where its metadata are damaged; None: it is there and committed."""
    known = INDEX in runner.directory.units(stage)
    if runner.valid(stage, INDEX):
        return None
    return store.rebuild(runner.directory) if known else store.create(runner.directory)


def commit_index(
    directory: RunDirectory, stage: str, store: StoreOf, made: RowStore, reading: Reading | None = None
) -> None:
    """Commit the metadata and per-row columns of a store; ``reading``: what the columns were made from."""
    directory.commit(stage, INDEX, [f"{store.base}/{name}" for name in made.metadata_files()], {}, reading)


def units_of(stage: str, spans: Sequence[Shard], row_bytes: int = 0) -> list[Unit]:
    """Return one unit a span of rows, each of which becomes ``row_bytes`` at most (0: not known)."""
    return [
        Unit(stage=stage, name=span.name, arguments=span, disk_bytes=span.rows * row_bytes) for span in spans
    ]
