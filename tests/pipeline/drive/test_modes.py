"""The four ways to the contributions: forward or adjoint, Hessian dropped or kept."""

from __future__ import annotations

import numpy as np
import pytest
from hydra_pipe.storage.errors import IncompleteStage, SpecMismatch

from hydra_pipe import RunSpec, run
from tests import oracle
from tests.recipes import BatchNormed, Images, Small


def spec(recipe, out, **changes):
    values = {"executor": "serial", "dtype": "float64", "track": "10", "test": "5", "shards": 2, **changes}
    return RunSpec(recipe=recipe, out=str(out), **values)


def matrix(finished, method):
    table = finished.contributions(method).to_table().to_pandas()
    return table.pivot_table(index="train_index", columns="test_index", values="contribution").to_numpy()


@pytest.mark.parametrize("kind", [Images, BatchNormed], ids=lambda k: k.__name__)
def test_all_ways_agree_with_the_oracle(kind, tmp_path):
    recipe = kind()
    both = run(spec(kind(), tmp_path / "forward"))
    both = run(spec(kind(), tmp_path / "forward", hessian="exact"))
    back = run(spec(kind(), tmp_path / "adjoint", mode="adjoint"))
    back = run(spec(kind(), tmp_path / "adjoint", mode="adjoint", hessian="exact"))
    assert both.methods() == back.methods() == ["hydra", "hydra-exact"]
    n_train = len(recipe.train_dataset())
    trajectory = both.trajectory()
    dense = oracle.dense(recipe, trajectory, range(10))
    gradients = oracle.test_gradients(recipe, dense.model, range(5))
    fast = oracle.contributions(dense.hypergradient, gradients, n_train)
    exact = -oracle.unrolled(recipe, trajectory, range(10)).along(gradients).T / n_train
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
    with pytest.raises(SpecMismatch, match="mode: stored 'forward', asked 'adjoint'"):
        run(spec(Small(), tmp_path / "a", mode="adjoint"))
    with pytest.raises(SpecMismatch, match=r"shards: stored 2, asked 5 \(method hydra\)"):
        run(spec(Small(), tmp_path / "a", shards=5))
    run(spec(Small(), tmp_path / "a", shards="auto"))
    replaced = run(spec(Small(), tmp_path / "a", shards=5, overwrite=True))
    assert replaced.info["methods"]["hydra"]["shards"] == 5


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    out = tmp_path_factory.mktemp("exact") / "run"
    return matrix(run(spec(Images(), out, mode="adjoint", hessian="exact")), "hydra-exact")


@pytest.mark.parametrize("mode", ["forward", "adjoint"])
def test_exact_rank_is_a_dial_from_ekfac_to_exact(mode, exact, tmp_path):
    for rank in (2, 5):
        done = run(spec(Images(), tmp_path / "dial", mode=mode, hessian="ekfac", exact_rank=rank))
    assert done.methods() == ["hydra-ekfac", "hydra-ekfac-rank2", "hydra-ekfac-rank5"]
    errors = [np.linalg.norm(matrix(done, m) - exact) / np.linalg.norm(exact) for m in done.methods()]
    assert errors[0] > 0.05
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 1e-6  # five directions span five targets


def test_ekfac_resumes_and_refuses_other_options(tmp_path):
    first = run(spec(Small(), tmp_path / "a", hessian="ekfac"))
    done = matrix(first, "hydra-ekfac")
    (tmp_path / "a" / "manifests" / "hydra-ekfac" / "replay" / "shard-00001.json").unlink()
    again = run(spec(Small(), tmp_path / "a", hessian="ekfac"))
    assert np.array_equal(matrix(again, "hydra-ekfac"), done)
    with pytest.raises(SpecMismatch, match="checkpoints"):
        run(spec(Small(), tmp_path / "a", hessian="ekfac", curvature_checkpoints=2))
    with pytest.raises(SpecMismatch, match="'at': \\[0\\]"):
        run(spec(Small(), tmp_path / "a", hessian="ekfac", curvature_at="0"))
    other = run(spec(Small(), tmp_path / "b", hessian="ekfac", curvature_at="0"))
    assert not np.allclose(matrix(other, "hydra-ekfac"), done)
    again = run(spec(Small(), tmp_path / "b", hessian="ekfac", curvature_at="0"))
    assert np.array_equal(matrix(again, "hydra-ekfac"), matrix(other, "hydra-ekfac"))


def test_forward_and_adjoint_agree_with_ekfac(tmp_path):
    forward = run(spec(Small(), tmp_path / "f", hessian="ekfac"))
    back = run(spec(Small(), tmp_path / "b", hessian="ekfac", mode="adjoint"))
    one, two = (matrix(found, "hydra-ekfac") for found in (forward, back))
    assert np.abs(one - two).max() < 1e-6 * np.abs(one).max()
