"""clean --retrain: every arm is the training it says, resumes, and is summed up right."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from hydra_pipe.pipeline.decide.arms import mean_over_visits, random_alike
from hydra_pipe.pipeline.decide.retraining import spread
from hydra_pipe.pipeline.reading.outcomes import read_outcome
from hydra_pipe.pipeline.units.retrain_cleaned import CleanedWork
from hydra_pipe.storage import layout
from hydra_pipe.storage.errors import InputError, RecipeError, SpecError
from hydra_pipe.storage.visits import Visits
from hydra_pipe.workers.training.relabelled import relabelled
from hydra_pipe.workers.training.retrain import WeightedTraining, retrain_subset, retrain_weighted
from hydra_pipe.workers.training.retrain import test_losses as losses_of
from hydra_pipe.workers.training.same_data import with_seed
from hydra_pipe.workers.training.training import Compute
from scipy import stats

from hydra_pipe import RunSpec, clean, open_run, run, verify
from tests.put_detection import put_detection
from tests.recipes import Small

SERIAL = {"executor": "serial", "device": "cpu"}
CPU = Compute(device="cpu")
WRONG = np.arange(0, 45, 9)
ALL = np.arange(12)


class Noisy(Small):
    """Small with five wrong labels."""

    def train_dataset(self):
        dataset = super().train_dataset()
        _, targets = dataset.tensors
        targets[WRONG] = (targets[WRONG] + 1) % self.classes
        return dataset

    def noisy_labels(self, dataset):
        return WRONG, (dataset.tensors[1].numpy()[WRONG] - 1) % self.classes


def measured(training) -> tuple[float, float]:
    found = losses_of(training, ALL)
    return float(found.correct.mean()), float(found.loss.mean())


def by_hand(seed: int, dropped=(), recipe=None) -> tuple[float, float]:
    kept = np.setdiff1d(np.arange(45), dropped)
    return measured(retrain_subset(with_seed(recipe or Noisy(), seed), CPU, kept))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with wrong labels, visits in its record, and a detection that finds three of the five."""
    place = tmp_path_factory.mktemp("retrained") / "run"
    done = run(RunSpec(recipe=Noisy(), out=str(place), mode="adjoint", targets="mean", **SERIAL))
    given = done.samples()["label"].to_numpy().astype(int)
    suspicion = np.random.default_rng(0).normal(size=45)
    suspicion[WRONG[:3]] += 9
    suggested = (given - 1) % 3
    put_detection(done, given, suspicion, suggested=suggested, flagged=6, by="margin")
    return place


@pytest.fixture(scope="module")
def dropped(made):
    """The decision retrained with two seeds."""
    return clean(str(made), Noisy(), drop="flagged", retrain=2, papers_reading=True, **SERIAL)


def numbers(outcome, arm: str) -> list[tuple[float, float]]:
    (one,) = [one for one in outcome.arms if one.arm == arm]
    return list(zip(one.accuracies, one.losses, strict=True))


def test_each_arm_is_the_training_it_says(dropped):
    outcome, gone = dropped.outcome, dropped.decision.drop
    assert len(gone) == 6
    seeds = (3, 4)
    assert outcome.seeds == seeds
    assert outcome.judging == 12
    assert "no test sample" in outcome.trust
    given = dropped.decision.table["given_label"].to_numpy().astype(np.int64)
    at_random = {seed: random_alike(given, gone, np.arange(45), seed) for seed in seeds}
    true = relabelled(Noisy(), WRONG, Small().train_dataset().tensors[1].numpy()[WRONG])
    assert numbers(outcome, "before") == [by_hand(seed) for seed in seeds]
    assert numbers(outcome, "cleaned") == [by_hand(seed, gone) for seed in seeds]
    assert numbers(outcome, "exact") == [by_hand(seed, WRONG) for seed in seeds]
    assert numbers(outcome, "random") == [by_hand(seed, at_random[seed]) for seed in seeds]
    assert numbers(outcome, "true-labels") == [by_hand(seed, gone, true) for seed in seeds]
    assert numbers(outcome, "random-true-labels") == [by_hand(seed, at_random[seed], true) for seed in seeds]
    assert [arm.samples for arm in outcome.arms] == [45, 39, 39, 39, 39, 40, 39, 39]


def test_as_many_of_each_class_go_at_random_and_others_with_another_seed(dropped):
    given = dropped.decision.table["given_label"].to_numpy().astype(np.int64)
    gone, draws = dropped.decision.drop, []
    for seed in range(4):
        drawn = random_alike(given, gone, np.arange(45), seed)
        assert (
            np.bincount(given[drawn], minlength=3).tolist() == np.bincount(given[gone], minlength=3).tolist()
        )
        draws.append(tuple(drawn))
    assert len(set(draws)) == 4


