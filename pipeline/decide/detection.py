"""Detections put into a run: one table and one manifest each, under the detection's name."""

from __future__ import annotations

from ...storage import layout
from ...storage.contributions import write_table
from ...storage.ledger import Reading
from ...storage.rundir import RunDirectory
from ...storage.schemas import DETECTION
from ...storage.typed import to_json
from ..reading.detections import Detection, detection_names, labels_digest, read_detection
from ..vocabulary import DETECT

__all__ = ["Detection", "detection_names", "labels_digest", "read_detection", "write_detection"]


def write_detection(directory: RunDirectory, detection: Detection, reading: Reading | None = None) -> None:
    """Put a detection into a run, in the place of one of the same name.

    Its manifest comes last: what a killed writer leaves is read by nobody.

    Args:
        directory: Of the run.
        detection: What is put there.
        reading: What was read of the run for it; None: nothing.
    """
    relative = layout.detection(detection.name)
    directory.drop(DETECT, detection.name)
    write_table(directory.path(relative), detection.table, DETECTION)
    directory.commit(DETECT, detection.name, [relative], to_json(detection.values), reading)
