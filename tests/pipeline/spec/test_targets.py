"""Targets of adjoint mode: classes and the mean are the means of the test samples, in every reader."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hydra_pipe.pipeline.evaluate.evaluate import Questions, evaluate
from hydra_pipe.pipeline.evaluate.trials import subsets
from hydra_pipe.pipeline.executors.events import Note
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.pipeline.plan.plan import make_plan
from hydra_pipe.pipeline.reading.panels import panels, targets
from hydra_pipe.pipeline.spec.targets import coarsened, target_of_each, target_set
from hydra_pipe.pipeline.units.retrain import read_part, unchanged
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.pipeline.vocabulary import KINDS
from hydra_pipe.storage.errors import InputError, SpecError, SpecMismatch
from hydra_pipe.storage.rows import RowStore
from hydra_pipe.workers.hessian import tiles
from hydra_pipe.workers.replay.targets import mean_gradients
from scipy.stats import spearmanr

from hydra_pipe import RunSpec, open_run, run
from tests import oracle
from tests.conftest import ROOT
from tests.end_to_end.support import Heard, cli
from tests.faults import FaultPlan, spoiled
from tests.forging import vouch
from tests.recipes import BatchNormed, Images, Small

FORMS = {"none": "hydra", "ekfac": "hydra-ekfac", "exact": "hydra-exact"}
TIGHT = 1e-12
"""Of float64 means, relative to the largest contribution."""


@pytest.fixture(autouse=True, scope="module")
def narrow():
    """Tiles of 8, so that the few targets here are several units: 64 go together on models as small as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "NEAR_BYTES", 0)
        yield


class Many(Small):
    """Twenty classes, so that they are several chunks of exact targets; 33 test samples of 17 of them."""

    classes = 20

    def model(self):
        import torch

        return torch.nn.Sequential(torch.nn.Linear(6, 20))

    def test_dataset(self):
        from tests.recipes import gaussian

        return gaussian(33, self.shape, self.classes, 2)


class Unlabelled(Small):
    def labels(self, dataset):
        return None


def go(recipe, out, heard=None, **changes):
    values = {"executor": "serial", "device": "cpu", "dtype": "float64", "track": "20", "mode": "adjoint"}
    return run(RunSpec(recipe=recipe, out=str(out), **{**values, **changes}), observer=heard)


