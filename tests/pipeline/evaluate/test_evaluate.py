"""evaluate: retraining is what the derivative speaks of, resumes, and is scored right."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.pipeline.evaluate.evaluate import Questions, evaluate, read_summary
from hydra_pipe.pipeline.evaluate.scores import agreement, detection, lds, recommendation
from hydra_pipe.pipeline.evaluate.trials import subsets
from hydra_pipe.pipeline.executors import events
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.plan.stored_spec import REPEATED, stored_spec
from hydra_pipe.pipeline.units.retrain import removal, unchanged
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import IncompleteStage, InputError, ReplayDiverged, SpecError, SpecMismatch
from hydra_pipe.workers.training.retrain import only, retrain_subset, retrain_weighted, test_losses
from hydra_pipe.workers.training.training import Compute

from hydra_pipe import Run, RunSpec, run
from tests.recipes import Augmented, BatchNormed, Images, OneCycle, Plateau, Small

losses_of = test_losses
del test_losses  # no test of this module

DOUBLE = Compute(device="cpu", dtype="float64", batch_norm="coupled")
SINGLE = Compute(device="cpu")


class Noisy(Small):
    """Small, with every fifth label moved on by one."""

    def train_dataset(self):
        dataset = super().train_dataset()
        _, targets = dataset.tensors
        targets[::5] = (targets[::5] + 1) % self.classes
        return dataset

    def noisy_labels(self, dataset):
        index = np.arange(0, 45, 5)
        return index, (dataset.tensors[1].numpy()[index] - 1) % self.classes


def spec(recipe, out, **changes):
    values = {"executor": "serial", "mode": "adjoint", "hessian": "exact", "device": "cpu", **changes}
    return RunSpec(recipe=recipe, out=str(out), **values)


FEW = Questions(subsets=6, fractions=(0.5, 0.9), leave_one_out=4, remove=(0.1,), perturb=(0.03,))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run of Noisy with two methods, evaluated; and what the evaluation returned."""
    place = tmp_path_factory.mktemp("runs") / "r"
    run(spec(Noisy(), place, dtype="float64"))
    run(spec(Noisy(), place, dtype="float64", hessian="none"))
    return place, evaluate(str(place), Noisy(), questions=FEW)


class Heard:
    """Counts what was done and what was skipped."""

    def __init__(self):
        self.done, self.skipped = [], []

    def __call__(self, event):
        if isinstance(event, events.UnitFinished):
            self.done.append(event.unit)
        elif isinstance(event, events.UnitSkipped):
            self.skipped.append(event.unit)


# ---------------------------------------------------------------- retraining


@pytest.mark.parametrize(
    "kind", [Small, Images, BatchNormed, OneCycle, Augmented], ids=lambda kind: kind.__name__
)
def test_nothing_removed_gives_the_recorded_bits(kind, tmp_path):
    done = run(spec(kind(), tmp_path / "r", test="3", hessian="none"))
    trajectory = done.trajectory()
    n_train = int(done.info["n_train"])
    again = retrain_weighted(kind(), SINGLE, trajectory, np.ones(n_train))
    last = trajectory.checkpoint(-1).weights
    assert np.array_equal(again.weights().numpy(), last)
    assert again.state_digest() == trajectory.epoch_digest[-1]
    everything = retrain_subset(kind(), SINGLE, np.arange(n_train))
    assert np.array_equal(everything.weights().numpy(), last)
    assert unchanged().weights(n_train).tolist() == [1.0] * n_train
    assert again.visited.min() > 0


@pytest.mark.parametrize("kind", [Small, Images, OneCycle], ids=lambda kind: kind.__name__)
def test_the_derivative_is_that_of_the_retraining(kind, tmp_path):
    done = run(spec(kind(), tmp_path / "r", dtype="float64"))
    trajectory, n_train = done.trajectory(), int(done.info["n_train"])
    table = done.contributions("hydra-exact").to_table().to_pandas()
    exact = table.pivot_table(index="train_index", columns="test_index", values="contribution").to_numpy()
    tests, step = np.arange(exact.shape[1]), 1e-4
    for sample in (0, 17):
        ends = []
        for sign in (1, -1):
            weights = np.ones(n_train)
            weights[sample] += sign * step  # eps = step / N
            trained = retrain_weighted(kind(), DOUBLE, trajectory, weights)
            ends.append(losses_of(trained, tests).loss)
        # C = -(1/N) d loss / d eps, and weight = 1 + N eps.
        found = -(ends[0] - ends[1]) / (2 * step)
        assert np.abs(found - exact[sample]).max() < 1e-5 * np.abs(exact).max()


