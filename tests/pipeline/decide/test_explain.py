"""Explanations against the contributions themselves, and what is refused."""

# ruff: noqa: F811
from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.storage.errors import IncompleteStage, InputError, RecipeError

from hydra_pipe import Explanation, explain
from tests.builders import NOISY, Built, M, N
from tests.end_to_end.support import cli, serial
from tests.pipeline.decide.reported import ATTACKS, Words, detect, digits, words  # noqa: F401


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    made = Built(tmp_path_factory.mktemp("explained") / "digits").build()
    detect(open_run(made.uri))
    return made


def test_a_prediction_has_its_proponents_and_opponents(built):
    found = explain(built.uri, test=3, k=4)
    values = built.contributions[:, 1].astype(float)  # test_index 3 is the second
    order = np.argsort(-values)
    assert [one.train_index for one in found.helpful] == order[:4].tolist()
    assert [one.train_index for one in found.harmful] == order[::-1][:4].tolist()
    assert np.allclose([one.contribution for one in found.helpful], values[order[:4]])
    assert found.helpful[0].share == pytest.approx(values.max() / np.abs(values).sum())
    assert found.helpful[0].share_of_side == pytest.approx(values.max() / values[values > 0].sum())
    assert found.harmful[0].share_of_side == pytest.approx(values.min() / values[values < 0].sum())
    assert found.totals.sum == pytest.approx(values.sum())
    assert found.totals.pairs == N
    assert sum(one.totals.pairs for one in found.by_class) == N
    assert found.by_class[2].totals.sum == pytest.approx(values[built.train_label == 2].sum())
    assert sum(found.histogram.counts) == N
    ranks = open_run(built.uri).directory  # the detection ranks every sample once
    assert ranks is not None
    assert all(1 <= one.suspicion_rank <= N for one in found.helpful)
    subject = found.subject
    assert (subject.label, subject.predicted, subject.loss) == (1, 1, pytest.approx(0.2))
    assert subject.label_confidence == pytest.approx(np.exp(-0.2))
    assert any("no pictures" in note for note in found.notes)


def test_a_training_sample_is_held_against_every_test_sample(built):
    found = explain(built.uri, train=7, k=2)
    values = built.contributions[7].astype(float)
    assert found.helpful[0].test_index == built.tested[values.argmax()]
    assert found.harmful[0].test_index == built.tested[values.argmin()]
    assert found.totals.pairs == M
    assert found.by_class[0].totals.sum == pytest.approx(values[built.test_label == 0].sum())
    assert found.subject.original_label == int(NOISY[1][1])
    assert found.subject.suspicion_rank is not None


def test_classes_and_sets_are_summed(built):
    found = explain(built.uri, classes=(1, 2), k=3)
    block = built.contributions[np.ix_(built.train_label == 1, built.test_label == 2)].astype(float)
    assert found.totals.sum == pytest.approx(block.sum())
    assert found.totals.pairs == block.size
    assert found.helpful[0].contribution == pytest.approx(block.max())
    assert found.harmful[0].contribution == pytest.approx(block.min())
    sets = explain(built.uri, train_set=[2, 5, 5 - 1], test_set=[1, 11])
    assert sets.totals.sum == pytest.approx(
        built.contributions[np.ix_([2, 4, 5], [0, 5])].astype(float).sum()
    )
    assert sets.totals.pairs == 6


