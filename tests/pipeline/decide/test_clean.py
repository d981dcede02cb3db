"""clean: what is written, for which data, from what, and what verify and a new record make of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.pipeline.decide.clean import check_decision
from hydra_pipe.pipeline.reading.decisions import decision_names
from hydra_pipe.pipeline.reading.stage_states import stage_state
from hydra_pipe.pipeline.reading.unit_values import DecisionValues
from hydra_pipe.storage import layout
from hydra_pipe.storage.documents import dump
from hydra_pipe.storage.errors import CorruptStore, IncompleteStage, InputError, SpecError, SpecMismatch
from hydra_pipe.storage.files import digest
from hydra_pipe.storage.typed import to_json
from hydra_pipe.workers.recipes.digits import Digits
from torch.utils.data import Subset

from hydra_pipe import RunSpec, clean, load_decision, open_run, read_decision, run, verify
from tests.put_detection import put_detection
from tests.recipes import Small

FILES = ["decision.csv", "decision.parquet", "drop.txt", "keep.txt", "manifest.json", "weights.npy"]
SERIAL = {"executor": "serial", "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a detection that looked at its test samples, and the labels."""
    place = tmp_path_factory.mktemp("clean") / "run"
    done = run(RunSpec(recipe=Small(), out=str(place), mode="adjoint", targets="mean", **SERIAL))
    given = done.samples()["label"].to_numpy().astype(int)
    suspicion = np.random.default_rng(0).normal(size=len(given))
    put_detection(done, given, suspicion, suggested=(given + 1) % 3, flagged=6, method="hydra-mean")
    return place


@pytest.fixture
def there(made, tmp_path):
    """A copy of it."""
    shutil.copytree(made, tmp_path / "run")
    return open_run(tmp_path / "run")


def text(*parts: str) -> str:
    return Path(*parts).read_text()


def labels(of) -> np.ndarray:
    return of.samples()["label"].to_numpy().astype(int)


def test_what_other_tools_read_says_what_was_decided(there):
    found = clean(there, drop="flagged").decision
    assert found.name == "harm-drop-flagged"
    folder = there.directory.path("decisions", found.name)
    assert sorted(os.listdir(folder)) == FILES
    worst = sorted(there_first(there, 6))
    assert found.drop.tolist() == worst
    assert [int(line) for line in text(folder, "drop.txt").split()] == worst
    assert [int(line) for line in text(folder, "keep.txt").split()] == found.keep.tolist()
    assert sorted([*found.drop, *found.keep]) == list(range(45))
    weights = np.load(f"{folder}/weights.npy")
    assert weights.dtype == np.float64
    assert (weights == (~np.isin(np.arange(45), worst))).all()
    rows = pq.read_table(f"{folder}/decision.parquet")
    assert rows["train_index"].to_pylist() == list(range(45))
    assert set(rows["method"].to_pylist()) == {"harm"}
    assert rows["source_index"].to_pylist() == [-1] * 45
    of_csv = pa_csv.read_csv(f"{folder}/decision.csv")
    assert of_csv.column_names == rows.column_names
    assert of_csv["weight"].to_pylist() == rows["weight"].to_pylist()
    manifest = json.loads(text(folder, "manifest.json"))
    assert {
        "run": there.uri,
        "rule": "drop",
        "cut": "flagged",
        "n_train": 45,
        "dropped": 6,
    }.items() <= manifest.items()
    assert sum(one["before"] for one in manifest["classes"]) == 45
    assert verify(there).ok


def there_first(of, count: int) -> list[int]:
    table = pq.read_table(of.directory.path("detections", "harm", "part-all.parquet"))
    return table["train_index"].to_pylist()[:count]


