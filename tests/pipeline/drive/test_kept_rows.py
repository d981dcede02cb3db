"""Runs that keep less of their rows: some parameters, a projection, fewer bits; from the plan to verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hydra_pipe.cli.main import main
from hydra_pipe.pipeline.compare.by_epoch import Course, by_epoch
from hydra_pipe.pipeline.decide.gradient_rows import rows_of
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.verify.deep import verify_deep
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import InputError, SpecError, SpecMismatch
from hydra_pipe.workers.model.row_map import RowMap
from hydra_pipe.workers.training.own_gradients import OwnGradients
from hydra_pipe.workers.training.training import Compute, Training

from hydra_pipe import Run, RunSpec, open_run, run
from tests.pipeline.decide.test_own_gradients import case
from tests.recipes import Small

LAYERS = ("0.weight", "2.bias")
CURVATURE = {"curvature_checkpoints": 1, "curvature_core": 8}
D = 53


class Clipped(Small):
    """Most steps are clipped: what that makes of a gradient depends on all of it."""

    clip_grad_norm = 0.3


class Adapted(Small):
    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=0.02)


def go(out: Path, recipe: Any, **given: Any) -> Run:
    return run(RunSpec(recipe=recipe, out=str(out), executor="serial", **{"dtype": "float64", **given}))


def stored(finished: Run, method: str) -> np.ndarray:
    store = finished.hypergradient_store(method)
    return store.read(0, store.rows)


def table(finished: Run, method: str) -> np.ndarray:
    found = finished.contributions(method).to_table().to_pandas()
    return found.pivot_table(index="train_index", columns="test_index", values="contribution").to_numpy()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """All rows as they are: fast, EKFAC and exact."""
    out = tmp_path_factory.mktemp("kept") / "whole"
    for hessian in ("none", "ekfac", "exact"):
        go(out, Small(), hessian=hessian, **CURVATURE)
    return open_run(str(out))


@pytest.fixture(scope="module")
def folded(tmp_path_factory) -> Run:
    """The same, projected and in bfloat16, in two shards."""
    out = tmp_path_factory.mktemp("kept") / "folded"
    for hessian in ("none", "ekfac", "exact"):
        go(out, Small(), hessian=hessian, **CURVATURE, project=26, store_dtype="bfloat16", shards=2)
    return open_run(str(out))


def kept_of(finished: Run, layers: Any = None, project: int | None = None) -> RowMap:
    found = RowMap.of(finished.trajectory().parameters, layers, project, Small.seed)
    assert found is not None
    return found


def close(found: np.ndarray, right: np.ndarray, limit: float) -> bool:
    return bool(np.abs(found - right).max() <= limit * np.abs(right).max())


@pytest.mark.parametrize("method", ["hydra", "hydra-ekfac", "hydra-exact"])
def test_projected_rows_are_the_projection_of_whole_ones(whole, folded, method):
    kept = kept_of(whole, None, 26)
    rows, found = kept.apply(stored(whole, method)), stored(folded, method)
    assert found.shape == (45, kept.columns)
    assert close(found, rows, 2.0**-8)
    tests = folded.test_gradients()
    gradients = tests.read(0, tests.rows)
    assert close(gradients, kept.apply(whole.test_gradients().read(0, tests.rows)), 1e-14)
    assert close(table(folded, method), -found @ gradients.T / 45, 1e-6)
    told = folded.hypergradient_store(method).attrs
    assert told["row_map"] == kept.told()
    assert told["store_dtype"] == "bfloat16"


def test_layers_are_those_columns_forward_and_adjoint(whole, tmp_path):
    some = go(tmp_path / "some", Small(), layers=LAYERS, shards=2)
    kept = kept_of(whole, LAYERS)
    assert close(stored(some, "hydra"), kept.apply(stored(whole, "hydra")), 1e-14)
    assert stored(some, "hydra").shape == (45, 33)
    found = verify(some)
    assert found.ok
    assert found.conservation["ok"]
    assert found.stores == ()  # nothing is lost of what is asked
    back = go(tmp_path / "back", Small(), layers=",".join(LAYERS), mode="adjoint")
    assert close(table(back, "hydra"), table(some, "hydra"), 1e-6)


@pytest.mark.parametrize("recipe", [Clipped, Adapted], ids=lambda kind: kind.__name__)
def test_clipping_and_preconditioners_are_those_of_whole_gradients(recipe, tmp_path):
    full = go(tmp_path / "full", recipe())
    some = go(tmp_path / "some", recipe(), layers=LAYERS, project=30, shards=2)
    kept = kept_of(full, LAYERS, 30)
    assert close(stored(some, "hydra"), kept.apply(stored(full, "hydra")), 1e-14)
    found = verify(some)
    assert found.ok
    assert found.conservation["ok"]


def test_rows_have_the_same_bits_for_any_number_of_shards(folded, tmp_path):
    other = go(tmp_path / "one", Small(), project=26, store_dtype="bfloat16", shards=1)
    np.testing.assert_array_equal(stored(other, "hydra"), stored(folded, "hydra"))
    np.testing.assert_array_equal(table(other, "hydra"), table(folded, "hydra"))


def test_verify_says_what_is_lost_and_holds_the_law_of_what_is_kept(folded):
    found = verify(folded)
    assert found.ok, found.problems
    assert found.conservation["applicable"]
    assert found.conservation["ok"]
    limit = max(group["limit"] for group in found.conservation["groups"])
    assert 1e-3 < limit < 0.5  # that of bfloat16, not of float64
    assert [loss.method for loss in found.stores] == ["hydra", "hydra-ekfac", "hydra-exact"]
    fast = found.stores[0]
    assert (fast.columns, fast.parameters, fast.dtype) == (22, D, "bfloat16")
    assert (fast.rows, fast.targets) == (45, 12)
    assert fast.spearman is not None
    assert 0.3 < fast.spearman < 0.999
    assert 0.01 < fast.error < 1


def test_the_sample_is_what_the_tables_of_both_runs_say(whole, folded):
    exact, lossy = table(whole, "hydra"), table(folded, "hydra")
    error = np.linalg.norm(lossy - exact) / np.linalg.norm(exact)
    assert verify(folded).stores[0].error == pytest.approx(error, rel=1e-5)
    assert verify(whole).stores == ()


def test_a_wrong_row_breaks_the_law_of_a_projected_store(tmp_path):
    made = go(tmp_path / "run", Small(), project=26, shards=1)
    store = made.hypergradient_store()
    rows = store.read(0, store.rows)
    rows[7] *= -1
    writable = type(store).open(store.uri, "hypergradient")
    writable.write(0, rows)
    manifest = made.directory.manifests("hydra/replay")
    for one in manifest:  # as if that had been computed so
        files = [entry.path for entry in one.files]
        made.directory.commit(one.stage, one.unit, files, dict(one.values))
    found = verify(open_run(made.uri))
    assert not found.conservation["ok"]
    assert any("the sum of all rows is off the recorded weights" in line for line in found.problems)


def test_verify_deep_computes_the_kept_rows_again(folded):
    found = verify_deep(folded, Small(), rows=2)
    assert found.ok, found.checks
    assert any("keeps projections of its targets" in note for note in found.notes)


def test_a_run_goes_on_as_it_began(folded):
    again = {"recipe": Small(), "out": folded.uri, "executor": "serial", "dtype": "float64"}
    for given, text in (
        ({"project": 30, "store_dtype": "bfloat16"}, "project: stored 26, asked 30"),
        ({"store_dtype": "bfloat16"}, "project: stored 26, asked nothing"),
        ({"project": 26}, "store_dtype: stored 'bfloat16', asked 'float64'"),
        ({"project": 26, "store_dtype": "bfloat16", "layers": "0"}, "layers: stored nothing, asked"),
    ):
        with pytest.raises(SpecMismatch, match=text):
            run(RunSpec(**again, **given))


def test_a_lost_shard_is_made_again_with_the_same_bits(folded, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(folded.uri, place)
    copy = open_run(str(place))
    copy.directory.drop("hydra/replay", "shard-00001")
    before = stored(folded, "hydra")
    again = go(place, Small(), project=26, store_dtype="bfloat16", shards=2)
    np.testing.assert_array_equal(stored(again, "hydra"), before)
    np.testing.assert_array_equal(table(again, "hydra"), table(folded, "hydra"))
    assert verify(again).ok


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"project": 10, "mode": "adjoint"},
            "project 10: mode='adjoint' stores no rows, so that it has no meaning",
        ),
        (
            {"store_dtype": "float16", "mode": "adjoint"},
            "store_dtype 'float16': mode='adjoint' stores no rows",
        ),
        (
            {"project": 10, "hessian": "ekfac", "exact_rank": 2},
            "project 10: exact_rank carries whole gradients",
        ),
        ({"store_dtype": "float8"}, "store_dtype 'float8': .*float32 or bfloat16 or float16"),
        ({"project": 0}, "project 0: must be a whole number, at least 1"),
        ({"layers": ""}, "layers '': must be patterns over names of parameters"),
        ({"layers": [3]}, r"layers \[3\]: must be patterns over names of parameters"),
    ],
)
def test_what_has_no_meaning_is_refused(given, text):
    with pytest.raises(SpecError, match=text):
        RunSpec(recipe=Small(), **given)


def test_a_layer_that_is_not_there_is_named_before_anything_is_done(tmp_path):
    with pytest.raises(SpecError, match=r"layers 'head': fits no parameter of the model; it has 0\.weight"):
        go(tmp_path / "run", Small(), layers="head")
    assert not (tmp_path / "run").exists()


def test_what_needs_whole_gradients_says_so(folded):
    with pytest.raises(InputError, match="was made with project 26, and attribute needs whole gradients"):
        attribute(folded.uri, {"gradient-dot": {}}, Small(), executor="serial")
    with pytest.raises(
        InputError, match="was made with project 26, and compare --every needs whole gradients"
    ):
        by_epoch(folded.uri, Course(every=1), Small(), executor="serial")


def test_detectors_take_the_rows_that_are_kept(whole, folded):
    exact, lossy = (case(one, Small(), rows="hypergradients", layer="all") for one in (whole, folded))
    assert rows_of(exact).dimensions == D
    with pytest.raises(
        InputError, match="keeps a part of its gradients, or a projection of it; use rows=gradients"
    ):
        rows_of(lossy)
    influence = [one.passes.self_influence("hydra")[1] for one in (exact, lossy)]
    assert np.corrcoef(*influence)[0, 1] > 0.5
    own = OwnGradients(Training(Small(), Compute(dtype="float64", device="cpu")), folded.trajectory())
    gradients = own.rows(np.arange(45)).gradient
    products = (kept_of(folded, None, 26).apply(gradients) * stored(folded, "hydra")).sum(1)
    np.testing.assert_allclose(influence[1], products, rtol=1e-10)


def test_the_command_line_says_it(tmp_path):
    out, runner = str(tmp_path / "run"), CliRunner()
    common = [
        "digits",
        "--set",
        "train_size=60",
        "--set",
        "test_size=20",
        "--epochs",
        "1",
        "--executor",
        "serial",
    ]
    kept = ["--project", "400", "--layers", "*.weight", "--store-dtype", "float16"]
    done = runner.invoke(main, ["plan", *common, *kept, "--format", "json"])
    assert done.exit_code == 0, done.output
    planned = json.loads(done.stdout)
    columns = planned["run"]["numbers a row"]
    assert columns <= 400
    assert planned["disk"]["hypergradients"] == 60 * columns * 2
    done = runner.invoke(main, ["run", *common, *kept, "--out", out, "-q"])
    assert done.exit_code == 0, done.output
    done = runner.invoke(main, ["verify", out])
    assert done.exit_code == 0, done.output
    assert "hypergradients as they are stored, against whole ones: 60 samples, 20 targets" in done.output
    done = runner.invoke(main, ["status", out])
    assert f"parameters *.weight, {columns} numbers, hydra as float16" in done.output
    done = runner.invoke(main, ["reduce", *common[:1], "--out", out, "--executor", "serial", "-q"])
    assert done.exit_code == 0, done.output
