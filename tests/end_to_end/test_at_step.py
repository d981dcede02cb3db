"""``--at STEP``: contributions as of a recorded moment, from the same record."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import ReplayDiverged, RunNotFound, SpecError, SpecMismatch

from tests import oracle
from tests.end_to_end.support import Heard, cli
from tests.recipes import OneCycle, Small
from tests.workers.training.test_initial import Adaptive, adam_by_hand

RECIPE = "tests.recipes:OneCycle"
SERIAL = ("--executor", "serial", "--device", "cpu", "--dtype", "float64", "--quiet")
FIELDS = {"executor": "serial", "device": "cpu", "dtype": "float64", "checkpoint_every": 5, "shards": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A record with checkpoints at 0, 5, 10, 15 and 18 of 18 steps (6 an epoch), and its run as of step 10."""
    out = tmp_path_factory.mktemp("at") / "run"
    run(RunSpec(recipe=OneCycle(), out=str(out), **FIELDS), stages=("record",))
    found = cli("run", RECIPE, "--out", out, "--at", 10, "--checkpoint-every", 5, "--shards", 2, *SERIAL)
    assert found.exit_code == 0, found.output
    return out


def table(opened, method=None):
    found = opened.contributions(method).to_table()
    found = found.sort_by([("train_index", "ascending"), ("test_index", "ascending")])
    return found["contribution"].to_numpy().reshape(45, -1)


def test_contributions_are_those_of_a_training_that_ended_there(place):
    whole, opened = open_run(str(place)).trajectory(), open_run(f"{place}-at-10")
    ended = opened.trajectory()
    assert ended.checkpoint_steps.tolist() == [0, 5, 10]
    assert np.array_equal(ended.checkpoint(-1).weights, whole.checkpoint(2).weights)
    assert np.array_equal(ended.batches, whole.batches[:10])
    tracked = np.arange(45)
    right = oracle.dense(OneCycle(), ended, tracked)
    assert np.allclose(right.weights, ended.checkpoint(-1).weights, rtol=1e-12, atol=1e-13)
    assert oracle.relative_error(opened.hypergradients()[:], right.hypergradient) < oracle.DENSE_FLOAT64
    gradients = oracle.test_gradients(OneCycle(), right.model, range(12))
    contributions = oracle.contributions(right.hypergradient, gradients, 45)
    assert np.abs(table(opened) - contributions).max() <= 1e-6 * np.abs(contributions).max()
    checked = verify(opened)
    assert checked.ok, checked.problems
    assert checked.conservation["ok"]


def test_the_exact_form_as_of_the_end_of_an_epoch(tmp_path):
    fields = {**FIELDS, "checkpoint_every": 6, "out": str(tmp_path / "run"), "recipe": OneCycle()}
    run(RunSpec(**fields), stages=("record",))
    opened = run(RunSpec(**fields, at=12, mode="adjoint", hessian="exact", test="3"))
    ended = opened.trajectory()
    assert ended.attrs["epochs"] == 2
    right = oracle.unrolled(OneCycle(), ended, range(45))
    store = opened.test_gradients()
    along = right.along(store.read(0, store.rows))
    assert np.abs(-table(opened).T * 45 - along).max() <= 1e-6 * np.abs(along).max()


def test_other_estimators_and_the_same_command_go_on_with_it(place):
    heard = Heard()
    run(RunSpec(recipe=OneCycle(), out=str(place), at=10, **FIELDS), observer=heard)
    assert heard.done == []
    opened = attribute(f"{place}-at-10", {"gradient-dot": {}}, OneCycle())
    assert set(opened.methods()) == {"hydra", "gradient-dot"}
    assert open_run(str(place)).methods() == []


def test_moments_that_were_not_recorded_are_refused_with_the_nearest(place, tmp_path):
    for at, near in ((12, "10, 15"), (17, "15, 18"), (99, "15, 18")):
        found = cli("run", RECIPE, "--out", place, "--at", at, "--checkpoint-every", 5, *SERIAL)
        assert (found.exit_code, found.output.count("\n")) == (1, 1), found.output
        assert f"has no checkpoint at this step; the nearest: {near}" in found.output
    with pytest.raises(RunNotFound, match=r"no recorded run at .*whose checkpoint at step 5 is asked for"):
        run(RunSpec(recipe=OneCycle(), out=str(tmp_path / "none"), at=5, **FIELDS))
    with pytest.raises(SpecMismatch, match="seed: stored null, asked 4"):
        run(RunSpec(recipe=OneCycle(), out=str(place), at=10, seed=4, **FIELDS))
    with pytest.raises(SpecMismatch, match="another specification"):
        run(RunSpec(recipe=Small(), out=str(place), at=5, **FIELDS))
    with pytest.raises(SpecError, match="at 5: one training has this checkpoint, not 2"):
        RunSpec(at=5, seeds=2)


def test_a_record_made_again_makes_what_was_computed_of_it_void(tmp_path):
    """As on another machine, where the same recipe comes to other weights; here the record of another seed."""
    fields = {**FIELDS, "out": str(tmp_path / "run"), "track": "4", "test": "2", "recipe": OneCycle()}
    run(RunSpec(**fields), stages=("record",))
    run(RunSpec(**fields, at=5))
    other = {**fields, "out": str(tmp_path / "other"), "seed": 8}
    run(RunSpec(**other), stages=("record",))
    for part in ("trajectory.zarr", "manifests/record"):
        shutil.rmtree(tmp_path / "run" / part)
        shutil.copytree(tmp_path / "other" / part, tmp_path / "run" / part)
    notes = []
    with pytest.raises(ReplayDiverged):  # since it is the record of another seed
        run(RunSpec(**fields, at=5), observer=lambda event: notes.append(getattr(event, "message", "")))
    assert any("the record was made again since" in note for note in notes)


def test_attribute_makes_the_run_as_of_a_step(place):
    words = ("attribute", place, RECIPE, "--method", "gradient-dot", "--executor", "serial", "--quiet")
    found = cli(*words, "--at", 15)
    assert found.exit_code == 0, found.output
    opened = open_run(f"{place}-at-15")
    assert opened.methods() == ["gradient-dot"]
    found = cli(*words, "--at", 16)
    assert (found.exit_code, found.output.count("\n")) == (1, 1)
    assert "at 16: " in found.output
    assert cli(*words, "--at", 15, "--seeds", 2).exit_code == 2


def test_moments_and_counts_of_adam_are_cut_off_too(tmp_path):
    fields = {**FIELDS, "out": str(tmp_path / "run"), "recipe": Adaptive(), "test": "2"}
    run(RunSpec(**fields), stages=("record",))
    opened = run(RunSpec(**fields, at=10, mode="adjoint", hessian="exact"))
    ended = opened.trajectory()
    assert ended.checkpoint(-1).count.tolist() == [10] * 4
    none = {
        k: {"exp_avg": torch.zeros(e.shape), "exp_avg_sq": torch.zeros(e.shape), "step": 0}
        for k, e in enumerate(ended.parameters)
    }
    end, eps = adam_by_hand(Adaptive(), ended, {"state": none}, range(45))
    assert np.allclose(end.detach().numpy(), ended.checkpoint(-1).weights, rtol=1e-12, atol=1e-13)
    store = opened.test_gradients()
    for j, gradient in enumerate(store.read(0, store.rows)):
        right = torch.autograd.grad(end, eps, torch.from_numpy(gradient), retain_graph=True)[0].numpy()
        assert np.abs(-table(opened)[:, j] * 45 - right).max() <= 1e-6 * np.abs(right).max()
