"""The plan: arithmetic that must hold for sizes nobody can run here."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hydra_pipe.pipeline.executors.base import Capacity
from hydra_pipe.pipeline.plan import times
from hydra_pipe.pipeline.plan.plan import TILE_VALUES, cut, make_plan, reduce_tiles
from hydra_pipe.pipeline.plan.survey import survey
from hydra_pipe.storage.errors import DoesNotFit

from hydra_pipe import RunSpec
from tests.recipes import Images, Small

GIB = 1 << 30


def machines(slots: int, memory: int = 0) -> Capacity:
    return Capacity(executor="serial", nodes=1, cpus=slots, gpus=0, slots=slots, memory_per_worker=memory)


@pytest.mark.parametrize(
    ("n", "m", "parameters", "budget"),
    [
        (1_000_000, 10_000, 61_706, GIB),
        (1_000_000, 10_000, 2_236_682, GIB),
        (1_000_000, 100_000, 61_706, GIB),
        (1_000_000, 10_000, 5_000, GIB // 8),
        (50_000, 10_000, 176_122, 4 * GIB),
        (1_437, 360, 5_050, GIB),
        (3, 2, 10, 400),
    ],
)
def test_a_reduce_task_stays_within_its_budget(n, m, parameters, budget):
    row = 4 * parameters
    tiles = reduce_tiles(n, m, row, budget)
    held = min(2, -(-tiles.unit_rows // tiles.strip_rows)) * tiles.strip_rows * row
    held += min(2, -(-m // tiles.panel_rows)) * tiles.panel_rows * row
    assert held + tiles.unit_rows * m * 4 <= tiles.bytes <= budget
    assert tiles.unit_rows % tiles.strip_rows == 0 or tiles.unit_rows == n
    assert tiles.unit_rows * tiles.file_tests <= max(TILE_VALUES, tiles.unit_rows)


def test_tiles_do_not_follow_shards_or_workers():
    spec = RunSpec(recipe=Images(), executor="serial")
    surveyed = survey(spec, trial=False)
    plans = [
        cut(RunSpec(recipe=Images(), executor="serial", shards=s), surveyed, machines(slots))
        for s, slots in ((1, 1), (3, 2), (8, 16))
    ]
    assert len({p.reduce for p in plans}) == 1
    assert len({p.test_blocks for p in plans}) == 1
    assert [len(p.shards) for p in plans] == [1, 3, 8]


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 8, 45])
def test_shards_are_whole_chunks_and_cover_everything(shards):
    spec = RunSpec(recipe=Small(), executor="serial", shards=shards)
    plan = cut(spec, survey(spec, trial=False), machines(1))
    assert len(plan.shards) == shards
    assert plan.shards[0].start == 0
    assert plan.shards[-1].stop == 45
    for one, two in zip(plan.shards, plan.shards[1:], strict=False):
        assert one.stop == two.start
        assert one.stop % plan.chunk_rows == 0
    sizes = [-(-(s.stop - s.start) // plan.chunk_rows) for s in plan.shards]
    assert max(sizes) - min(sizes) <= 1


def only_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the replay alone decide: the other stages of so small a run need more than its shards."""
    monkeypatch.setattr("hydra_pipe.pipeline.plan.plan._check_memory", lambda *given, **more: None)


def test_what_does_not_fit_says_how_many_shards_would(monkeypatch):
    only_shards(monkeypatch)
    spec = RunSpec(recipe=Images(), executor="serial", shards=1, memory=1000 << 20)
    surveyed = survey(spec, trial=False)
    held = surveyed.row_numbers * 4
    process = spec.memory - 60 * held
    tight = replace(surveyed, process_bytes=process)
    with pytest.raises(DoesNotFit, match=r"1 shards need .* use --shards (\d+) or more") as caught:
        cut(spec, tight, machines(1))
    named = int(re.search(r"--shards (\d+)", str(caught.value))[1])
    plan = cut(replace(spec, shards=named), tight, machines(1))
    assert plan.memory.workers["replay"] <= spec.memory
    with pytest.raises(DoesNotFit, match="one tracked sample needs"):
        cut(spec, replace(surveyed, process_bytes=spec.memory), machines(1))