def test_relabel_and_downweight_write_labels_and_weights(there):
    relabelled = clean(there, relabel=4).decision
    worst = sorted(there_first(there, 4))
    lines = text(relabelled.folder, "relabel.csv").splitlines()
    assert lines == ["train_index,label", *(f"{i},{(labels(there)[i] + 1) % 3}" for i in worst)]
    expected = labels(there)
    expected[worst] = (expected[worst] + 1) % 3
    assert relabelled.relabelled(labels(there)).tolist() == expected.tolist()
    assert relabelled.drop.tolist() == []
    lighter = clean(there, downweight="20%").decision
    assert lighter.name == "harm-downweight-20pct"
    assert lighter.weights.mean() == pytest.approx(1)
    assert np.flatnonzero(lighter.weights < 1).tolist() == sorted(there_first(there, 9))
    assert decision_names(there) == ["harm-downweight-20pct", "harm-relabel-4"]
    assert verify(there).ok


def test_the_same_again_writes_nothing_and_another_of_the_name_is_refused(there):
    first = clean(there, drop=5, name="mine").decision
    before = os.stat(f"{first.folder}/keep.txt").st_mtime_ns
    assert clean(there, drop=5, name="mine").decision.values == first.values
    assert os.stat(f"{first.folder}/keep.txt").st_mtime_ns == before
    with pytest.raises(SpecMismatch, match=r"another decision 'mine' \(drop 5 of harm, 5 dropped\)"):
        clean(there, drop=6, name="mine")
    assert clean(there, relabel=3, name="mine", overwrite=True).decision.relabel
    again = clean(there, drop=6, name="mine", overwrite=True).decision
    assert sorted(os.listdir(again.folder)) == FILES  # no relabel.csv of the one before
    assert verify(there).ok
    with pytest.raises(SpecError, match="the retrainings lie there"):
        clean(there, drop=6, name="retrain")
    with pytest.raises(SpecError, match="no valid name"):
        clean(there, drop=6, name="../up")


def test_what_the_recipe_adds_makes_no_other_decision(there):
    """Only with the recipe are the places in the user's files known; a split makes another decision."""

    class Placed(Small):
        def train_dataset(self):
            dataset = super().train_dataset()
            dataset.source_index = np.arange(45) + 100
            return dataset

    there.directory.update(
        lambda _: {**there.info, "made_of": {}}
    )  # what a run of before there were digests has
    again = open_run(there.uri)
    bare = clean(again, drop=5).decision
    assert bare.values.notes == ("labels are those of the run; source_index is not known without the recipe",)
    placed = clean(again, Placed(), drop=5).decision
    assert placed.table["source_index"].to_pylist() == list(range(100, 145))
    assert placed.keep.tolist() == bare.keep.tolist()
    split = {"selecting": (0, 1), "judging": tuple(range(2, 12)), "method": "hydra-mean"}
    suspicion = np.random.default_rng(0).normal(size=45)
    put_detection(again, labels(again), suspicion, flagged=6, **split)
    with pytest.raises(SpecMismatch, match="has another decision 'harm-drop-5'"):
        clean(again, Placed(), drop=5)


def test_a_run_may_lie_elsewhere():
    spec = RunSpec(recipe=Small(), out="memory://clean/run", mode="adjoint", targets="mean", **SERIAL)
    done = run(spec)
    for name in ("one", "two"):
        put_detection(done, labels(done), np.arange(45), name=name)
    assert clean(done, Small(), drop=2, retrain=1, **SERIAL).outcome.arms[1].samples == 43
    assert load_decision("memory://clean/run/decisions/one-drop-2").drop.tolist() == [43, 44]
    assert verify(done).ok


