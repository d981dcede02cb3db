"""The mechanics of stages: which units are done, which must be done again, and having them done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ...storage.errors import CorruptStore, IncompleteStage
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...storage.uri import is_local
from ..executors.base import Executor, Handler, Unit
from ..executors.events import Note, Observer, StageFinished, StageStarted, UnitSkipped
from ..plan.sharding import Shard
from ..vocabulary import INDEX, RECORD
from .stores import rebuild


class Stages:
    """What drivers share. ``info`` is ``run.json``, written whenever a stage begins or ends."""

    def __init__(
        self, directory: RunDirectory, executor: Executor, observer: Observer, info: dict[str, Any]
    ) -> None:
        self.directory, self.executor, self.observer, self.info = directory, executor, observer, info

    def _stage(self, stage: str, units: Sequence[Unit], total: int, label: str, extra: int = 0) -> list[str]:
        """Do the units of a stage that have no valid manifest; return their names."""
        begun = time.monotonic()
        self.info["stages"].setdefault(stage, {})["units"] = len(units) + extra
        self.observer(StageStarted(stage=stage, units=len(units), total=total, unit_label=label))
        todo = []
        for unit in units:
            if self._valid(stage, unit.name):
                self.observer(UnitSkipped(stage=stage, unit=unit.name))
            else:
                todo.append(unit)
        if todo:
            if stage == RECORD:
                self._forget_what_followed()
            self.directory.write(self.info)
            self.executor.run(stage, todo, self._tasks(stage), self.observer)
        seconds = time.monotonic() - begun
        if todo:
            entry = self.info["stages"][stage]
            entry["seconds"] = entry.get("seconds", 0.0) + seconds
            self.directory.write(self.info)
        self.observer(StageFinished(stage=stage, seconds=seconds))
        return [unit.name for unit in todo]

    def _forget_what_followed(self) -> None:
        """A new record makes everything computed from an older one void."""
        for stage in self.directory.stages():
            if stage != RECORD:
                self.directory.drop(stage)
        for method in self.info["methods"].values():
            if method["state"] == "complete":
                method["state"] = "partial"

    def _make_store(self, stage: str, base: str, **described: Any) -> RowStore:
        """Return a stage's store: as committed, made anew where its metadata are damaged, or fresh."""
        uri = self.directory.path(base)
        known = INDEX in self.directory.units(stage)
        if self._valid(stage, INDEX):
            return RowStore.open(uri, described["name"])
        return rebuild(uri, **described) if known else RowStore.create(uri, **described)

    def _valid(self, stage: str, unit: str) -> bool:
        """Whether a unit is committed and its files are what was committed; else forget it."""
        try:
            manifest = self.directory.manifest(stage, unit)
            if manifest is None:
                return False
            problems = self.directory.check(manifest, digests=is_local(self.directory.uri))
        except CorruptStore as error:
            problems = [str(error)]
        if not problems:
            return True
        self.observer(Note(message=f"{stage} {unit} is done again: {problems[0]}"))
        self.directory.drop(stage, unit)
        return False

    def _needs(self, stage: str, unit: str, command: str) -> None:
        if self.directory.manifest(stage, unit) is None:
            raise IncompleteStage(
                f"{self.directory.uri}: stage {stage} has not finished {unit}; "
                f"run `hydra-pipe {command}` with the same options first"
            )

    def _commit_index(self, stage: str, base: str, store: RowStore) -> None:
        self.directory.commit(stage, INDEX, [f"{base}/{name}" for name in store.metadata_files()], {})

    def _tasks(self, stage: str) -> Handler:
        """Return the handler of a stage."""
        raise AssertionError("each driver has its own")


def units_of(stage: str, spans: Sequence[Shard]) -> list[Unit]:
    """Return one unit a span of rows."""
    return [
        Unit(stage=stage, name=span.name, arguments={"start": span.start, "stop": span.stop})
        for span in spans
    ]
