"""The command clean: tables that fit, documents, the check, and usage that is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from hydra_pipe.cli import main

from hydra_pipe import open_run
from tests.put_detection import put_detection

RUN = (
    *("run", "digits", "--set", "train_size=60", "--set", "test_size=20", "--set", "label_noise=0.2"),
    *("--epochs", "1", "--mode", "adjoint", "--targets", "mean", "--executor", "serial", "--quiet"),
)


def call(*words: str, code: int = 0):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == code, done.output + done.stderr
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("clean") / "r"
    call(*RUN, "--out", place)
    done = open_run(place)
    given = done.samples()["label"].to_numpy().astype(int)
    put_detection(done, given, -given + np.linspace(0, 0.5, 60), suggested=(given + 1) % 10, flagged=8)
    return place


@pytest.fixture
def there(made, tmp_path):
    shutil.copytree(made, tmp_path / "r")
    return tmp_path / "r"


def test_the_table_shows_classes_warnings_and_arms(there):
    """The most suspicious ones are all of class 0: that class loses more than half."""
    done = call(
        "clean", there, "--drop", "8", "--retrain", "2", "--papers-reading", "--quiet", "--executor", "serial"
    )
    lines = done.stdout.splitlines()
    assert max(map(len, [line for line in lines if str(there) not in line])) <= 100
    assert any(line.startswith("warning: class 0 loses") for line in lines)
    assert "8 dropped of 60 samples" in done.stdout
    assert "after the last epoch, 2 seeds, on 20 test samples (trained subset)" in done.stdout
    (row,) = [line for line in lines if line.startswith("cleaned")]
    assert "±" in row
    assert "to random (95%)" in done.stdout
    for arm in ("before", "random", "exact", "true-labels", "random-true-labels"):
        assert any(line.split()[:1] == [arm] for line in lines), arm


def test_documents_hold_all_of_it(there):
    words = ("clean", there, "--relabel", "--cut", "10%", "--name", "mine", "--quiet")
    found = json.loads(call(*words, "--format", "json").stdout)
    assert (found["name"], found["outcome"]) == ("mine", None)
    assert found["decision"]["relabelled"] == 6
    assert found["decision"]["cut"] == "10%"
    assert sum(row["relabelled"] for row in found["classes"]) == 6
    assert len(found["decision"]["labels_sha256"]) == 64
    rows = list(csv.DictReader(io.StringIO(call(*words, "--format", "csv").stdout)))
    assert [int(row["before"]) for row in rows] == [row["before"] for row in found["classes"]]
    retrained = ("clean", there, "--downweight", "--retrain", "1", "--executor", "serial", "--quiet")
    arms = list(csv.DictReader(io.StringIO(call(*retrained, "--format", "csv").stdout)))
    assert [row["arm"] for row in arms][:3] == ["before", "cleaned", "random"]
    assert float(arms[1]["accuracy_mean"]) <= 1
    assert arms[1]["accuracy_low"] == ""
    outcome = json.loads(call(*retrained, "--format", "json").stdout)["outcome"]
    assert outcome["arms"][1]["accuracies"] == [float(arms[1]["accuracy_mean"])]


def test_check_says_whether_a_decision_is_for_these_data(there, tmp_path):
    call("clean", there, "--drop", "flagged", "--name", "mine", "--quiet")
    folder = there / "decisions" / "mine"
    assert "is for these data: all 60 labels" in call("clean", there, "--check", "mine").stdout
    assert json.loads(call("clean", there, "--check", folder, "--format", "json").stdout)["fits"] is True
    assert (
        call("clean", there, "--check", folder, "--format", "csv").stdout.splitlines()[1].endswith(",60,True")
    )
    other = [word.replace("label_noise=0.2", "label_noise=0.4") for word in RUN]
    call(*other, "--out", tmp_path / "other")
    done = call("clean", tmp_path / "other", "--check", folder, code=1)
    assert done.stderr.startswith("error: decision mine was made for other data: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 1, "exactly one of --drop, --relabel and --downweight"),
        (("--drop", "5%", "--downweight"), 1, "not --drop and --downweight"),
        (("--drop", "500"), 1, "--drop 500: must be flagged, a share above 0"),
        (("--drop", "5%", "--detection", "none"), 1, "has no detection 'none'; it has harm"),
        (("--drop", "5%", "--cut", "3"), 2, "--cut belongs to --relabel and --downweight"),
        (("--check", "mine", "--drop", "5%"), 2, "--check decides nothing"),
        (("--check", "mine"), 1, "manifest.json is missing"),
        (("--drop", "5%", "--way", "best"), 2, "'best' is not one of"),
        (("--drop", "5%", "--retrain", "-2"), 1, "must be 0 or more seeds"),
    ],
)
def test_what_is_wrong_is_one_line(made, words, code, said):
    done = call("clean", made, *words, code=code)
    assert said in done.stderr
    if code == 1:
        assert len(done.stderr.splitlines()) == 1
    assert not (made / "decisions").exists()