def test_ways_to_remove(tmp_path):
    change = removal([3, 1], "rescaled")
    weights = change.weights(8)
    assert weights[[1, 3]].tolist() == [0, 0]
    assert weights.mean() == pytest.approx(1)
    assert removal([1, 3], "weighted").weights(8).sum() == 6
    assert len({removal([1, 3], way).unit for way in ("rescaled", "weighted", "subset")}) == 3
    assert change.unit == removal([1, 3], "rescaled").unit
    smaller = only(Small(), np.array([4, 9, 11]))
    assert len(smaller.train_dataset()) == 3
    assert len(only(Augmented(), np.array([4, 9])).train_dataset()) == 2
    trained = retrain_subset(Plateau(), SINGLE, np.arange(30))
    assert trained.steps == 6 * 4


def test_subsets_do_not_depend_on_how_many_there_are():
    tracked = np.arange(0, 80, 2)
    few, many = (subsets(tracked, 0.9, count, 0, "rescaled") for count in (3, 9))
    assert [t.change.unit for t in few] == [t.change.unit for t in many[:3]]
    assert all(len(t.change.index) == 4 and np.isin(t.change.index, tracked).all() for t in many)
    other = subsets(tracked, 0.9, 3, 1, "rescaled")
    assert not {t.change.unit for t in few} & {t.change.unit for t in other}


# ---------------------------------------------------------------- scores


def test_planted_predictors():
    draw = np.random.default_rng(0)
    real = draw.normal(size=(40, 7))
    found = lds(real, {"perfect": np.exp(real), "wrong": -real, "chance": draw.normal(size=(40, 7))})
    assert (found["perfect"].score, found["wrong"].score) == (pytest.approx(1), pytest.approx(-1))
    assert found["perfect"].low > 0.99
    assert found["chance"].low < 0 < found["chance"].high
    assert found["chance"].low <= found["chance"].score <= found["chance"].high
    assert agreement(real, real)["explained"] == 1
    half = agreement(real, 2 * real)
    assert (half["slope"], half["correlation"], half["explained"]) == (0.5, pytest.approx(1), 0)
    lines = recommendation({0.5: found}, {"perfect": 9.0, "wrong": 1.0})
    assert lines == ["50% removed: perfect has LDS 1.000 (1.000 to 1.000): trust perfect"]


def test_the_cheaper_of_two_equals_is_recommended():
    draw = np.random.default_rng(0)
    real = draw.normal(size=(40, 7))
    near = {"dear": real, "cheap": real + 0.01 * draw.normal(size=real.shape)}
    (line,) = recommendation({0.9: lds(real, near)}, {"dear": 9.0, "cheap": 1.0})
    assert line.endswith("is nearly as good at half the cost or less: trust cheap")
    (line,) = recommendation({0.9: lds(real, near)}, {"dear": 1.0, "cheap": 9.0})
    assert line.endswith("trust dear")
    noisy = {name: real[:5] + draw.normal(size=(5, 7)) for name in ("one", "other")}
    (line,) = recommendation({0.9: lds(real[:5], noisy)}, {"one": 2.0, "other": 1.0})
    assert "more --subsets would tell it from" in line or line.endswith("trust none at this size")
    (line,) = recommendation({0.9: lds(real, {"chance": draw.normal(size=real.shape)})}, {})
    assert line.endswith("trust none at this size")


def test_planted_noise_is_found():
    wrong = np.zeros(50, dtype=bool)
    wrong[[3, 9, 20]] = True
    rows = detection({"knows": wrong + 0.0, "inverse": -1.0 * wrong, "tied": np.zeros(50)}, wrong)
    assert [row["auc"] for row in rows] == [1, 0, 0.5]
    assert (rows[0]["recall"], rows[0]["auc_low"], rows[0]["auc_high"]) == (1, 1, 1)


# ---------------------------------------------------------------- the whole


