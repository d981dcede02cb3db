"""Detections that a run holds: ranked suspicions, and how they were made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...storage import layout
from ...storage.errors import IncompleteStage
from ...storage.tables import read_table
from ..vocabulary import DETECT
from .stage_states import refuse_outdated
from .unit_values import DetectionValues, values_of

if TYPE_CHECKING:
    from .reader import Reader


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Detection:
    """Samples ranked by suspicion, as stored.

    Attributes:
        name: Of the detection: what it was made by, and what tells it from others.
        table: One row a judged sample, most suspicious first; see ``storage.schemas.DETECTION``.
        values: How it was made, and how good it is where that is known.
    """

    name: str
    table: pa.Table
    values: DetectionValues


def labels_digest(labels: npt.ArrayLike) -> str:
    """Return the sha256 of labels, taken as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()


def detection_names(run: Reader) -> list[str]:
    """Return the names of the detections that a run holds, ascending."""
    return run.directory.units(DETECT)


def read_detection(run: Reader, name: str) -> Detection:
    """Return a stored detection.

    Raises:
        IncompleteStage: The run has none of that name.
    """
    there = detection_names(run)
    manifest = run.directory.manifest(DETECT, name) if name in there else None
    if manifest is None:
        raise IncompleteStage(
            f"{run.uri} has no detection {name!r}; it has {', '.join(there) or 'none'}; make one with "
            f"`hydra-pipe detect {run.uri} --by ...`"
        )
    directory = run.directory
    table = read_table(directory.path(layout.detection(name)), source=directory.vouched)
    refuse_outdated(directory, [manifest])
    return Detection(name=name, table=table, values=values_of(DetectionValues, manifest))
