"""The unit of the record: one training, kept step by step."""

from __future__ import annotations

from dataclasses import dataclass

from ...storage import layout
from ...storage.files import list_files
from ...storage.rundir import RunDirectory
from ...workers.training.record import Recorder
from ..executors.base import Report, Unit
from ..reading.unit_values import RecordValues
from .work import Result, TrainingWork


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordWork(TrainingWork):
    """Handler of the record.

    Attributes:
        checkpoint_every: Steps between checkpoints, or None.
    """

    checkpoint_every: int | None

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Train and write the trajectory."""
        training = self.training()
        uri = run.path(layout.TRAJECTORY)
        closing = Recorder(training, uri, self.checkpoint_every).run(report)
        checked = closing.pop("checked_steps")
        files = [f"{layout.TRAJECTORY}/{name}" for name in list_files(uri)]
        return files, RecordValues(
            steps=training.steps, dimension=training.layout.dimension, checked_steps=checked, closing=closing
        )