def test_the_exact_derivative_predicts(evaluated):
    _, found = evaluated
    score = {(row["fraction"], row["method"]): row["lds"] for row in found["lds"]}
    assert score[0.9, "hydra-exact"] > 0.8
    reach = {(r["what"], r["method"]): r for r in found["smoothness"] if r["what"] == "random weights"}
    assert reach["random weights", "hydra-exact"]["explained"] > 0.98
    single = {row["method"]: row for row in found["leave_one_out"]}
    assert single["hydra-exact"]["spearman_by_test"] > 0.9
    assert any("predicts" in line and "10%" in line for line in found["sentences"])


def test_everything_stands_beside_its_baselines(evaluated):
    _, found = evaluated
    rankings = {(row["ranking"], row["direction"]) for row in found["removal"]}
    assert {("training-loss", "harmful"), ("random", "any"), ("wrong labels", "harmful")} <= rankings
    assert {("hydra", "helpful"), ("hydra-exact", "harmful")} <= rankings
    scores = {row["score"]: row["auc"] for row in found["mislabelled"]}
    assert {"training loss at the end", "training loss, mean over visits", "chance"} <= set(scores)
    assert scores["training loss, mean over visits"] > 0.7
    # The known share of wrong labels is one of the sizes.
    assert {row["removed"] for row in found["removal"]} == {4, 9}


def test_what_is_stored(evaluated):
    place, found = evaluated
    assert read_summary(open_run(place)) == json.loads(json.dumps(found))
    table = pq.read_table(place / "evaluate" / "lds.parquet")
    assert len(table) == 2 * 2 * 12
    trials = pq.read_table(place / "evaluate" / "trials.parquet").to_pandas()
    assert trials.groupby("kind").size().to_dict() == {"one": 4, "perturb": 2, "remove": 17, "subset": 12}
    losses = pq.read_table(place / "evaluate" / "retrain")
    assert len(losses) == 12 * (found["retrainings"]["asked"])
    assert status(open_run(place))["state"] == "complete"
    assert status(open_run(place))["resume"] is None
    assert verify(open_run(place)).ok


def test_the_same_again_does_nothing_and_more_does_the_difference(evaluated, tmp_path):
    place = Path(shutil.copytree(evaluated[0], tmp_path / "r"))
    heard = Heard()
    again = evaluate(str(place), Noisy(), questions=FEW, observer=heard)
    assert heard.done == []
    for part in ("lds", "smoothness", "leave_one_out", "removal", "mislabelled", "sentences"):
        assert again[part] == evaluated[1][part], part
    lost = next(iter((place / "manifests" / "evaluate" / "retrain").glob("rescaled-*")))
    lost.unlink()
    torn = next(iter((place / "evaluate" / "retrain").glob("part-weighted-*")))
    torn.write_bytes(torn.read_bytes()[:-1])
    heard = Heard()
    more = Questions(subsets=7, fractions=(0.5, 0.9), leave_one_out=4, remove=(0.1,), perturb=(0.03,))
    evaluate(str(place), Noisy(), questions=more, observer=heard)
    assert len(heard.done) == 2 + 2
    assert lost.stem in heard.done
    assert torn.stem.removeprefix("part-") in heard.done


def test_a_method_added_later_uses_the_retrainings_that_are_there(tmp_path):
    place = tmp_path / "r"
    run(spec(Small(), place))
    asked = Questions(subsets=3, fractions=(0.5,), remove=(), perturb=())
    evaluate(str(place), Small(), questions=asked)
    run(spec(Small(), place, hessian="none"))
    heard = Heard()
    found = evaluate(str(place), Small(), questions=asked, observer=heard)
    assert heard.done == []
    assert [row["method"] for row in found["lds"]] == ["hydra", "hydra-exact"]
    assert found["mislabelled"] == found["removal"] == []


def test_only_tracked_samples_are_removed(tmp_path):
    run(spec(Small(), tmp_path / "r", track="10:30", test="5"))
    asked = Questions(subsets=3, fractions=(0.5,), remove=(0.2,), perturb=(0.1,), retraining="weighted")
    found = evaluate(str(tmp_path / "r"), Small(), questions=asked)
    weights = pq.read_table(tmp_path / "r" / "evaluate" / "weights").to_pandas()
    assert weights.train_index.between(10, 29).all()
    assert (found["n_tracked"], found["n_test"]) == (20, 5)


