"""Opening a run: what a Run gives, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.storage.errors import CorruptStore, IncompleteStage, InputError, RunNotFound, SpecError

from tests.builders import NOISY, Built, D, M, N


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("runs") / "digits").build()


def test_a_run_gives_everything_it_holds(built: Built) -> None:
    run = open_run(built.uri)
    assert (run.uri, run.recipe, run.methods(), run.method()) == (built.uri, "digits", ["hydra"], "hydra")
    assert "digits" in repr(run)
    assert np.array_equal(run.hypergradients()[:], built.hypergradients)
    assert np.array_equal(run.hypergradient_store().column("train_index"), built.tracked)
    assert np.array_equal(run.test_gradients().read(0, M), built.test_gradients)
    assert np.array_equal(run.trajectory().batches, built.batches)
    noisy = run.noisy()
    assert noisy is not None
    assert [part.tolist() for part in noisy] == [part.tolist() for part in NOISY]


def test_contributions_are_a_dataset_of_every_pair(built: Built) -> None:
    dataset = open_run(built.uri).contributions()
    table = dataset.to_table().sort_by([("train_index", "ascending"), ("test_index", "ascending")])
    assert len(table) == N * M
    assert np.array_equal(table["contribution"].to_numpy().reshape(N, M), built.contributions)
    assert table["test_index"].to_pylist()[:M] == built.tested.tolist()
    assert set(table["method"].to_pylist()) == {"hydra"}


def test_samples_and_interclass_are_sorted(built: Built) -> None:
    run = open_run(built.uri)
    samples = run.samples()
    assert samples["train_index"].to_pylist() == list(range(N))
    assert np.array_equal(samples["contribution"].to_numpy(), built.exact.mean(1))
    assert samples.column_names == [
        "train_index",
        "label",
        "visits",
        "contribution",
        "contribution_std",
        "shard",
    ]
    classes = run.interclass()
    assert classes["train_class"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert classes["test_class"].to_pylist() == [0, 1, 2] * 3
    assert "method" not in classes.column_names


def test_a_missing_run_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunNotFound, match=r"nothing.*hydra-pipe run --out"):
        open_run(tmp_path / "nothing")


def test_a_strange_address_is_refused() -> None:
    with pytest.raises(SpecError, match="ftp"):
        open_run("ftp://host/run")


def test_a_damaged_run_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CorruptStore, match=r"run\.json"):
        open_run(tmp_path)


def test_parts_of_an_unfinished_run_are_refused_one_by_one(tmp_path: Path) -> None:
    built = Built(tmp_path / "r").build(upto="record")
    run = open_run(built.uri)
    assert run.methods() == []
    assert run.trajectory().checkpoint(0).weights.shape == (D,)
    for part in (run.hypergradients, run.test_gradients, run.contributions, run.samples, run.interclass):
        with pytest.raises(IncompleteStage, match=r"missing .*hydra-pipe status"):
            part()
    with pytest.raises(IncompleteStage):
        run.top()


def test_a_half_done_replay_is_refused(tmp_path: Path) -> None:
    built = Built(tmp_path / "r").build(upto="replay")
    built.directory.drop("hydra/replay", "shard-00001")
    with pytest.raises(IncompleteStage, match="hydra/replay is partial \\(1 of 2 units"):
        open_run(built.uri).hypergradients()
    built.build(upto="replay").directory.drop("hydra/replay", "index")
    with pytest.raises(IncompleteStage, match="partial"):
        open_run(built.uri).hypergradients()


def test_test_gradients_without_their_columns_are_refused(tmp_path: Path) -> None:
    built = Built(tmp_path / "r").build(upto="test-gradients")
    built.directory.drop("test-gradients", "index")
    with pytest.raises(IncompleteStage, match="test-gradients is partial"):
        open_run(built.uri).test_gradients()


def test_a_reduce_without_its_last_unit_is_refused(tmp_path: Path) -> None:
    built = Built(tmp_path / "r").build()
    built.directory.drop("hydra/reduce", "interclass")
    run = open_run(built.uri)
    assert run.methods() == []
    with pytest.raises(IncompleteStage, match="hydra/reduce is partial"):
        run.contributions()


def test_the_default_method_is_hydra_or_the_only_one(tmp_path: Path) -> None:
    only = Built(tmp_path / "a", method="hydra-ekfac").build()
    assert open_run(only.uri).method() == "hydra-ekfac"
    first = Built(tmp_path / "b", method="a-method").build()
    second = Built(tmp_path / "b")
    second.info["methods"] = first.info["methods"] | second.info["methods"]
    second.info["stages"] = first.info["stages"]
    second._replay()
    second._reduce()
    second.directory.update(lambda _: second.info)
    run = open_run(second.uri)
    assert run.methods() == ["hydra", "a-method"]
    assert run.method() == "hydra"
    assert len(run.contributions("a-method").to_table()) == N * M
    assert set(run.contributions().to_table()["method"].to_pylist()) == {"hydra"}
    with pytest.raises(InputError, match=r"no method 'tracin'; it has hydra, a-method"):
        run.samples("tracin")