@pytest.mark.parametrize(
    "asked", [{"test": 3}, {"train": 7}, {"classes": (1, 2)}, {"train_set": [1], "test_set": [3]}]
)
def test_the_query_gives_the_same_numbers(built, asked):
    found = explain(built.uri, k=50, **asked)
    rows = duckdb.sql(found.query).fetchall()
    assert len(rows) == found.totals.pairs
    best = found.helpful[0] if found.helpful else found.harmful[-1]
    assert rows[0][:2] == (best.train_index, best.test_index)
    assert "hydra-pipe explain" in found.command


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "nothing is asked"),
        ({"test": 1, "train": 2}, "test and train are asked"),
        ({"test": 2}, "test sample 2 is not in .* holds 6, from 1 to 11"),
        ({"test": 3, "k": 0}, "k is 0"),
        ({"train": 99}, "training sample 99 is not in"),
        ({"classes": (0, 9)}, "class 9: .* test samples of classes 0, 1, 2"),
        ({"train_set": [1]}, "train_set is given alone"),
        ({"train_set": [1, 50], "test_set": [1]}, "50"),
        ({"test": 3, "method": "tracin"}, "no method 'tracin'"),
        ({"test": 3, "pictures": "s3://bucket/x"}, "local directory"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_line(built, asked, told):
    with pytest.raises(InputError, match=told) as caught:
        explain(built.uri, **asked)
    assert "\n" not in str(caught.value)


def test_a_detection_that_is_not_there_is_named(built):
    with pytest.raises(IncompleteStage, match="no detection 'knn'; it has margin"):
        explain(built.uri, test=3, detection="knn")


def test_a_run_without_labels_has_no_classes(tmp_path):
    made = Built(tmp_path / "bare")
    made.train_label[:], made.test_label[:] = -1, -1
    made.build()
    with pytest.raises(InputError, match="no class; use --train-set"):
        explain(made.uri, classes=(0, 1))
    found = explain(made.uri, test=3)
    assert found.subject.label_confidence is None
    assert [one.label for one in found.by_class] == [-1]


def test_coarser_targets_answer_what_they_can(tmp_path):
    arguments = {"train_size": 40, "test_size": 12}
    for targets in ("classes", "mean"):
        run = serial(
            tmp_path / "run", "digits", recipe_args=arguments, epochs=1, mode="adjoint", targets=targets
        )
    found = explain(run, train=3, method="hydra-classes")
    rows = run.contributions("hydra-classes").to_table().to_pandas().query("train_index == 3")
    assert found.totals.sum == pytest.approx(rows.contribution.sum(), rel=1e-5)
    assert {one.test_index for _, one in found.influences()} == {-1}
    assert explain(run, train=3, method="hydra-mean").totals.pairs == 1
    for asked, told in (
        ({"test": 1}, "no single test samples"),
        ({"classes": (1, 2)}, "no classes; use --method"),
    ):
        with pytest.raises(InputError, match=told):
            explain(run, method="hydra-mean", **asked)


def test_the_trained_model_is_asked_where_the_recipe_is_at_hand(digits, tmp_path):
    found = explain(digits, test=5, k=2, pictures=str(tmp_path / "pictures"))
    subject = found.subject
    store = digits.test_gradients()
    at = store.column("test_index").tolist().index(5)
    assert subject.loss == pytest.approx(float(store.column("loss")[at]), rel=1e-4)
    assert subject.label_confidence == pytest.approx(np.exp(-subject.loss), rel=1e-4)
    assert subject.predicted == store.column("prediction")[at]
    assert subject.confidence >= subject.label_confidence - 1e-9
    assert found.notes == ()
    files = [subject.picture, *(one.picture for one in found.samples)]
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in files)


def test_a_recipe_that_a_run_names_is_not_imported(words):
    found = explain(words, test=1)
    assert found.subject.text is None
    assert any("not imported unasked" in note for note in found.notes)
    shown = explain(words, Words(), test=1)
    assert shown.subject.text in ATTACKS
    assert shown.notes == ()


def test_a_recipe_of_another_size_is_refused(digits):
    with pytest.raises(RecipeError, match="samples and that of the run had 120"):
        explain(digits, "digits", test=1, recipe_args={"train_size": 60})


def test_the_command_shows_tables_json_and_csv(digits, tmp_path):
    shown = cli("explain", digits.uri, "--test", "5", "-k", "3")
    assert shown.exit_code == 0, shown.output
    assert "most helpful" in shown.stdout
    assert "by training class" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    found = json.loads(cli("explain", digits.uri, "--train", "5", "--format", "json").stdout)
    assert found["question"] == "train"
    assert set(found) == set(Explanation.__dataclass_fields__)
    rows = list(
        csv.DictReader(io.StringIO(cli("explain", digits.uri, "--classes", "1,2", "--format", "csv").stdout))
    )
    assert {row["train_label"] for row in rows} == {"1"}
    (tmp_path / "train.txt").write_text("1\n2\n")
    (tmp_path / "test.txt").write_text("3\n")
    words_ = ("--train-set", str(tmp_path / "train.txt"), "--test-set", str(tmp_path / "test.txt"))
    assert "2 contributions" in cli("explain", digits.uri, *words_).stdout
    assert cli("explain", digits.uri, "--classes", "1").exit_code == 2
    refused = cli("explain", digits.uri, "--test", "999")
    assert refused.exit_code == 1
    assert "Traceback" not in refused.output
    assert len(refused.stderr.splitlines()) == 1


def test_hostile_texts_cannot_move_the_terminal(words):
    place = f"{__file__.replace('test_explain.py', 'reported.py')}:Words"
    shown = cli("explain", words.uri, place, "--test", "5", "--detection", "margin")
    assert shown.exit_code in (0, 1)
    assert "\x1b" not in shown.output
    assert "\x00" not in shown.output