def test_another_recipe_is_stopped_before_anything_is_measured(evaluated, tmp_path):
    place = Path(shutil.copytree(evaluated[0], tmp_path / "r"))
    shutil.rmtree(place / "manifests" / "evaluate")
    heard = Heard()
    with pytest.raises(SpecMismatch, match=r"what differs: .*losses of the first steps"):
        evaluate(str(place), Small(), questions=FEW, observer=heard)
    info = json.loads((place / "run.json").read_text())
    del info["document_sha256"]
    del info["made_of"]  # a run of an earlier version: retraining tells
    (place / "run.json").write_text(json.dumps(info))
    with pytest.raises(ReplayDiverged):
        evaluate(str(place), Small(), questions=FEW, observer=heard)
    assert heard.done == []


def test_a_stored_recipe_is_not_imported_unasked(evaluated, tmp_path):
    place, _ = evaluated
    with pytest.raises(InputError, match=f"name it yourself: hydra-pipe evaluate {place} tests"):
        evaluate(str(place), questions=FEW)
    opened = open_run(place)
    info = {**opened.info, "spec": {**opened.info["spec"], "address": "evil:1", "workers": 9}}
    info["identity"] = {**info["identity"], "recipe": "digits", "recipe_args": {"lr": 0.5}}
    opened = Run(opened.directory, info)
    given = {"executor": "serial", "workers": None, "recipe_args": {"momentum": 0.0}}
    found = stored_spec(opened, None, given, command="evaluate", free=REPEATED)
    assert (found.recipe, found.address, found.workers, found.dtype) == ("digits", None, None, "float64")
    assert found.recipe_args == {"lr": 0.5, "momentum": 0.0}
    with pytest.raises(SpecError, match="epochs is the run's own"):
        stored_spec(opened, None, {"epochs": 9}, command="evaluate", free=REPEATED)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"subsets": 2}, "at least 3"),
        ({"fractions": (1.0,)}, "fractions 1: must be above 0 and below 1"),
        ({"leave_one_out": -1}, "leave_one_out -1"),
        ({"retraining": "twice"}, "must be one of weighted, rescaled, subset"),
    ],
)
def test_questions_are_checked(wrong, message):
    with pytest.raises(SpecError, match=message):
        Questions(**wrong)


def test_a_fraction_that_removes_nobody_is_refused(evaluated):
    with pytest.raises(SpecError, match="of 45 tracked samples that keeps 45"):
        evaluate(str(evaluated[0]), Noisy(), questions=Questions(fractions=(0.999,)))


def test_never_evaluated(tmp_path):
    done = run(spec(Small(), tmp_path / "r", test="2", track="2", hessian="none"))
    with pytest.raises(IncompleteStage, match="hydra-pipe evaluate"):
        read_summary(done)


def test_the_command(evaluated, tmp_path):
    place = Path(shutil.copytree(evaluated[0], tmp_path / "r"))
    words = [
        *(
            "evaluate",
            str(place),
            "tests/pipeline/evaluate/test_evaluate.py:Noisy",
            "--executor",
            "serial",
            "--quiet",
        ),
        *("--subsets", "6", "--fractions", "0.5,0.9", "--leave-one-out", "4", "--remove", "0.1"),
        *("--perturb", "0.03"),
    ]
    runner = CliRunner(env={"COLUMNS": "80"})
    done = runner.invoke(main, words)
    assert done.exit_code == 0, done.output
    for text in ("linear datamodelling score", "4 samples left out", "wrong labels, found by", "trust"):
        assert text in done.stdout
    rows = list(csv.DictReader(io.StringIO(runner.invoke(main, [*words, "--format", "csv"]).stdout)))
    assert [(row["fraction"], row["method"]) for row in rows][:2] == [
        ("0.5", "hydra"),
        ("0.5", "hydra-exact"),
    ]
    pytest.importorskip("matplotlib")
    done = runner.invoke(main, [*words, "--format", "json", "--figures", str(tmp_path / "f")])
    assert len(json.loads(done.stdout)["figures"]) == 3
    assert runner.invoke(main, [*words, "--perturb", "much"]).exit_code == 2
    assert "name it yourself" in runner.invoke(main, ["evaluate", str(place)]).stderr
