"""The default detector: the sum of its parts, with whatever of them a run can serve."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hydra_pipe.pipeline.decide.case import Scores
from hydra_pipe.pipeline.decide.detect import default_by, detect
from hydra_pipe.pipeline.decide.joint import agreement, likeness, standardised, voted
from hydra_pipe.pipeline.decide.report_facts import gather
from hydra_pipe.pipeline.executors.events import Note
from hydra_pipe.storage.errors import InputError

from hydra_pipe import Run, RunSpec, open_run, run
from tests.recipes import Small

PLACED = {"executor": "serial", "device": "cpu"}
DIGITS = {"label_noise": 0.1, "train_size": 160, "test_size": 24}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = str(tmp_path_factory.mktemp("joint") / "run")
    return run(RunSpec(recipe="digits", recipe_args=DIGITS, epochs=1, out=out, **PLACED))


class Unlabelled(Small):
    def labels(self, dataset):
        return None


def column(found, name):
    return found.table.sort_by("train_index")[name].to_numpy()


def scores(suspicion, suggested):
    return Scores(suspicion=np.asarray(suspicion, float), suggested=np.asarray(suggested, np.int64))


def test_it_is_what_people_get_who_name_nothing(digits):
    (found,) = detect(digits, **PLACED)
    assert (default_by(), found.name, found.values.by) == ("joint", "joint", "joint")


def test_it_is_the_weighted_sum_of_its_standardised_parts(digits):
    joint, margin, knn, harmed = detect(digits, by=["joint", "margin", "knn", "harmed-class"], **PLACED)

    def z(one):
        values = column(one, "suspicion")
        return (values - values.mean()) / values.std()

    lowest = np.argsort(-column(margin, "suspicion"), kind="stable")[:16]
    label = column(margin, "suggested_label")[lowest]
    a, b = (
        np.mean((label == column(one, "suggested_label")[lowest]) & (label >= 0)) for one in (knn, harmed)
    )
    assert 0 < b < 1
    chance = sum(np.mean(digits.samples()["label"].to_numpy() == k) ** 2 for k in range(10))
    alike = (1 - column(knn, "suspicion").mean() - chance) / (1 - chance)
    assert 0 < alike < 1
    worth = max(a, alike)
    expected = z(margin) + worth * z(knn) + 0.5 * b**4 * z(harmed)
    np.testing.assert_allclose(column(joint, "suspicion"), expected, atol=1e-9)
    weights = {"margin": 1, "knn": worth, "harmed-class": 0.5 * b**4}
    assert joint.values.notes["weights"] == pytest.approx(weights)
    reason = joint.table["reason"][0].as_py()
    assert reason.startswith("margin ")
    assert "knn " in reason


def test_a_record_alone_is_judged_by_margin_and_neighbours(digits, tmp_path):
    heard = []
    bare = Path(shutil.copytree(digits.uri, tmp_path / "r"))
    for folder in ("manifests/hydra", "contributions", "samples", "interclass"):
        shutil.rmtree(bare / folder)
    (found,) = detect(str(bare), observer=heard.append, **PLACED)
    assert set(found.values.notes["weights"]) == {"margin", "knn"}
    said = [event.message for event in heard if isinstance(event, Note)]
    assert any(line.startswith("joint: without harmed-class: ") for line in said)


def test_without_visits_the_other_parts_count_as_they_are(tmp_path):
    out = str(tmp_path / "r")
    spec = RunSpec(recipe="digits", recipe_args=DIGITS, epochs=2, out=out, visits="off", **PLACED)
    (found,) = detect(run(spec), **PLACED)
    assert found.values.notes["weights"] == {"knn": 1.0, "harmed-class": 1.0}
    assert "recorded without visits" in found.values.notes["left_out"]["margin"]


def test_what_nothing_can_judge_is_refused_with_every_reason(tmp_path):
    out = str(tmp_path / "r")
    run(RunSpec(recipe=Unlabelled(), epochs=1, out=out, visits="off", **PLACED))
    with pytest.raises(InputError, match=r"margin: .*knn: .*harmed-class: "):
        detect(open_run(out), Unlabelled(), by="joint", **PLACED)


def test_parts_that_say_the_same_of_all_add_nothing():
    np.testing.assert_array_equal(standardised(np.full(4, 3.0)), np.zeros(4))
    np.testing.assert_allclose(standardised(np.array([1.0, np.nan, 3.0])), [-1, 0, 1])
    np.testing.assert_array_equal(standardised(np.full(3, np.nan)), np.zeros(3))


def test_agreement_looks_at_the_lowest_margins_alone():
    suspicion = np.arange(20, dtype=float)
    own = scores(suspicion, [0] * 18 + [1, 2])
    assert agreement(own, scores(suspicion, [5] * 18 + [1, 2])) == 1
    assert agreement(own, scores(suspicion, [0] * 19 + [2])) == 0.5
    assert agreement(own, scores(suspicion, [-1] * 20)) == 0


def test_neighbours_share_labels_between_chance_and_always():
    given = np.repeat([0, 1], 8)
    nothing = np.full(16, -1)
    assert likeness(scores(np.zeros(16), nothing), given) == 1
    assert likeness(scores(np.full(16, 0.5), nothing), given) == 0
    assert likeness(scores(np.full(16, 0.25), nothing), given) == pytest.approx(0.5)
    assert likeness(scores(np.ones(16), nothing), given) == 0
    assert likeness(scores(np.zeros(16), nothing), np.zeros(16, int)) == 0


def test_a_label_is_replaced_where_both_others_agree():
    first, second, third = np.array([1, 1, 1, -1]), np.array([2, 2, -1, 3]), np.array([2, 4, -1, 3])
    np.testing.assert_array_equal(voted([first, second, third]), [2, 1, 1, 3])
    np.testing.assert_array_equal(voted([first, second]), first)


def test_the_report_has_the_numbers_that_detect_printed(digits):
    (found,) = detect(digits, **PLACED)
    truth = gather(digits, "hydra", found, 5).truth
    measured = found.values.measures
    assert truth.auroc == measured["auroc"]["value"]
    assert truth.recall == {one["share"]: one["found"]["value"] for one in measured["recall"]}