def test_it_is_summed_up_over_the_seeds(made, dropped):
    outcome = dropped.outcome
    assert read_outcome(open_run(made), dropped.decision.name) == outcome
    arms = {one.arm: one for one in outcome.arms}
    before, cleaned = (np.array(arms[name].accuracies) for name in ("before", "cleaned"))
    found = arms["cleaned"].accuracy
    assert (found.mean, found.std) == pytest.approx((cleaned.mean(), cleaned.std(ddof=1)))
    half = 12.706204736 * cleaned.std(ddof=1) / np.sqrt(2)  # t of one degree of freedom
    assert (found.low, found.high) == pytest.approx((cleaned.mean() - half, cleaned.mean() + half))
    assert arms["cleaned"].to_before.mean == pytest.approx((cleaned - before).mean())
    assert arms["before"].to_before is None
    assert arms["random"].to_random is None
    low, high = stats.t.interval(0.95, 3, loc=2.5, scale=stats.sem([1, 2, 3, 4]))
    four = spread(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (four.low, four.high) == pytest.approx((low, high))
    assert spread(np.array([2.0])).low is None
    assert verify(open_run(made)).ok


def test_other_labels_and_weights_are_really_trained_with(made):
    done, first = open_run(made), 3
    moved = clean(done, Noisy(), relabel=4, retrain=1, **SERIAL)
    index = np.array(sorted(moved.decision.relabel))
    label = np.array([moved.decision.relabel[i] for i in index])
    recipe = relabelled(Noisy(), index, label)
    assert recipe.train_dataset().tensors[1][index].tolist() == label.tolist()
    assert numbers(moved.outcome, "cleaned") == [by_hand(first, (), recipe)]
    assert "random, loss and margin drop 4 samples" in moved.outcome.notes[-1]
    lighter = clean(done, Noisy(), downweight=10, retrain=1, **SERIAL)
    weights = lighter.decision.weights
    training = retrain_subset(Noisy(), CPU, np.arange(45), weights=weights)
    assert isinstance(training, WeightedTraining)
    assert numbers(lighter.outcome, "cleaned") == [measured(training)]
    assert numbers(lighter.outcome, "cleaned") != numbers(lighter.outcome, "before")


def test_killed_and_resumed_it_says_the_same(made, dropped, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "run")
    again = open_run(tmp_path / "run")
    for stage in ("clean/retrain", "clean/outcome", "clean"):
        again.directory.drop(stage)
    shutil.rmtree(tmp_path / "run" / "decisions")
    does, calls, died = CleanedWork.do, [], []

    def killed(self, directory, unit, report):
        calls.append(unit.name)
        if len(calls) == 5 and not died:
            died.append(unit.name)
            raise KeyboardInterrupt
        return does(self, directory, unit, report)

    monkeypatch.setattr(CleanedWork, "do", killed)
    asked = {"drop": "flagged", "retrain": 2, "papers_reading": True, **SERIAL}
    with pytest.raises(KeyboardInterrupt):
        clean(again, Noisy(), **asked)
    assert read_outcome(again, dropped.decision.name) is None
    assert verify(again).ok
    found = clean(again, Noisy(), **asked)
    assert found.outcome == dropped.outcome
    assert {unit for unit in calls if calls.count(unit) > 1} == set(died)  # no other was begun twice
    table = layout.decision(dropped.decision.name, layout.OUTCOME_TABLE)
    assert pq.read_table(again.directory.path(table)).equals(
        pq.read_table(open_run(made).directory.path(table))
    )
    rows = pq.read_table(again.directory.path(table)).to_pylist()
    shared = {row["unit"] for row in rows if row["arm"] in ("before", "exact")}
    calls.clear()
    clean(again, Noisy(), drop=3, retrain=2, **SERIAL)
    assert len(calls) >= 4  # cleaned and random at least are others
    assert not set(calls) & shared


def test_as_many_go_by_loss_and_by_margin(made):
    done = open_run(made)
    visits = done.visits()
    highest = np.argsort(-visits.loss.mean(0, dtype=np.float64), kind="stable")
    lowest = np.argsort(visits.margin.mean(0, dtype=np.float64), kind="stable")
    size = next(k for k in range(2, 45) if set(highest[:k]) != set(lowest[:k]))
    found = clean(done, Noisy(), drop=size, retrain=1, **SERIAL).outcome
    assert numbers(found, "loss") == [by_hand(3, highest[:size])]
    assert numbers(found, "margin") == [by_hand(3, lowest[:size])]
    assert found.notes == ()


def test_a_visit_that_was_not_counts_for_nothing():
    loss = np.arange(12, dtype=np.float32).reshape(3, 4)
    loss[0, 1] = loss[:, 3] = np.nan

    class Run:
        def visits(self):
            return Visits(loss=loss, margin=None, other=None, probability=None, loss_dtype="float32")

    assert mean_over_visits(Run(), "loss")[:3].tolist() == [4, 7, 6]
    assert np.isnan(mean_over_visits(Run(), "loss")[3])
    assert mean_over_visits(Run(), "margin") is None


def test_arms_that_cannot_be_are_left_out_and_said(tmp_path):
    spec = {"mode": "adjoint", "targets": "mean", "visits": "off", **SERIAL}
    done = run(RunSpec(recipe=Small(), out=str(tmp_path / "r"), **spec))
    found = clean(done, Small(), list=[1, 2], drop="flagged", retrain=1, **SERIAL).outcome
    assert [one.arm for one in found.arms] == ["before", "cleaned", "random"]
    assert found.notes == (
        "no arm loss: the record of this run keeps no loss of each visit",
        "no arm margin: the record of this run keeps no margin of each visit",
        "no arm exact: the run knows of no wrong labels",
    )
    assert found.arms[0].accuracy.std is None  # one seed has no spread
    with pytest.raises(SpecError, match="needs a run with known wrong labels"):
        clean(done, Small(), list=[1, 3], drop="flagged", retrain=1, papers_reading=True, **SERIAL)


def test_only_test_samples_that_did_not_select_judge(made):
    done = open_run(made)
    given = done.samples()["label"].to_numpy().astype(int)
    judging = (1, 5, 6, 11)
    selecting = tuple(j for j in range(12) if j not in judging)
    put_detection(done, given, np.arange(45), name="split", by="harm", selecting=selecting, judging=judging)
    found = clean(done, Noisy(), detection="split", drop=2, retrain=1, **SERIAL)
    losses = losses_of(retrain_subset(Noisy(), CPU, np.arange(43)), np.array(judging))
    assert found.outcome.judging == 4
    assert numbers(found.outcome, "cleaned") == [(float(losses.correct.mean()), float(losses.loss.mean()))]
    done.directory.drop("detect", "split")


def test_recorded_steps_can_be_repeated_with_other_weights(made):
    done = open_run(made)
    found = clean(done, Noisy(), drop=4, name="repeated", retrain=1, way="rescaled", **SERIAL)
    weights = found.decision.weights * (45 / 41)
    expected = measured(retrain_weighted(Noisy(), CPU, done.trajectory(), weights))
    assert numbers(found.outcome, "cleaned") == [expected]
    with pytest.raises(InputError, match="has none with seed 4; use --way subset"):
        clean(done, Noisy(), drop=4, retrain=2, way="weighted", **SERIAL)
    with pytest.raises(SpecError, match="other labels need --way subset"):
        clean(done, Noisy(), relabel=4, retrain=1, way="rescaled", **SERIAL)


def test_what_cannot_be_retrained_is_refused_before_anything_is_trained(made, tmp_path):
    done = open_run(made)
    with pytest.raises(SpecError, match="--retrain -1: must be 0 or more"):
        clean(done, Noisy(), drop=4, retrain=-1)
    with pytest.raises(SpecError, match="add --retrain K"):
        clean(done, Noisy(), drop=4, papers_reading=True)
    with pytest.raises(InputError, match="is not imported unasked"):
        clean(done, drop=4, retrain=1)

    class Drawn(Small):
        def train_dataset(self):
            dataset = super().train_dataset()
            dataset.tensors[0][0] += self.seed
            return dataset

    other = run(RunSpec(recipe=Drawn(), out=str(tmp_path / "r"), mode="adjoint", targets="mean", **SERIAL))
    with pytest.raises(RecipeError, match="the training samples with seed 4 are not those with seed 3"):
        clean(other, Drawn(), list=[1], drop="flagged", retrain=2, **SERIAL)


def test_verify_finds_an_outcome_that_is_not_that_of_its_retrainings(made, dropped, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    done, name = open_run(tmp_path / "run"), dropped.decision.name
    unit = pq.read_table(done.directory.path(layout.decision(name, layout.OUTCOME_TABLE)))["unit"][0].as_py()
    path = layout.retrained(unit)
    table = pq.read_table(done.directory.path(path))
    changed = table.set_column(2, table.schema.field("loss"), [table["loss"].to_numpy() + 0.5])
    pq.write_table(changed, done.directory.path(path))
    done.directory.commit(
        "clean/retrain", unit, [path], done.directory.manifest("clean/retrain", unit).values
    )
    assert any(f"loss of before, seed 3, is not that of {path}" in line for line in verify(done).problems)
    done.directory.drop("clean/retrain", unit)
    assert any(f"{unit} is no retraining of this run" in line for line in verify(done).problems)


@pytest.mark.ray
def test_on_ray_it_says_the_same(made, dropped, tmp_path, warm_ray):
    shutil.copytree(made, tmp_path / "run")
    again = open_run(tmp_path / "run")
    again.directory.drop("clean/retrain")
    again.directory.drop("clean/outcome")
    placed = {"executor": "ray", "address": warm_ray, "device": "cpu", "workers": 2}
    found = clean(again, Noisy(), drop="flagged", retrain=2, papers_reading=True, **placed)
    assert found.outcome == dropped.outcome