def by_test(found, method):
    """Return the stored contributions in the run's own precision, (n, K)."""
    store = RowStore.open(found.directory.path("by_test", f"method={method}.zarr"), "contribution")
    return store.read(0, store.rows).T


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """All forms and targets of ``Small`` in one run directory."""
    out = tmp_path_factory.mktemp("targets") / "run"
    for hessian in FORMS:
        for kind in KINDS:
            found = go(Small(), out, hessian=hessian, targets=kind)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """``Many`` to classes in three shards, as the runs below that are killed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return go(Many(), out, hessian="exact", targets="classes", shards=3)


# ---------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("recipe", [Images, BatchNormed], ids=lambda kind: kind.__name__)
def test_exact_targets_agree_with_autograd_through_the_training(recipe, tmp_path):
    for kind in KINDS[1:]:
        found = go(recipe(), tmp_path / "run", hessian="exact", targets=kind, test="10")
    trajectory = found.trajectory()
    model = oracle.dense(recipe(), trajectory, [0]).model
    gradients = oracle.test_gradients(recipe(), model, range(10))
    label = found.test_gradients().column("label")
    assert len(set(label.tolist())) == 3
    wanted = [gradients[label == c].mean(0) for c in np.unique(label)] + [gradients.mean(0)]
    right = -oracle.unrolled(recipe(), trajectory, range(20)).along(np.array(wanted)).T
    right /= len(recipe().train_dataset())
    got = np.concatenate([by_test(found, "hydra-exact-classes"), by_test(found, "hydra-exact-mean")], axis=1)
    assert np.abs(got - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()


@pytest.mark.parametrize("hessian", FORMS)
def test_classes_and_the_mean_are_the_means_of_the_test_samples(hessian, small):
    method = FORMS[hessian]
    single, label = by_test(small, method), small.test_gradients().column("label")
    scale = np.abs(single).max()
    classes = np.stack([single[:, label == c].mean(1) for c in np.unique(label)], axis=1)
    assert np.abs(by_test(small, f"{method}-classes") - classes).max() < TIGHT * scale
    assert np.abs(by_test(small, f"{method}-mean")[:, 0] - single.mean(1)).max() < TIGHT * scale
    weight = np.bincount(label) / len(label)
    spread = {
        "classes": np.sqrt((classes - single.mean(1, keepdims=True)) ** 2 @ weight),
        "mean": np.zeros(20),
    }
    for kind in KINDS[1:]:
        samples, whole = (small.samples(m) for m in (f"{method}-{kind}", method))
        assert samples["visits"].equals(whole["visits"])
        a, b = (table["contribution"].to_numpy() for table in (samples, whole))
        assert np.abs(a - b).max() < TIGHT * scale
        assert np.abs(samples["contribution_std"].to_numpy() - spread[kind]).max() < TIGHT * scale
    one, other = (small.interclass(m).to_pandas() for m in (method, f"{method}-classes"))
    keys = ["train_class", "test_class", "pairs"]
    assert one[keys].equals(other[keys])
    assert np.abs(one["contribution"] - other["contribution"]).max() < TIGHT * scale
    mean = small.interclass(f"{method}-mean").to_pandas()
    assert mean["test_class"].tolist() == [-1] * 3
    assert mean["pairs"].sum() == 20 * 12


def test_tables_keep_the_contracts_columns_and_order(small):
    label = small.test_gradients().column("label")
    rows = small.contributions("hydra-exact-classes").to_table().to_pandas()
    keys = ["test_index", "test_label", "train_index"]
    assert rows[keys].equals(rows[keys].sort_values(keys, ignore_index=True))
    assert set(rows["test_index"]) == {-1}
    got, right = rows["contribution"].to_numpy().reshape(3, 20).T, by_test(small, "hydra-exact-classes")
    assert np.abs(got - right).max() < 1e-6 * np.abs(right).max()
    assert small.contributions("hydra-exact-mean").to_table(
        columns=["test_index", "test_label"]
    ).to_pandas().drop_duplicates().to_numpy().tolist() == [[-1, -1]]
    (file,) = (f for f in small.contributions("hydra-exact-classes").files)
    schema, order = pq.ParquetFile(file).schema, pq.ParquetFile(file).metadata.row_group(0).sorting_columns
    assert [schema.column(c.column_index).name for c in order] == keys
    count = Counter(label.tolist())
    assert small.targets("hydra-classes").to_pylist() == [
        {"test_index": -1, "test_label": c, "test_samples": count[c]} for c in sorted(count)
    ]
    assert small.targets("hydra-mean").to_pylist() == [
        {"test_index": -1, "test_label": -1, "test_samples": 12}
    ]
    assert small.targets("hydra")["test_index"].to_pylist() == list(range(12))


def test_the_number_of_shards_changes_no_bit(tmp_path):
    found = []
    for shards in (1, 3):
        for hessian in ("exact", "ekfac"):
            done = go(
                Many(),
                tmp_path / str(shards),
                dtype="float32",
                hessian=hessian,
                targets="classes",
                shards=shards,
            )
        found.append([by_test(done, f"{FORMS[h]}-classes") for h in ("exact", "ekfac")])
        assert done.info["methods"]["hydra-exact-classes"]["shards"] == shards
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_a_rank_as_large_as_the_classes_is_the_exact_form(small, tmp_path):
    done = go(Small(), tmp_path / "run", hessian="ekfac", targets="classes", exact_rank=3)
    assert done.methods() == ["hydra-ekfac-classes", "hydra-ekfac-classes-rank3"]
    right = by_test(small, "hydra-exact-classes")
    table = done.contributions("hydra-ekfac-classes-rank3").to_table(columns=["contribution"])
    got = table["contribution"].to_numpy().reshape(3, 20).T
    assert np.abs(got - right).max() < 1e-6 * np.abs(right).max()
    assert verify(done).ok


def test_mean_gradients_do_not_depend_on_the_cut(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    label = np.random.default_rng(1).integers(5, size=50) * 3
    held = target_set("classes", np.arange(50), label)

    def means(start, stop):
        return mean_gradients(
            lambda a, b: rows[a:b], target_of_each(held.label, label, start, stop), 7, stop - start
        )

    whole = means(0, 5)
    right = np.stack([rows[label == c].astype(np.float64).mean(0) for c in held.label])
    assert np.abs(whole - right).max() < 1e-15
    assert np.array_equal(whole, np.concatenate([means(0, 2), means(2, 3), means(3, 5)]))
    monkeypatch.setattr("hydra_pipe.workers.replay.targets.PANEL_BYTES", 8 * 7 * 3)  # three rows at a time
    assert np.abs(means(0, 5) - right).max() < 1e-15


def test_coarser_targets_are_weighted_by_their_test_samples():
    fine = target_set("samples", [0, 2, 5, 7], [1, 1, 4, 1])
    classes, weight = coarsened(fine, "classes")
    assert (classes.label.tolist(), classes.count.tolist()) == ([1, 4], [3, 1])
    assert weight == pytest.approx(np.array([[1 / 3, 0], [1 / 3, 0], [0, 1], [1 / 3, 0]]))
    mean, by_class = coarsened(classes, "mean")
    assert (mean.count.tolist(), by_class.ravel().tolist()) == ([4], [0.75, 0.25])
    assert weight @ by_class == pytest.approx(coarsened(fine, "mean")[1])
    assert coarsened(fine, "samples")[1] is None


# ---------------------------------------------------------------------- stages


def test_forms_share_the_targets_and_targets_share_the_curvature(tmp_path):
    first, second = Heard(), Heard()
    go(Small(), tmp_path / "a", first, hessian="ekfac", targets="classes")
    go(Small(), tmp_path / "a", second, hessian="ekfac", targets="mean")
    go(Small(), tmp_path / "a", second, hessian="none", targets="classes")
    assert ("hydra-ekfac/curvature", "curvature") in first.done
    assert ("hydra-ekfac/curvature", "curvature") in second.skipped
    assert ("target-gradients-classes", "block-00000") in second.skipped
    # What it was estimated from is one for all of them, in whatever order they come.
    with pytest.raises(SpecMismatch, match=r"options: stored .*checkpoints.*asked.*hydra-ekfac\)"):
        go(Small(), tmp_path / "a", hessian="ekfac", curvature_checkpoints=2)
    found = go(Small(), tmp_path / "a", hessian="ekfac")
    assert found.info["methods"]["hydra-ekfac-classes"]["targets"] == "classes"
    assert found.info["methods"]["hydra-ekfac-classes"]["n_targets"] == 3
    assert "targets" not in found.info["methods"]["hydra-ekfac"]
    assert found.methods() == ["hydra-ekfac", "hydra-ekfac-classes", "hydra-classes", "hydra-ekfac-mean"]
    assert found.method() == "hydra-ekfac"
    with pytest.raises(SpecMismatch, match="options: stored"):
        go(Small(), tmp_path / "a", hessian="ekfac", targets="classes", curvature_samples=9)


KILLS = (("targets-00001", "kill@3"), ("block-00000", "kill-after"))
KILLED = """
import os, sys
from hydra_pipe.workers.hessian import tiles
tiles.NEAR_BYTES = 0
from hydra_pipe.pipeline.executors.serial import SerialExecutor
from tests.faults import FaultPlan, spoiled
from tests.pipeline.spec.test_targets import KILLS, Many, go
for unit, action in KILLS:
    place = os.path.join(sys.argv[1], unit)
    os.makedirs(os.path.join(place, "faults"))
    child = os.fork()
    if not child:
        plan = FaultPlan(directory=os.path.join(place, "faults"), script={unit: [action]})
        SerialExecutor.run = spoiled(SerialExecutor.run, plan)
        go(Many(), os.path.join(place, "run"), hessian="exact", targets="classes", shards=3)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A directory with one for each of `KILLS`, by the name of its unit: a process imports once for all."""
    place = tmp_path_factory.mktemp("killed")
    words = [sys.executable, "-c", KILLED, str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(int(-signal.SIGKILL))] * len(KILLS), done.stderr
    return place


@pytest.mark.parametrize("unit", [unit for unit, _ in KILLS])
def test_a_killed_run_goes_on_with_the_same_bits(unit, killed, undisturbed):
    right, heard = undisturbed, Heard()
    found = go(Many(), killed / unit / "run", heard, hessian="exact", targets="classes", shards=3)
    if unit == "targets-00001":
        assert ("hydra-exact-classes/adjoint", "targets-00000") in heard.skipped
        assert ("hydra-exact-classes/adjoint", "targets-00001") in heard.done
    method = "hydra-exact-classes"
    assert np.array_equal(by_test(found, method), by_test(right, method))
    assert found.samples(method).equals(right.samples(method))
    assert found.contributions(method).to_table().equals(right.contributions(method).to_table())
    assert verify(found).ok


@pytest.mark.slow  # the kill above, by the executor of test_resume
@pytest.mark.ray
def test_a_killed_worker_on_ray_changes_no_bit(warm_ray, undisturbed, tmp_path, monkeypatch):
    right = undisturbed
    (tmp_path / "faults").mkdir()
    plan = FaultPlan(directory=str(tmp_path / "faults"), script={"targets-00001": ["kill@3"]})
    monkeypatch.setattr(RayExecutor, "run", spoiled(RayExecutor.run, plan))
    fields = {"executor": "ray", "address": warm_ray, "workers": 2}
    found = go(Many(), tmp_path / "run", hessian="exact", targets="classes", shards=3, **fields)
    assert plan.attempts("targets-00001") == 2
    assert np.array_equal(by_test(found, "hydra-exact-classes"), by_test(right, "hydra-exact-classes"))


def test_a_damaged_target_gradient_is_made_again(tmp_path):
    found = go(Small(), tmp_path / "a", targets="mean")
    before = by_test(found, "hydra-mean")
    chunk = tmp_path / "a/target_gradients/targets=mean.zarr/gradient/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-3] + b"xyz")
    assert any("target_gradients" in line for line in verify(found).problems)
    heard = Heard()
    found = go(Small(), tmp_path / "a", heard, targets="mean")
    assert ("target-gradients-mean", "block-00000") in heard.done
    assert np.array_equal(by_test(found, "hydra-mean"), before)
    assert verify(found).ok


def test_the_plan_counts_targets():
    spec = {"recipe": Small(), "executor": "serial", "mode": "adjoint"}
    plans = {kind: make_plan(RunSpec(**spec, targets=kind)).as_dict() for kind in KINDS}
    assert [(p["run"]["targets"], p["run"]["target vectors"]) for p in plans.values()] == [
        ("samples", 12),
        ("classes", 3),
        ("mean", 1),
    ]
    assert plans["classes"]["run"]["contributions"] == 45 * 3
    assert plans["classes"]["disk"]["by_test"] == 45 * 3 * 4
    assert plans["classes"]["disk"]["target_gradients"] == 3 * plans["classes"]["run"]["parameters"] * 4
    assert "target-gradients worker" in plans["mean"]["memory"]
    assert "target-gradients worker" not in plans["samples"]["memory"]
    assert [len(p["shards"]) for p in plans.values()] == [1, 1, 1]


# ---------------------------------------------------------------------- refusals


def test_what_cannot_be_is_refused_by_name(tmp_path):
    with pytest.raises(
        SpecError, match=r"targets 'mean': only mode='adjoint'.*use mode='adjoint', or targets"
    ):
        RunSpec(targets="mean")
    with pytest.raises(SpecError, match=r"targets 'clases': did you mean 'classes'"):
        RunSpec(targets="clases", mode="adjoint")
    with pytest.raises(
        SpecError, match=r"targets 'classes': 12 of 12 test samples have no label.*labels\(\)"
    ):
        go(Unlabelled(), tmp_path / "a", targets="classes")
    assert not (tmp_path / "a").exists()
    assert go(Unlabelled(), tmp_path / "a", targets="mean").methods() == ["hydra-mean"]


def test_the_command_line_refuses_and_runs(tmp_path):
    words = (
        "--executor",
        "serial",
        "--quiet",
        "--out",
        str(tmp_path / "a"),
        "--epochs",
        "1",
        "--track",
        "30",
    )
    words += ("--test", "20", "--set", "train_size=60", "--set", "test_size=20")
    wrong = cli("run", "digits", *words, "--targets", "classes")
    assert wrong.exit_code == 1
    assert "targets 'classes'" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
    assert cli("run", "digits", *words, "--mode", "adjoint", "--targets", "each").exit_code == 2
    (tmp_path / "a.toml").write_text('mode = "adjoint"\ntargets = "mean"\n')
    done = cli("run", "digits", *words, "--config", str(tmp_path / "a.toml"), "--format", "json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["method"], document["targets"]) == ("hydra-mean", "mean")
    assert not any("--test" in line or "<>" in line for line in document["next"])
    shown = cli("status", tmp_path / "a", "--format", "json")
    assert json.loads(shown.stdout)["state"] == "complete"
    assert (
        cli("plan", "digits", "--mode", "adjoint", "--targets", "classes", "--executor", "serial").exit_code
        == 0
    )


# ---------------------------------------------------------------------- readers


def test_top_of_a_class_is_the_same_from_both(small):
    for harmful in (False, True):
        one, other = (
            small.top(4, label=1, harmful=harmful, method=m) for m in ("hydra-exact", "hydra-exact-classes")
        )
        assert one["train_index"].equals(other["train_index"])
        assert one["contribution"].to_numpy() == pytest.approx(other["contribution"].to_numpy(), rel=1e-5)
    right = by_test(small, "hydra-exact-classes")[:, 1]
    assert other["train_index"].to_pylist() == np.argsort(right, kind="stable")[:4].tolist()
    assert set(other["test_label"].to_pylist()) == {1}
    means = [small.top(5, method=m)["train_index"] for m in ("hydra-exact", "hydra-exact-mean")]
    assert means[0].equals(means[1])


def test_top_refuses_what_a_method_does_not_hold(small):
    for asked, message in (
        (
            {"test": 3, "method": "hydra-exact-classes"},
            "test sample 3: .*a mean a class.*--class C, or --method",
        ),
        (
            {"test": 3, "method": "hydra-mean"},
            "test sample 3: method hydra-mean .*the mean over all.*--method hydra",
        ),
        ({"label": 1, "method": "hydra-mean"}, "class 1: method hydra-mean .*no classes; use --method hydra"),
        ({"label": 9, "method": "hydra-classes"}, "class 9: .*of classes 0, 1, 2; choose"),
        ({"label": -1, "method": "hydra"}, "class -1: .*of classes 0, 1, 2; choose"),
        ({"label": 1, "test": 2}, "test sample 2 and class 1"),
    ):
        with pytest.raises(InputError, match=message):
            small.top(**asked)


def test_top_on_the_command_line(small):
    shown = cli("top", small.uri, "--class", "1", "--method", "hydra-exact-classes")
    title = "helpful training samples for test samples of class 1 (hydra-exact-classes)"
    assert title in " ".join(shown.stdout.split())
    document = json.loads(cli("top", small.uri, "--class", "1", "--format", "json").stdout)
    assert (document["test_label"], document["test_index"], len(document["rows"])) == (1, None, 10)
    assert "std over classes" in cli("top", small.uri, "--method", "hydra-classes").stdout
    assert "std" not in cli("top", small.uri, "--method", "hydra-mean").stdout
    assert cli("top", small.uri, "--class", "7").exit_code == 1


def test_status_verify_and_export_count_targets(small, tmp_path):
    shown = cli("status", small.uri, "--format", "json")
    assert json.loads(shown.stdout)["state"] == "complete"
    stages = {s["stage"]: s for s in json.loads(shown.stdout)["stages"]}
    assert stages["target-gradients-classes"]["rows"] == stages["hydra-classes/adjoint"]["rows"] == 3
    found = verify(small)
    assert found.ok, found.problems
    assert found.rows["target_gradients/targets=classes.zarr"] == 3
    assert found.rows["contributions/method=hydra-ekfac-classes"] == 60
    for method, rows in (("hydra-exact-mean", 20), ("hydra-exact-classes", 60), ("hydra", 240)):
        done = cli(
            "export", small.uri, "--to", tmp_path / f"{method}.csv", "--method", method, "--format", "json"
        )
        assert json.loads(done.stdout)["rows"] == rows


def test_verify_recomputes_the_means(tmp_path):
    found = go(Small(), tmp_path / "a", targets="classes")
    store = RowStore.open(found.directory.path("target_gradients", "targets=classes.zarr"), "gradient")
    rows = store.read(0, 3)
    rows[1, 0] *= 1.001
    store.write(0, rows)
    vouch(found.uri)
    (problem,) = verify(found).problems
    assert problem == "target_gradients/targets=classes.zarr: row 1 is not the mean of its test gradients"


def test_compare_brings_methods_to_the_coarsest_targets(small):
    document = json.loads(cli("compare", small.uri, "--format", "json").stdout)
    assert (document["reference"], document["targets"], document["n_targets"]) == (
        "hydra-exact",
        "samples",
        12,
    )
    assert [row["method"] for row in document["methods"]] == ["hydra-exact", "hydra", "hydra-ekfac"]
    words = ("compare", small.uri, "--reference", "hydra-exact", "--format", "json", "--methods")
    mixed = json.loads(cli(*words, "hydra-exact-classes,hydra-ekfac").stdout)
    assert (mixed["targets"], mixed["n_targets"], mixed["n_test"]) == ("classes", 3, 12)
    assert mixed["methods"][1]["relative_error"] < 1e-6
    words = ("compare", small.uri, "--reference", "hydra-exact-classes", "--format", "json", "--methods")
    alike = json.loads(cli(*words, "hydra-ekfac-classes").stdout)
    for key in ("spearman", "relative_error", "mean_spearman", "overlap_helpful"):
        assert alike["methods"][1][key] == pytest.approx(mixed["methods"][2][key], rel=1e-4)
    mean = json.loads(cli(*words, "hydra-exact-mean").stdout)
    assert (mean["targets"], mean["n_targets"]) == ("mean", 1)
    assert mean["methods"][1]["relative_error"] < 1e-6
    assert "3 classes" in cli("compare", small.uri, "--reference", "hydra-exact-classes").stdout
    for kind in KINDS:
        name = "hydra" if kind == "samples" else f"hydra-{kind}"
        whole = np.concatenate([block for _, block in panels(small, name, panel=2)], axis=1)
        assert whole == pytest.approx(by_test(small, name), rel=1e-6)
    by_class = np.concatenate([b for _, b in panels(small, "hydra", panel=2, kind="classes")], axis=1)
    assert by_class == pytest.approx(by_test(small, "hydra-classes"), abs=1e-7)
    assert targets(small, "hydra-mean").count.tolist() == [12]


def test_compare_without_test_samples_takes_the_exact_form_of_the_classes(tmp_path):
    for hessian in ("none", "exact"):
        go(Small(), tmp_path / "a", hessian=hessian, targets="classes")
    document = json.loads(cli("compare", tmp_path / "a", "--format", "json").stdout)
    assert document["reference"] == "hydra-exact-classes"
    go(Small(), tmp_path / "a", hessian="exact", targets="mean")
    alone = cli("compare", tmp_path / "a", "--reference", "hydra-exact-mean")
    assert alone.exit_code == 1
    assert "no other method of targets 'mean'" in alone.stderr
    assert open_run(str(tmp_path / "a")).methods()[-1] == "hydra-exact-mean"


# ---------------------------------------------------------------------- the truth by retraining


class Wrong(Small):
    """Every fifth label moved on by one."""

    def train_dataset(self):
        dataset = super().train_dataset()
        dataset.tensors[1][::5] = (dataset.tensors[1][::5] + 1) % self.classes
        return dataset

    def noisy_labels(self, dataset):
        index = np.arange(0, 45, 5)
        return index, (dataset.tensors[1].numpy()[index] - 1) % self.classes


@pytest.fixture(scope="module")
def retrained(tmp_path_factory):
    """Exact contributions of ``Wrong`` to samples, classes and the mean, with retrainings."""
    out = tmp_path_factory.mktemp("retrained") / "run"
    for kind in KINDS:
        go(Wrong(), out, hessian="exact", targets=kind, track="all")
    return out


FEW = {"subsets": 6, "fractions": (0.9,), "leave_one_out": 4, "remove": (0.1,), "perturb": (0.1,)}


def score(out, methods, heard=None):
    return evaluate(str(out), Wrong(), questions=Questions(methods=methods, **FEW), observer=heard)


def test_evaluate_scores_classes_by_the_losses_of_classes(retrained):
    found = score(retrained, ["hydra-exact-classes", "hydra-exact"])
    assert (found["targets"], found["n_targets"], found["n_test"]) == ("classes", 3, 12)
    rows = {row["method"]: row for row in found["lds"]}
    opened = open_run(str(retrained))
    label = opened.test_gradients().column("label")
    C = by_test(opened, "hydra-exact-classes")
    base = read_part(opened.directory, "retrain", unchanged().unit)["loss"].to_numpy()
    real, said = [], []
    for trial in subsets(np.arange(45), 0.9, 6, 0, "rescaled"):
        change = read_part(opened.directory, "retrain", trial.change.unit)["loss"].to_numpy() - base
        real.append([change[label == c].mean() for c in np.unique(label)])
        said.append((1 - trial.change.weights(45)) @ C)
    right = spearmanr(np.array(real), np.array(said)).statistic[:3, 3:].diagonal().mean()
    for method in ("hydra-exact-classes", "hydra-exact"):
        assert rows[method]["lds"] == pytest.approx(right, abs=1e-12)
    table = pq.read_table(retrained / "evaluate/lds.parquet").to_pydict()
    assert table["test_label"][:3] == [0, 1, 2]
    assert set(table["test_index"]) == {-1}
    # What is said of the mean test loss is the same from every kind of targets, whatever the classes' sizes.
    whole, mean = score(retrained, ["hydra-exact"]), score(retrained, ["hydra-exact-mean"])

    def removed(summary):
        rows = [
            {**row, "ranking": row["ranking"].split("-mean")[0].split("-classes")[0]}
            for row in summary["removal"]
        ]
        return {(row["ranking"], row["direction"], row["removed"]): row for row in rows}

    one, *others = (removed(summary) for summary in (whole, found, mean))
    for other in others:
        assert other.keys() == one.keys()
        for key, row in one.items():
            assert other[key]["loss_change"] == pytest.approx(row["loss_change"], rel=1e-9)
            if row["predicted_change"] is not None:
                assert other[key]["predicted_change"] == pytest.approx(row["predicted_change"], rel=1e-4)
    single = [each["leave_one_out"][-1]["spearman_mean"] for each in (whole, found, mean)]
    assert single == pytest.approx([single[0]] * 3)
    scores = {row["score"] for row in found["mislabelled"]}
    assert "hydra-exact-classes: spread of C(i, class)" in scores
    assert not any("spread" in row["score"] for row in mean["mislabelled"])


def test_evaluate_takes_the_finest_targets_and_says_what_it_left_out(retrained):
    notes = []

    def heard(event):
        if isinstance(event, Note):
            notes.append(event.message)

    found = score(retrained, None, heard)
    assert (found["methods"], found["targets"]) == (["hydra-exact"], "samples")
    (note,) = notes
    assert "not scored: hydra-exact-classes, hydra-exact-mean" in note
    words = (
        "evaluate",
        retrained,
        "tests.pipeline.spec.test_targets:Wrong",
        "--methods",
        "hydra-exact-classes",
    )
    words += ("--subsets", "6", "--fractions", "0.9", "--remove", "0.1", "--perturb", "none", "--quiet")
    shown = cli(*words, "--executor", "serial")
    assert "losses are those of 12 test samples in 3 classes" in shown.stdout, shown.stderr
