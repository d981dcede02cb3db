"""The unit of the record: one training, kept step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...storage import layout
from ...storage.files import list_files
from ...storage.rundir import RunDirectory
from ...workers.training.record import Recorder
from ...workers.training.truncated import ended_at_checkpoint, write_ended
from ..executors.base import Report, Unit
from ..reading.unit_values import RecordValues
from .work import Result, TrainingWork, Work, recorded


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordWork(TrainingWork):
    """Handler of the record.

    Attributes:
        checkpoint_every: Steps between checkpoints, or None.
        visits: Whether each sample's visits are kept.
        segments: Of the replay, whose borders are kept.
    """

    side_by_side: ClassVar[bool] = False

    checkpoint_every: int | None
    visits: bool
    segments: int = 1

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Train and write the trajectory."""
        training = self.training()
        uri = run.path(layout.TRAJECTORY)
        recorder = Recorder(training, uri, self.checkpoint_every, visits=self.visits, segments=self.segments)
        closing = recorder.run(report)
        checked = closing.pop("checked_steps")
        files = [f"{layout.TRAJECTORY}/{name}" for name in list_files(uri)]
        return files, RecordValues(
            steps=training.steps,
            dimension=training.layout.dimension,
            checked_steps=checked,
            visits=recorder.visit_arrays,
            closing=closing,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CutWork(Work):
    """Handler of a record that is the beginning of another run's.

    Attributes:
        source: The run whose record is cut off.
        step: At which checkpoint.
    """

    side_by_side: ClassVar[bool] = False

    source: str
    step: int

    def do(self, run: RunDirectory, unit: Unit, report: Report) -> Result:
        """Write what was recorded until the checkpoint."""
        whole = recorded(RunDirectory(self.source))
        ended = ended_at_checkpoint(whole, whole.checkpoint_steps.tolist().index(self.step))
        uri = run.path(layout.TRAJECTORY)
        write_ended(ended, uri)
        closing = {name: float(values[-1]) for name, values in ended.epochs.items()}
        return [f"{layout.TRAJECTORY}/{name}" for name in list_files(uri)], RecordValues(
            steps=self.step,
            dimension=len(ended.last.weights),
            loop="recorded" in whole.attrs,
            closing={name: value for name, value in closing.items() if not math.isnan(value)},
        )
