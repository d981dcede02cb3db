"""The same bits whatever the executor, the number of shards and the number of workers."""

from __future__ import annotations

from typing import Any

import pytest
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec

from tests.end_to_end.support import assert_same_bits, numbers, serial
from tests.faults import FaultPlan, spoiled
from tests.recipes import BatchNormed, Images, Long, Small
from tests.workers.replay.test_optimisers import Stepped

TEST = "1:11"
TRACK = "20"


@pytest.fixture(scope="module")
def right(tmp_path_factory: Any) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("right") / "run"
    serial(out, Images(), shards=3, track=TRACK, test=TEST)
    return numbers(out, shard=False)


@pytest.mark.parametrize("shards", [1, 2, 8, 20])
def test_any_number_of_shards(shards, right, tmp_path):
    finished = serial(tmp_path / "run", Images(), shards=shards, track=TRACK, test=TEST)
    # Whole chunks are dealt, so that at most as many shards as asked come out.
    assert 1 <= finished.info["layout"]["shards"] <= shards
    assert (shards == 1) == (finished.info["layout"]["shards"] == 1)
    assert_same_bits(numbers(tmp_path / "run", shard=False), right)


@pytest.mark.parametrize("kind", [Small, Long, BatchNormed], ids=lambda k: k.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shards_change_no_bit_of_other_models(kind, dtype, tmp_path):
    found = []
    for shards in (1, 3):
        out = tmp_path / str(shards)
        serial(out, kind(), shards=shards, dtype=dtype)
        found.append(numbers(out, shard=False))
    assert_same_bits(found[1], found[0])


def test_a_run_repeated_has_the_same_bits(right, tmp_path):
    serial(tmp_path / "run", Images(), shards=3, track=TRACK, test=TEST)
    assert_same_bits(numbers(tmp_path / "run", shard=False), right)


def test_a_subset_of_samples_has_the_bits_it_has_among_all(right, tmp_path):
    chosen = [0, 7, 8, 12, 19]
    serial(tmp_path / "run", Images(), track=chosen, test=TEST, shards=2)
    found = numbers(tmp_path / "run")
    assert (found["hypergradients"] == right["hypergradients"][chosen]).all()
    assert (found["digest"] == right["digest"]).all()


def test_small_reduce_tiles_hardly_change_a_number_and_never_with_shards(right, tmp_path):
    """The same tiles give the same bits; a run keeps those that it began with (``test_reduce_memory``)."""
    found = []
    least = 8 * 4 * right["hypergradients"].shape[1]  # eight rows, below which it is refused
    for shards in (1, 5):
        out = tmp_path / str(shards)
        finished = serial(out, Images(), shards=shards, track=TRACK, test=TEST, reduce_memory=least)
        assert finished.info["stages"]["hydra/reduce"]["units"] > 1
        found.append(numbers(out, shard=False))
    assert_same_bits(found[0], found[1])
    assert found[0]["contributions.contribution"] == pytest.approx(
        right["contributions.contribution"], rel=1e-4, abs=1e-7
    )
    assert found[0]["samples.contribution"] == pytest.approx(
        right["samples.contribution"], rel=1e-4, abs=1e-7
    )


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "shards"), [(1, 3), (2, 8)])
def test_ray_and_this_process_agree(workers, shards, warm_ray, right, tmp_path):
    spec = RunSpec(
        recipe=Images(),
        out=str(tmp_path / "run"),
        executor="ray",
        address=warm_ray,
        workers=workers,
        shards=shards,
        track=TRACK,
        test=TEST,
        device="cpu",
    )
    finished = run(spec)
    # 20 rows in chunks of ceil(20 / (4 shards)) rows.
    assert finished.info["layout"]["shards"] == shards
    assert_same_bits(numbers(tmp_path / "run", shard=False), right)


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: Any) -> dict[str, Any]:
    """AdamW, clipped steps of three batches, parameters without a gradient in some: in one piece."""
    out = tmp_path_factory.mktemp("stepped") / "run"
    finished = serial(out, Stepped("adamw", 0.3, 3, "late"), shards=1)
    assert (finished.trajectory().clip_factor < 1).any()
    assert finished.trajectory().active is not None
    return numbers(out, shard=False)


def test_shards_change_no_bit_of_adamw_clipped_and_accumulated(stepped, tmp_path):
    finished = serial(tmp_path / "run", Stepped("adamw", 0.3, 3, "late"), shards=8)
    assert finished.info["layout"]["shards"] > 2
    assert_same_bits(numbers(tmp_path / "run", shard=False), stepped)


@pytest.mark.slow  # as of momentum in test_resume, and as of shards above
@pytest.mark.ray
def test_killed_workers_change_no_bit_of_adamw_clipped_and_accumulated(
    warm_ray, stepped, tmp_path, monkeypatch
):
    (tmp_path / "faults").mkdir()
    plan = FaultPlan(
        directory=str(tmp_path / "faults"),
        script={"trajectory": ["kill@5"], "shard-00000": ["kill@4"], "shard-00002": ["kill-after"]},
    )
    monkeypatch.setattr(RayExecutor, "run", spoiled(RayExecutor.run, plan))
    fields = {"executor": "ray", "address": warm_ray, "workers": 2, "shards": 3}
    serial(tmp_path / "run", Stepped("adamw", 0.3, 3, "late"), **fields)
    assert [plan.attempts(name) for name in plan.script] == [2, 2, 2]
    assert_same_bits(numbers(tmp_path / "run", shard=False), stepped)


@pytest.mark.parametrize("mode", ["forward", "adjoint"])
def test_shards_change_no_bit_of_exact_adamw(mode, tmp_path):
    found = []
    for shards in (1, 3):
        out = tmp_path / str(shards)
        recipe = Stepped("adamw", 0.3, 3, "late")
        finished = serial(out, recipe, hessian="exact", mode=mode, shards=shards)
        found.append(
            finished.contributions()
            .to_table()
            .sort_by([("test_index", "ascending"), ("train_index", "ascending")])
        )
    columns = ["train_index", "test_index", "contribution"]
    assert found[0].select(columns).equals(found[1].select(columns))