def test_a_decision_stands_alone_and_belongs_to_its_labels(there, tmp_path):
    clean(there, drop=5, name="mine")
    shutil.copytree(there.directory.path("decisions", "mine"), tmp_path / "copy")
    copy = load_decision(str(tmp_path / "copy"), labels=labels(there))
    assert copy.keep.tolist() == read_decision(there, "mine").keep.tolist()
    other = labels(there)
    other[7] = (other[7] + 1) % 3
    with pytest.raises(SpecMismatch, match=r"1 of 45 labels differ \(train_index 7 has label") as caught:
        load_decision(str(tmp_path / "copy"), labels=other)
    assert "copy was made for other data" in str(caught.value)
    with pytest.raises(SpecMismatch, match="45 labels, and these are 44"):
        copy.check(labels(there)[:-1])
    with pytest.raises(InputError, match="give one integer a training sample"):
        copy.check(np.zeros(45))
    with pytest.raises(SpecMismatch, match="made for other data"):
        copy.relabelled(other)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_is_not_whole_is_refused(there, name):
    folder = clean(there, drop=5).decision.folder
    address = os.path.join(folder, name)
    content = Path(address).read_bytes()
    with open(address, "ab") as file:
        file.write(b"\n17\n")
    with pytest.raises(CorruptStore, match=name):
        load_decision(folder)
    os.unlink(address)
    with pytest.raises(IncompleteStage, match=f"{name} is missing"):
        load_decision(folder)
    with open(address, "wb") as file:
        file.write(content)
    assert load_decision(folder).values.dropped == 5


def test_the_detection_is_chosen_and_said(there):
    heard = []
    given = labels(there)
    put_detection(there, given, np.arange(45), name="margin")
    assert clean(there, drop=1, observer=heard.append).decision.drop.tolist() == [44]
    assert "detection margin is taken, the best of 2 that needs no choice (harm, margin)" in heard[0].message
    put_detection(there, given, -np.arange(45), name="joint")
    assert clean(there, drop=1, observer=heard.append).decision.drop.tolist() == [0]
    assert "detection joint is taken, the best of 3" in heard[-1].message
    assert clean(there, drop=1, detection="margin").decision.name == "margin-drop-1"
    with pytest.raises(IncompleteStage, match="has no detection 'knn'; it has harm, joint, margin"):
        clean(there, drop=1, detection="knn")
    with pytest.raises(SpecError, match="--detection and --list both"):
        clean(there, drop="flagged", detection="margin", list=[1])
    there.directory.drop("detect")
    with pytest.raises(
        IncompleteStage, match="no detection to decide upon; make one with `hydra-pipe detect"
    ):
        clean(there, drop="flagged")


def test_a_list_needs_no_detection(there, tmp_path):
    there.directory.drop("detect")
    file = tmp_path / "bad.txt"
    file.write_text("30\n2\n")
    found = clean(there, list=str(file), drop="flagged").decision
    assert found.name == "list-drop-flagged"
    assert found.drop.tolist() == [2, 30]
    assert found.values.by == "list"
    assert found.values.detection is None
    assert "not known here" in found.values.trust
    row = found.table.slice(30, 1).to_pylist()[0]
    assert (row["reason"], row["is_label_issue"], row["action"]) == ("listed", True, "drop")
    assert verify(there).ok
    with pytest.raises(SpecError, match="no such file"):
        clean(there, list=str(tmp_path / "none.txt"), drop="flagged")


def test_what_was_not_judged_is_kept(there):
    given = labels(there)
    some = np.arange(0, 45, 3)
    put_detection(there, given, np.arange(15), name="some", tracked=some)
    found = clean(there, detection="some", drop="20%").decision
    assert found.drop.tolist() == [36, 39, 42]  # 20% of 15
    rows = found.table.to_pandas()
    assert (rows["rank"] == 0).sum() == 30
    assert rows.loc[rows["rank"] == 0, ["suspicion", "label_score"]].isna().all().all()
    assert (rows.loc[rows["rank"] == 0, "action"] == "keep").all()


def test_a_detection_for_other_labels_is_refused(there):
    given = labels(there)
    other = given.copy()
    other[3] = (other[3] + 1) % 3
    put_detection(there, other, np.arange(45), name="other")
    with pytest.raises(
        SpecMismatch, match=r"detection other was made for other labels: 1 of 45 differ \(train_index 3 "
    ):
        clean(there, Small(), detection="other", drop=1)
    put_detection(there, given, np.arange(45), name="sealed", labels_sha256="0" * 64)
    with pytest.raises(SpecMismatch, match="detection sealed was made for other labels"):
        clean(there, detection="sealed", drop=1)
    put_detection(there, given, np.arange(2), name="twice", tracked=[4, 4])
    with pytest.raises(CorruptStore, match="at most once"):
        clean(there, detection="twice", drop=1)


