"""What Prometheus reads: counted from events, and exported by Ray."""

from __future__ import annotations

import time
import urllib.request
from collections import Counter
from typing import Any

import pytest
from hydra_pipe.pipeline.executors import ray_metrics
from hydra_pipe.pipeline.executors.events import (
    Event,
    Note,
    UnitFinished,
    UnitProgress,
    UnitRetried,
    UnitStarted,
    listener,
    null,
)
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.pipeline.executors.ray_metrics import COUNTERS, Measured

from tests.faults import Count, units


class Counts:
    """In the place of Ray's counters."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()

    def __getitem__(self, name: str) -> Any:
        counts = self

        class One:
            def inc(self, value: float = 1.0, tags: Any = None) -> None:
                assert value > 0, "Ray refuses that"
                counts.found[name, tags["stage"]] += int(value)

        return One()


def told(label: str, *events: Event) -> dict[tuple[str, str], int]:
    counts = Counts()
    heard: list[Event] = []
    measured = Measured(heard.append, counts, label)  # type: ignore[arg-type]
    for event in events:
        measured(event)
    assert heard == list(events)
    return dict(counts.found)


def test_steps_are_counted_as_they_are_done_and_again_when_done_again():
    stage = {"stage": "hydra/replay", "unit": "shard-0"}
    found = told(
        "step",
        Note(message="hello"),
        UnitStarted(**stage),
        UnitProgress(**stage, done=3, total=10),
        UnitProgress(**stage, done=7, total=10),
        UnitRetried(**stage, attempt=2, reason="killed"),
        UnitStarted(**stage, attempt=2),
        UnitProgress(**stage, done=4, total=10),
        UnitFinished(**stage, seconds=1.0, values={"steps": 10, "digest_checks": 5}),
    )
    assert found == {
        ("hydra_pipe_steps", "hydra/replay"): 17,
        ("hydra_pipe_retries", "hydra/replay"): 1,
        ("hydra_pipe_units", "hydra/replay"): 1,
        ("hydra_pipe_digest_checks", "hydra/replay"): 5,
    }


def test_rows_of_a_unit_that_was_never_asked_are_those_it_answers():
    stage = {"stage": "hydra/reduce", "unit": "rows-0"}
    found = told("row", UnitStarted(**stage), UnitFinished(**stage, seconds=1.0, values={"rows": 12}))
    assert found == {("hydra_pipe_rows", "hydra/reduce"): 12, ("hydra_pipe_units", "hydra/reduce"): 1}


def test_who_listens_is_known_behind_it():
    assert listener(Measured(Measured(null, {}, "row"), {}, "row")) is null


@pytest.mark.ray
def test_ray_exports_them(ray_cluster, tmp_path, monkeypatch):
    """Scraped as Prometheus does, from the port that Ray names for this node."""
    import ray

    ray_metrics.ray_counters.cache_clear()
    executor = RayExecutor(ray_cluster, workers=1)
    executor.run("metrics-test", units(2), Count(directory=str(tmp_path), pause=0.5), null, label="step")
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, counted = time.monotonic() + 60, dict[str, float]()
    wanted = {"ray_hydra_pipe_units_total": 2.0, "ray_hydra_pipe_steps_total": 8.0}
    # Ray exports every few seconds: an earlier look may see the first unit alone.
    while not wanted.items() <= counted.items() and time.monotonic() < deadline:
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        lines = [line for line in text.splitlines() if 'stage="metrics-test"' in line]
        counted = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
        time.sleep(1)
    assert wanted.items() <= counted.items(), counted
    assert {f"ray_{name}_total" for name in COUNTERS} >= set(counted)
    executor.close()