def test_auto_takes_a_shard_a_worker_or_more_where_memory_wants_more(monkeypatch):
    only_shards(monkeypatch)
    spec = RunSpec(recipe=Images(), executor="serial")
    surveyed = survey(spec, trial=False)
    assert len(cut(spec, surveyed, machines(4, 64 * GIB)).shards) == 4
    little = surveyed.process_bytes + 12 * surveyed.row_numbers * 4
    plan = cut(replace(spec, memory=little), surveyed, machines(1))
    assert len(plan.shards) > 2


@pytest.fixture(scope="module")
def wide():
    """A survey of a model of a million parameters, in a process of 500 MB."""
    surveyed = survey(RunSpec(recipe=Images(), executor="serial"), trial=False)
    return replace(surveyed, dimension=10**6, process_bytes=500 << 20)


def test_memory_holds_for_every_worker_and_the_process_itself(wide):
    spec = RunSpec(recipe=Images(), executor="serial", shards=45)
    free = cut(spec, wide, machines(1))
    assert free.reduce_memory == 1 << 30
    assert free.memory.largest == free.memory.workers["reduce"]
    # Tiles are cut smaller, by halves, until they fit.
    allowed = free.memory.largest - (50 << 20)
    less = cut(replace(spec, memory=allowed), wide, machines(1))
    assert less.memory.largest <= allowed
    assert less.reduce_memory in [1 << k for k in range(22, 30)]
    # What the run began with stays, and is refused where it does not fit.
    with pytest.raises(
        DoesNotFit, match=r"the reduce worker needs [\d,]+ bytes \(524,288,000 of them"
    ) as caught:
        cut(replace(spec, memory=allowed), wide, machines(1), shards=45, reduce_memory=1 << 30)
    for says in (f"--memory allows {allowed:,} bytes", "smaller --reduce-memory", "in a run of its own"):
        assert says in str(caught.value)
    # 900 MiB were allowed and 1.3 GiB used: now this is said before.
    with pytest.raises(DoesNotFit, match=r"the record worker needs|the [a-z-]+ worker needs"):
        cut(replace(spec, memory=(500 << 20) + 4096), replace(wide, row_numbers=1), machines(1), shards=45)


def raylets() -> str:
    """Ray's processes below this one; other tests of the session may have a cluster."""
    done = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "raylet"], capture_output=True, text=True, check=False
    )
    return done.stdout


def test_plan_starts_nothing():
    before = raylets()
    plan = make_plan(RunSpec(recipe=Small(), executor="ray")).as_dict()
    assert set(plan) == {"run", "shards", "memory", "disk", "time"}
    assert plan["run"]["parameters"] == 53
    assert raylets() == before


def test_the_time_of_a_plan_counts_every_stage():
    spec = RunSpec(recipe=Images(), executor="serial", mode="adjoint", hessian="exact")
    surveyed = replace(survey(spec, trial=False), step_seconds=(1.0, 2.0))
    seconds = cut(spec, surveyed, machines(1), shards=1).seconds
    tests = len(surveyed.tested)
    back = times.FIRST_PRODUCT + times.PRODUCT * tests
    assert seconds["replay"] == times.START + times.LOOP * surveyed.steps * (1 + back)
    kept = cut(replace(spec, checkpoint_every=1), surveyed, machines(1), shards=1).seconds
    assert kept["replay"] == times.START + times.LOOP * surveyed.steps * back  # no step is taken again
    assert ("preflight" in seconds) == (tests >= times.ENOUGH)
    many = replace(surveyed, tested=np.resize(surveyed.tested, times.ENOUGH))
    assert (
        cut(spec, many, machines(1), shards=1).seconds["preflight"]
        == times.PREFLIGHT_TRAININGS * surveyed.steps
    )
    fast = cut(replace(spec, hessian="none"), surveyed, machines(1), shards=1).seconds
    bent = replace(spec, hessian="ekfac", exact_rank=2, curvature_samples=1)
    corrected = cut(bent, surveyed, machines(1), shards=1).seconds
    assert set(corrected) - set(fast) == {"curvature", "correction"}
    assert corrected["correction"] == 2 * surveyed.steps * (2 + times.PRODUCT)
    chosen = survey(bent, trial=False)
    assert chosen.activation_bytes > 0
    exact = cut(replace(spec, test=2), replace(chosen, tested=chosen.tested[:2]), machines(1), shards=1)
    of_two = cut(bent, chosen, machines(1), shards=1).memory.workers["correction"]
    assert of_two == exact.memory.workers["replay"]
    for found in (seconds, fast, corrected):
        assert found["total"] == pytest.approx(sum(v for k, v in found.items() if k != "total"))