def test_the_recipe_is_needed_where_the_run_does_not_know_every_label(tmp_path):
    done = run(
        RunSpec(recipe=Small(), out=str(tmp_path / "r"), track=10, mode="adjoint", targets="mean", **SERIAL)
    )
    with pytest.raises(InputError, match="is not imported unasked"):
        clean(done, list=[1], drop="flagged")
    with_recipe = clean(done, Small(), list=[1, 44], drop="flagged").decision
    assert with_recipe.drop.tolist() == [1, 44]
    assert with_recipe.values.notes == ()


def test_another_recipe_is_refused(there):
    class Other(Small):
        def train_dataset(self):
            return super().test_dataset()

    with pytest.raises(SpecMismatch, match="what differs"):
        clean(there, Other(), list=[1], drop="flagged")


@pytest.mark.parametrize(
    ("values", "judging", "said"),
    [
        ({"method": "hydra-mean"}, None, "that selected also judge, which flatters"),
        ({"by": "margin", "method": None}, None, "looked at no test sample, and all of them judge"),
        (
            {"method": "hydra-mean", "selecting": (0, 2, 4), "judging": (1, 3)},
            (1, 3),
            "3 test samples selected and 2 others judge",
        ),
    ],
)
def test_it_says_who_selected_and_who_may_judge(there, values, judging, said):
    put_detection(there, labels(there), np.arange(45), name="split", **{"by": "harm", **values})
    found = clean(there, detection="split", drop=1).decision.values
    assert found.judging == judging
    assert said in found.trust
    assert found.selecting == (values.get("selecting") or (tuple(range(12)) if values["method"] else None))


def test_test_samples_that_the_run_never_asked_about_judge(tmp_path):
    done = run(
        RunSpec(recipe=Small(), out=str(tmp_path / "r"), test=5, mode="adjoint", targets="mean", **SERIAL)
    )
    put_detection(done, labels(done), np.arange(45), method="hydra-mean")
    found = clean(done, drop=1).decision.values
    assert (found.selecting, found.judging) == (tuple(range(5)), tuple(range(5, 12)))
    assert "5 test samples selected and the 7 others of the recipe judge" in found.trust


def test_check_says_whether_a_decision_is_for_the_data_of_a_run(there, tmp_path):
    mine = clean(there, drop=5, name="mine").decision
    assert check_decision(there, "mine").keep.tolist() == mine.keep.tolist()
    assert check_decision(there, mine.folder, Small()).keep.tolist() == mine.keep.tolist()

    class Fewer(Small):
        def train_dataset(self):
            return Subset(super().train_dataset(), range(30))

    other = run(RunSpec(recipe=Fewer(), out=str(tmp_path / "o"), mode="adjoint", targets="mean", **SERIAL))
    with pytest.raises(SpecMismatch, match="45 labels, and these are 30"):
        check_decision(other, mine.folder)
    with pytest.raises(IncompleteStage, match=r"manifest\.json is missing"):
        check_decision(other, str(tmp_path))


def test_the_place_in_the_users_files_is_that_of_the_dataset(tmp_path):
    spec = RunSpec(
        recipe="digits",
        recipe_args={"train_size": 40, "test_size": 10},
        epochs=1,
        out=str(tmp_path / "d"),
        mode="adjoint",
        targets="mean",
        **SERIAL,
    )
    done = run(spec)
    found = clean(done, list=[3, 7], drop="flagged").decision
    expected = Digits(train_size=40).train_dataset().source_index.tolist()
    assert found.table["source_index"].to_pylist() == expected
    assert found.values.recipe == "digits"


