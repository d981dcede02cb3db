"""Which detection of a run is meant where none is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..reading.detections import Detection, detection_names, read_detection
from .detect import DEFAULTS
from .scorers import SCORERS

if TYPE_CHECKING:
    from ..reading.reader import Reader


def chosen_detection(run: Reader, name: str | None = None) -> Detection | None:
    """Return the detection of that name; None: the run's best that needs no choice, see ``decide.detect``.

    Raises:
        IncompleteStage: The run has none of that name.
    """
    if name is not None:
        return read_detection(run, name)
    order = {by: at for at, by in enumerate(dict.fromkeys([*DEFAULTS, *SCORERS]))}
    found = [read_detection(run, one) for one in detection_names(run)]
    return min(found, key=lambda one: (order.get(one.values.by, len(order)), one.name), default=None)
