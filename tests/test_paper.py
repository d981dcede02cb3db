"""The papers' experiments run at their quick scale, go on where they were, and count what they say they count."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hydra_pipe.storage.errors import RecipeError
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.cases import made_up
from benchmarks.paper import cleaning, clusters, found, maps, tasks
from benchmarks.paper.command import EXPERIMENTS, parse
from benchmarks.paper.outcome import number, spread
from benchmarks.paper.steps import Steps


@pytest.fixture
def few_images(monkeypatch):
    """Random images in the place of Fashion-MNIST, whose files need not be there and take seconds to unpack."""
    real = tasks._cached

    def cached(kind, part, data_dir):
        images = kind in (tasks.PaperClothes, tasks.OnValidation)
        return made_up((1, 28, 28), 10, 600) if images else real(kind, part, data_dir)

    monkeypatch.setattr(tasks, "_cached", cached)
    monkeypatch.setattr(found, "_whole", lambda train, data_dir: made_up((1, 28, 28), 10, 60_000))


def run(name, folder):
    """Run an experiment at its quick scale; return what it wrote and what it printed."""
    out = io.StringIO()
    words = ["paper", name, "--scale", "quick", "--work", str(folder / "work"), "--results", str(folder)]
    main(words, Console(file=out, width=150))
    return json.loads((folder / f"{name}.json").read_text()), out.getvalue()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_runs_and_goes_on_where_it_was(name, tmp_path, few_images):
    first, _ = run(name, tmp_path)
    assert first["scale"] == "quick"
    assert all(len(row) == len(table["columns"]) for table in first["tables"] for row in table["rows"])
    assert first["tables"][0]["rows"]
    for picture in first["pictures"]:
        assert (tmp_path / "work" / "quick" / "figures" / picture).stat().st_size < 200_000
    again, printed = run(name, tmp_path)
    assert "0 steps done" in printed
    assert again["tables"] == first["tables"]
    assert again["seconds"] == first["seconds"]


def test_a_step_is_done_again_for_other_parameters_or_a_damaged_file(tmp_path):
    asked = []

    def work():
        asked.append(1)
        return {"value": len(asked), "row": np.arange(3.0)}

    steps = Steps(tmp_path)
    assert steps.do("a", {"seed": 0}, work)["value"] == 1
    kept = Steps(tmp_path).do("a", {"seed": 0}, work)
    assert (kept["value"], kept["row"].tolist()) == (1, [0, 1, 2])
    assert Steps(tmp_path).do("a", {"seed": 1}, work)["value"] == 2
    (tmp_path / "a.json").write_text('{"parameters": {"se')
    assert Steps(tmp_path).do("a", {"seed": 1}, work)["value"] == 3
    with pytest.raises(ZeroDivisionError):
        steps.do("b", {}, lambda: 1 / 0)
    assert not (tmp_path / "b.json").exists()


def test_labels_are_wrong_class_by_class(few_images):
    recipe = cleaning.noisy_task("fashion-mnist", 0.8, {"samples": 300, "epochs": 1})
    dataset = recipe.train_dataset()
    given, right = dataset.targets.numpy(), dataset.original_targets.numpy()
    size, wrong = (np.bincount(labels, minlength=10) for labels in (right, right[given != right]))
    assert wrong.tolist() == (0.8 * size).astype(int).tolist()
    assert len(recipe.validation_dataset()) == 300  # of 600 for 600: in proportion


def test_both_normalisations_of_the_class_map():
    raw = np.array([[4.0, -1.0], [0.0, 2.0]])
    printed = maps.as_printed(raw)  # row sums 3, 2; column sums 4, 1
    assert printed == pytest.approx(raw / np.sqrt([[12.0, 3.0], [8.0, 2.0]]))
    assert np.isnan(maps.as_printed(np.array([[1.0, -3.0], [0.0, 1.0]]))).tolist() == [
        [True, False],
        [False, True],
    ]
    scaled = (raw - raw.mean()) / raw.std()
    rows, columns = np.linalg.norm(scaled, axis=1), np.linalg.norm(scaled, axis=0)
    assert maps.as_coded(raw)[0, 1] == pytest.approx(scaled[0, 1] / np.sqrt(rows[0] * columns[1]))
    judged = maps.judge(raw, [(0, 1)])
    assert (judged["rows"], judged["columns"], judged["undefined"]) == (2, 2, 0)
    assert judged["pairs"] == {"0-1": [1, 2]}
    assert maps.judge(printed * np.nan, [(0, 1)])["rows"] is None


def test_each_arm_drops_as_many_as_are_wrong():
    wrong, suspicion = np.array([1, 4, 5]), np.arange(10.0)
    arms = cleaning.choices({"upwards": suspicion}, wrong, 10)
    assert {arm: len(kept) for arm, kept in arms.items()} == {
        "nothing": 10,
        "at random": 7,
        "upwards": 7,
        "exactly the wrong ones": 7,
    }
    assert arms["upwards"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert not np.isin(wrong, arms["exactly the wrong ones"]).any()


def test_clusters_are_named_with_the_truth_and_without():
    given = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    wrong = np.array([False, False, True, True, True, True, False, False])
    suspicion = np.array([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0])  # the wrong way round in class 1
    judged = clusters.judged(suspicion, given, wrong)
    assert judged["named"] == [100, 100]
    assert judged["told"] == [50, 50]


def test_the_listed_samples_come_first(few_images):
    dataset = found.Listed(train_size=30).train_dataset()
    assert dataset.source_index[:18].tolist() == list(found.WRONG)
    assert not np.isin(dataset.source_index[18:], found.WRONG).any()


def test_missing_files_are_said_and_nothing_is_run(tmp_path, monkeypatch):
    def missing(*_):
        raise RecipeError("no such file")

    monkeypatch.setattr(tasks, "_cached", missing)
    sizes = {**maps.SIZES["figure2"]["quick"], "data": {"mnist": None}}
    outcome = maps.experiment("figure2", sizes, Steps(tmp_path), tmp_path)
    assert outcome.notes == ["mnist: left out, its files are not there"]
    assert not outcome.tables[0].rows


def test_names_and_sizes_are_checked(capsys):
    with pytest.raises(SystemExit):
        parse(["figure9"])
    assert "figure2" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has no size 'seed'"):
        main(["paper", "found", "--size", "seed=1"])
    with pytest.raises(SystemExit, match="no Python literal"):
        main(["paper", "found", "--size", "seeds=many words"])


def test_numbers_as_text():
    assert [number(v) for v in (None, 0.5, 1e-7, 3, "x")] == ["–", "0.50", "1e-07", "3", "x"]
    assert spread([0.5, 0.7], 100) == "60.00 ± 14.14"
    assert spread([0.5]) == "0.50"


def test_the_record_stands_for_training_on_all_samples_again(tmp_path, few_images):
    recipe = cleaning.noisy_task("fashion-mnist", 0.5, {"samples": 96, "epochs": 1})
    run, _ = Steps(tmp_path).attributed("run", recipe=recipe, test=10)
    parts = {"all": np.arange(600), "some": np.arange(7)}
    again = tasks.retrained(recipe, np.arange(96), seed=recipe.seed, parts=parts)
    assert tasks.recorded(run, recipe, parts=parts) == again
