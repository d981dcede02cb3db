"""What Prometheus may read of a run on Ray, through Ray's own exporter: counters of the driver, a tag ``stage`` on each.

Ray exports a counter ``hydra_pipe_steps`` as ``ray_hydra_pipe_steps_total``. ``deploy/grafana-dashboard.json`` shows them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

from .events import Event, Observer, UnitFinished, UnitProgress, UnitRetried, UnitStarted

STEPS, ROWS = "hydra_pipe_steps", "hydra_pipe_rows"
UNITS, RETRIES, DIGEST_CHECKS = "hydra_pipe_units", "hydra_pipe_retries", "hydra_pipe_digest_checks"

COUNTERS = {
    STEPS: "Training steps done or replayed.",
    ROWS: "Rows done: test samples, tracked samples or targets.",
    UNITS: "Units committed.",
    RETRIES: "Units queued again because their worker died.",
    DIGEST_CHECKS: "Digests of weights that replays compared with the record's.",
}
"""What is counted, by name."""

TAG = "stage"


class Counter(Protocol):
    """As ``ray.util.metrics.Counter``."""

    def inc(self, value: float = 1.0, tags: Any = None) -> object:
        """Add to the count of some tags (a dictionary); more than nothing."""
        ...


@functools.cache
def ray_counters() -> Mapping[str, Counter]:
    """Return the counters of this process, which is connected to Ray."""
    from ray.util import metrics

    return {name: metrics.Counter(name, what, tag_keys=(TAG,)) for name, what in COUNTERS.items()}


class Measured:
    """Counts the events of one stage, and passes them on to ``inner``.

    Args:
        inner: Who listens.
        counters: What is counted with, by name.
        label: What a count of progress is, ``step`` or ``row``.
    """

    def __init__(self, inner: Observer, counters: Mapping[str, Counter], label: str) -> None:
        self.inner, self._counters = inner, counters
        self._name = STEPS if label == "step" else ROWS
        self._done: dict[str, int] = {}
        self._totals: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, UnitStarted):
            self._done[event.unit] = 0
        elif isinstance(event, UnitProgress):
            self._totals[event.unit] = event.total
            self._moved(event.stage, event.unit, event.done)
        elif isinstance(event, UnitRetried):
            self._add(RETRIES, 1, event.stage)
        elif isinstance(event, UnitFinished):
            # Workers are asked now and then: the end is known from what they answer when they are done.
            own = event.values.get("steps" if self._name == STEPS else "rows")
            whole = self._totals.get(event.unit, own if isinstance(own, int) else 0)
            self._moved(event.stage, event.unit, whole)
            self._add(UNITS, 1, event.stage)
            self._add(DIGEST_CHECKS, event.values.get("digest_checks", 0), event.stage)
        self.inner(event)

    def _moved(self, stage: str, unit: str, done: int) -> None:
        self._add(self._name, done - self._done.get(unit, 0), stage)
        self._done[unit] = max(done, self._done.get(unit, 0))

    def _add(self, name: str, count: int, stage: str) -> None:
        if count > 0:
            self._counters[name].inc(count, {TAG: stage})
