"""What all handlers have in common: a unit is done, timed, and committed last.

Doing a unit twice gives the same files, so a unit whose worker died half-way is simply done again.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...storage import layout
from ...storage.rundir import RunDirectory
from ...storage.space import require_free
from ...storage.trajectory import Trajectory, open_trajectory
from ...storage.typed import to_json
from ...workers.data.user_code import user_code
from ...workers.memory import peak_bytes, reset_peak
from ...workers.recipe import Recipe
from ...workers.training.training import Compute, Training
from ...workers.training.verified import digests_checked
from ..executors.base import Report, Unit
from ..plan.sharding import Shard
from ..reading.unit_values import UnitValues

Result = tuple[list[str], UnitValues]
"""The files of a unit, relative to the run, and what its manifest says."""


def commit_unit(uri: str, unit: Unit, work: Callable[[RunDirectory], Result]) -> dict[str, Any]:
    """Do a unit and commit it; return its manifest's values, seconds and peak memory among them.

    ``digest_checks`` is returned too: how many digests of weights were compared with the record's meanwhile.

    Args:
        uri: The run directory.
        unit: What is done.
        work: Does it; gets the run directory.

    Raises:
        HydraError: What went wrong; what the recipe's own code raised is a ``RecipeError``.
    """
    begun, checked = time.perf_counter(), digests_checked()
    reset_peak()
    run = RunDirectory(uri)
    require_free(run.uri, unit.disk_bytes, f"{unit.stage} {unit.name}")
    reading = run.ledger.remember()
    with user_code(f"{unit.stage} {unit.name} raised"):
        files, values = work(run)
    values = replace(values, seconds=time.perf_counter() - begun, peak_bytes=peak_bytes())
    noted: dict[str, Any] = to_json(values)
    run.commit(unit.stage, unit.name, files, noted, reading)
    return {**noted, "digest_checks": digests_checked() - checked}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work(ABC):
    """A handler of the units of one stage; picklable.

    Attributes:
        uri: The run directory.
    """

    side_by_side: ClassVar[bool] = True
    """Whether two workers may do the same unit at the same time; not where it clears a place before it writes there."""

    uri: str

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        """Do and commit one unit; return its manifest's values."""
        return commit_unit(self.uri, unit, lambda run: self.do(run, unit, report))

    @abstractmethod
    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Read what earlier stages committed, do the unit and write its files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWork(Work):
    """A handler that trains, or passes through the trained model.

    Attributes:
        recipe: The user's recipe, overrides applied.
        compute: How every process computes.
    """

    recipe: Recipe
    compute: Compute

    def training(self) -> Training:
        """Return a fresh training of the recipe."""
        return Training(self.recipe, self.compute)

    def coupled(self) -> Training:
        """Return one that differentiates through batch statistics, as exact forms do."""
        return Training(self.recipe, replace(self.compute, batch_norm="coupled"))


def recorded(run: RunDirectory) -> Trajectory:
    """Return the record of a run."""
    return open_trajectory(run.path(layout.TRAJECTORY), run.vouched)


def rows_of(unit: Unit) -> tuple[int, int]:
    """Return the rows that a unit is about."""
    assert isinstance(unit.arguments, Shard)
    return unit.arguments.start, unit.arguments.stop
