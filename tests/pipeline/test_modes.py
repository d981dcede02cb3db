"""The four ways to the contributions: forward or adjoint, Hessian dropped or kept."""

from __future__ import annotations

import numpy as np
import pytest
from hydra_pipe import RunSpec, run
from hydra_pipe.storage.errors import IncompleteStage, SpecError, SpecMismatch

from tests import oracle
from tests.recipes import BatchNormed, Images, Small


def spec(recipe, out, **changes):
    values = {"executor": "serial", "dtype": "float64", "track": "20", "test": "9", "shards": 2, **changes}
    return RunSpec(recipe=recipe, out=str(out), **values)


def matrix(finished, method):
    table = finished.contributions(method).to_table().to_pandas()
    return table.pivot_table(index="train_index", columns="test_index", values="contribution").to_numpy()


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed], ids=lambda k: k.__name__)
def test_all_ways_agree_with_the_oracle(kind, tmp_path):
    recipe = kind()
    both = run(spec(kind(), tmp_path / "forward"))
    both = run(spec(kind(), tmp_path / "forward", hessian="exact"))
    back = run(spec(kind(), tmp_path / "adjoint", mode="adjoint"))
    back = run(spec(kind(), tmp_path / "adjoint", mode="adjoint", hessian="exact"))
    assert both.methods() == back.methods() == ["hydra", "hydra-exact"]
    n_train = len(recipe.train_dataset())
    trajectory = both.trajectory()
    dense = oracle.dense(recipe, trajectory, range(20))
    gradients = oracle.test_gradients(recipe, dense.model, range(9))
    fast = oracle.contributions(dense.hypergradient, gradients, n_train)
    exact = -oracle.unrolled(recipe, trajectory, range(20)).along(gradients).T / n_train
    for found in (both, back):
        assert np.abs(matrix(found, "hydra") - fast).max() < 1e-6 * np.abs(fast).max()
        assert np.abs(matrix(found, "hydra-exact") - exact).max() < 1e-6 * np.abs(exact).max()
        mean = found.samples("hydra-exact").column("contribution").to_numpy()
        assert np.abs(mean - exact.mean(1)).max() < oracle.EXACT_FLOAT64 * np.abs(exact).max()
    assert set(both.samples("hydra").column("shard").to_pylist()) == {0, 1}
    assert set(back.samples("hydra").column("shard").to_pylist()) == {-1}


def test_adjoint_gives_the_same_bits_for_any_number_of_shards(tmp_path):
    found = []
    for shards in (1, 3):
        for hessian in ("none", "exact"):
            done = run(
                spec(
                    Small(),
                    tmp_path / f"{shards}",
                    mode="adjoint",
                    hessian=hessian,
                    shards=shards,
                    test="all",
                    track="all",
                    dtype="float32",
                )
            )
        found.append([done.contributions(m).to_table().to_pandas() for m in done.methods()])
    for one, three in zip(*found, strict=True):
        assert one.equals(three)


def test_adjoint_stores_no_hypergradients(tmp_path):
    done = run(spec(Small(), tmp_path / "a", mode="adjoint"))
    assert not (tmp_path / "a" / "hypergradients").exists()
    with pytest.raises(IncompleteStage):
        done.hypergradients()


def test_one_method_has_one_mode(tmp_path):
    run(spec(Small(), tmp_path / "a"))
    with pytest.raises(SpecMismatch, match="made in forward mode, asked adjoint"):
        run(spec(Small(), tmp_path / "a", mode="adjoint"))


def test_what_is_not_there_yet_is_refused_by_name(tmp_path):
    with pytest.raises(SpecError, match="ekfac"):
        run(spec(Small(), tmp_path / "a", hessian="ekfac"))
    assert not (tmp_path / "a").exists()
