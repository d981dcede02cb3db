"""run.json and manifests as values: the same after a round trip, later keys kept, wrong types named."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.pipeline.reading.run_info import RunInfo, read_info
from hydra_pipe.pipeline.reading.unit_values import ReplayValues, UnitValues, values_of
from hydra_pipe.storage.errors import CorruptStore
from hydra_pipe.storage.rundir import Manifest

from hydra_pipe import RunSpec, open_run, run, verify
from tests.recipes import Small


@pytest.fixture
def place(tmp_path):
    run(RunSpec(recipe=Small(), out=str(tmp_path / "r"), executor="serial", shards=2))
    return tmp_path / "r"


def edit(place, change):
    info = json.loads((place / "run.json").read_text())
    info.pop("document_sha256", None)
    change(info)
    (place / "run.json").write_text(json.dumps(info))


def test_a_round_trip_changes_nothing_and_keeps_what_a_later_version_noted(place):
    def later(info):
        info["new"] = {"a": [None, 1]}
        info["methods"]["hydra"]["colour"] = "red"

    edit(place, later)
    directory = open_run(place).directory
    stored = directory.read()
    info = read_info(directory)
    assert json.loads(json.dumps(info.to_json())) == stored
    assert info.entry("hydra").rest == {"colour": "red"}
    run(RunSpec(recipe=Small(), out=str(place), executor="serial", shards=2))
    assert directory.read()["methods"]["hydra"]["colour"] == "red"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i: i["methods"]["hydra"].update(shards="two"),
            "methods.hydra.shards is 'two' and must be int",
        ),
        (lambda i: i["methods"]["hydra"].update(state="done"), "methods.hydra.state is 'done' and must be"),
        (lambda i: i.update(methods=[]), r"methods is \[\] and must be a mapping"),
        (
            lambda i: i["stages"]["record"].update(seconds="1 s"),
            "stages.record.seconds is '1 s' and must be float",
        ),
        (lambda i: i.update(n_train=4.5), "n_train is 4.5 and must be int"),
        (
            lambda i: i["trust"]["hydra"]["law"].pop("checked"),
            "trust.hydra.law.checked is None and must be there",
        ),
    ],
)
def test_a_wrong_type_is_refused_by_field_everywhere(place, change, message):
    edit(place, change)
    with pytest.raises(CorruptStore, match=f"run.json: {message}"):
        open_run(place)
    for words in (["status", str(place)], ["top", str(place)]):
        shown = CliRunner().invoke(main, words)
        assert shown.exit_code == 1, words
        (line,) = shown.stderr.strip().splitlines()
        assert "run.json: " in line
        assert "restore the file" in line
    verdict = CliRunner().invoke(main, ["verify", str(place), "--format", "json"])
    assert verdict.exit_code == 1
    (problem,) = json.loads(verdict.stdout)["problems"]
    assert "run.json: " in problem


def test_a_manifest_of_a_wrong_type_is_named_by_verify(place):
    directory = open_run(place).directory
    manifest = directory.manifest("hydra/replay", "shard-00001")
    assert values_of(ReplayValues, manifest).rows == values_of(UnitValues, manifest).rows
    files = [entry.path for entry in manifest.files]
    directory.commit("hydra/replay", "shard-00001", files, {**manifest.values, "rows": "many"})
    problems = verify(open_run(place)).problems
    assert any("hydra/replay shard-00001: rows is 'many' and must be int" in line for line in problems)


def test_values_of_an_older_version_are_read_as_far_as_they_go():
    manifest = Manifest(stage="hydra/replay", unit="shard-00000", files=(), values={"rows": 3})
    found = values_of(ReplayValues, manifest)
    assert (found.rows, found.law, found.ways, found.seconds) == (3, None, None, None)
    assert RunInfo.from_json({}, "there") == RunInfo()


def test_methods_are_listed_finest_targets_first():
    entries = {"hydra-mean": {"targets": "mean"}, "tracin": {}, "hydra-classes": {"targets": "classes"}}
    info = RunInfo.from_json({"methods": entries, "method": "hydra"}, "there")
    assert info.method_names() == ["hydra", "tracin", "hydra-classes", "hydra-mean"]
    assert info.coarsest(["tracin", "hydra-classes"]) == "classes"
    assert RunInfo(methods=info.methods, n_test_tracked=7).target_count("tracin") == 7


def test_a_run_that_does_not_say_its_size_is_refused_where_that_is_needed():
    with pytest.raises(CorruptStore, match=r"run\.json has no n_train; restore"):
        RunInfo().training_size  # noqa: B018