def recommitted(of, name: str, change) -> None:
    """Change files of a decision and have all manifests agree with what they are now."""
    decision = read_decision(of, name)
    values = change(decision)
    directory = of.directory
    digests = {file: digest(os.path.join(decision.folder, file))[0] for file in decision.values.sha256}
    values = replace(values, sha256=digests)
    with open(os.path.join(decision.folder, layout.DECISION_MANIFEST), "wb") as file:
        file.write(dump(to_json(values), seal=True))
    names = [layout.decision(name, file) for file in (*digests, layout.DECISION_MANIFEST)]
    directory.commit("clean", name, names, to_json(values))


def overwritten(name: str, content):
    def change(decision) -> DecisionValues:
        with open(os.path.join(decision.folder, name), "wb") as file:
            content(file)
        return decision.values

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            overwritten("keep.txt", lambda f: f.write(b"1\n2\n")),
            "keep.txt does not hold what decision.parquet says",
        ),
        (overwritten("drop.txt", lambda f: f.write(b"")), "drop.txt does not hold"),
        (
            overwritten("weights.npy", lambda f: np.save(f, np.ones(45))),
            "weights.npy does not hold the weights",
        ),
        (
            overwritten("weights.npy", lambda f: np.save(f, np.ones(4))),
            r"weights.npy holds float64 of shape \(4,\)",
        ),
        (lambda d: replace(d.values, labels_sha256="0" * 64), "the labels of decision.parquet are not those"),
        (lambda d: replace(d.values, n_train=44), "does not hold train_index 0 to 43"),
        (lambda d: replace(d.values, rule="relabel"), "relabel.csv is there without a reason, or missing"),
    ],
)
def test_verify_finds_files_that_contradict_each_other(there, change, said):
    clean(there, drop=5, name="mine")
    recommitted(there, "mine", lambda decision: decision.values)
    assert verify(there).ok
    recommitted(there, "mine", change)
    (problem,) = verify(there).problems
    assert problem.startswith("decisions/mine: ")
    assert re.search(said, problem)


def test_verify_finds_damage_strays_and_what_is_not_committed(there):
    folder = clean(there, drop=5, name="mine").decision.folder
    there.directory.drop("clean", "mine")
    found = verify(there)
    assert found.ok
    assert "clean: 6 files are not committed yet" in found.notes
    clean(there, drop=5, name="mine")
    with open(os.path.join(folder, "mine.txt"), "w") as file:
        file.write("a note")
    assert verify(there).problems == ("decisions/mine/mine.txt: no manifest lists this file; remove it",)
    os.unlink(os.path.join(folder, "mine.txt"))
    with open(os.path.join(folder, "weights.npy"), "ab") as file:
        file.write(b"x")
    assert any("decisions/mine/weights.npy" in line for line in verify(there).problems)


def test_a_decision_is_seen_in_status_and_is_no_part_of_the_run(there):
    clean(there, drop=5, name="mine")
    found = status(there)
    assert found["state"] == "complete"
    (stage,) = [one for one in found["stages"] if one["stage"] == "clean"]
    assert (stage["state"], stage["done"], stage["units"]) == ("complete", 1, 1)


def test_a_new_record_makes_decisions_void(there):
    clean(there, drop=5, name="mine")
    there.directory.drop("record")
    same = run(RunSpec(recipe=Small(), out=there.uri, mode="adjoint", targets="mean", **SERIAL))
    assert decision_names(same) == ["mine"], "the same bits make nothing void"
    (record,) = there.directory.manifests("record")
    files = [entry.path for entry in record.files]
    there.directory.commit("record", record.unit, files, {**record.values, "checked_steps": 0})
    again = run(RunSpec(recipe=Small(), out=there.uri, mode="adjoint", targets="mean", **SERIAL))
    assert decision_names(again) == []
    assert stage_state(again.directory, again.noted, "clean").state == "missing"
    with pytest.raises(IncompleteStage, match="has no decision 'mine'; it has none"):
        read_decision(again, "mine")
    assert verify(again).ok
