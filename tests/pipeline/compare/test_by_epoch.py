"""compare --every: the last epoch is what the methods of the run say, cuts and interruptions change nothing."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.pipeline.compare.by_epoch import Course, by_epoch, read_by_epoch
from hydra_pipe.pipeline.compare.compare import compare
from hydra_pipe.pipeline.executors import events
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage import layout
from hydra_pipe.storage.errors import (
    DoesNotFit,
    EstimatorDiverged,
    IncompleteStage,
    InputError,
    NegativeCurvature,
    SpecError,
    SpecMismatch,
)

from tests.recipes import Small, TwoGroups

N_TRACKED, N_TEST = 9, 5
OPTIONS = {"influence-lissa": {"damping": 1.0, "depth": 20}}
FITTING = "hydra_pipe.pipeline.compare.by_epoch.samples_that_fit"
COURSE = Course(every=1, raw_decay=True, influence_from=2, options=OPTIONS)
REPLAYS = "over-training/every-1-ekfac-raw-decay"


class Heard:
    """Counts what was done, skipped and said."""

    def __init__(self):
        self.done, self.skipped, self.said = [], [], []

    def __call__(self, event):
        if isinstance(event, events.UnitFinished):
            self.done.append(event.unit)
        elif isinstance(event, events.UnitSkipped):
            self.skipped.append(event.unit)
        elif isinstance(event, events.Note):
            self.said.append(event.message)


def spec(out, recipe=None, **changes):
    values = {"executor": "serial", "device": "cpu", "dtype": "float64", "track": N_TRACKED, "test": N_TEST}
    return RunSpec(recipe=recipe or Small(), out=str(out), **{**values, **changes})


def rows(found, method, reference="hydra-exact", part="curves"):
    return [r for r in found[part] if (r["method"], r["reference"]) == (method, reference)]


def tables(place):
    """Return the tables of the replays, whatever the shards, in the order of their rows."""
    found = {}
    for kind in ("samples", "errors", "contributions"):
        table = pq.read_table(place / "over_training" / REPLAYS.split("/")[1] / kind)
        keys = [name for name in table.schema.names if name not in ("contribution", "norm", "error")]
        found[kind] = table.sort_by([(key, "ascending") for key in keys])
    return found


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A run of Small with three forms, followed over training; and what came out."""
    place = tmp_path_factory.mktemp("runs") / "r"
    for hessian in ("none", "ekfac", "exact"):
        run(spec(place, hessian=hessian))
    return place, by_epoch(str(place), COURSE, Small())


@pytest.fixture
def curved(followed, tmp_path):
    """The run of ``followed`` before it was followed."""
    place = Path(shutil.copytree(followed[0], tmp_path / "r"))
    shutil.rmtree(place / "over_training")
    shutil.rmtree(place / "manifests" / "over-training")
    return place


def test_the_last_epoch_is_what_the_run_holds(followed):
    place, found = followed
    opened = open_run(place)
    assert found["every_epoch"] == [1, 2, 3]
    assert (found["n_tracked"], found["n_test"], found["influence_from"]) == (N_TRACKED, N_TEST, 2)
    exact = opened.hypergradients("hydra-exact")[:]
    by_name = {row["method"]: row for row in compare(opened)["methods"]}
    for method in ("hydra", "hydra-ekfac"):
        (last,) = [row for row in rows(found, method) if row["epoch"] == 3]
        own = opened.hypergradients(method)[:]
        distance = np.linalg.norm(own - exact, axis=1)
        assert last["error"] == pytest.approx(distance.mean(), rel=1e-9)
        assert last["norm"] == pytest.approx(np.linalg.norm(own, axis=1).mean(), rel=1e-9)
        assert last["reference_norm"] == pytest.approx(np.linalg.norm(exact, axis=1).mean(), rel=1e-9)
        relative = np.linalg.norm(own - exact) / np.linalg.norm(exact)
        assert last["relative_error"] == pytest.approx(relative, rel=1e-9)
        stored = by_name[method]
        assert last["spearman"] == pytest.approx(stored["mean_spearman"])
        assert last["sign_error"] == pytest.approx(stored["mean_sign_error"])
        assert last["spearman_by_test"] == pytest.approx(stored["spearman"])
        assert last["spearman_by_test_std"] == pytest.approx(stored["spearman_std"])
        assert last["sign_error_by_test"] == pytest.approx(stored["sign_error"])


def test_earlier_epochs_are_those_of_a_shorter_training(followed, tmp_path):
    _, found = followed
    run(spec(tmp_path / "r", epochs=2, hessian="none"))
    short = run(spec(tmp_path / "r", epochs=2, hessian="exact"))
    stored = {row["method"]: row for row in compare(short)["methods"]}["hydra"]
    (then,) = [row for row in rows(found, "hydra") if row["epoch"] == 2]
    distance = np.linalg.norm(
        short.hypergradients("hydra")[:] - short.hypergradients("hydra-exact")[:], axis=1
    )
    assert then["error"] == pytest.approx(distance.mean(), rel=1e-9)
    assert then["spearman_by_test"] == pytest.approx(stored["spearman"])


def test_averages_and_what_is_compared_with_what(followed):
    _, found = followed
    assert [row["epoch"] for row in rows(found, "influence-lissa")] == [2, 3]
    assert rows(found, "influence-lissa")[0]["spearman_by_test"] is None
    late = rows(found, "hydra", part="late")[0]
    values = [row["spearman"] for row in rows(found, "hydra") if row["epoch"] >= 2]
    assert (late["epochs"], late["spearman"]) == (2, pytest.approx(np.mean(values)))
    assert late["spearman_std"] == pytest.approx(np.std(values))
    assert rows(found, "influence-lissa", part="late")[0]["error"] is None
    raw = {row["method"] for row in found["curves"] if row["reference"] == "hydra-exact-raw-decay"}
    assert raw == {"hydra-raw-decay", "influence-lissa"}
    assert {"hydra-exact-raw-decay", "hydra-raw-decay"} <= {row["method"] for row in found["curves"]}


def test_what_is_stored(followed):
    place, found = followed
    opened = open_run(place)
    assert read_by_epoch(opened) == json.loads(json.dumps(found))
    assert verify(opened).ok
    told = status(opened)
    assert (told["state"], told["resume"]) == ("complete", None)
    states = {row["stage"]: row["state"] for row in told["stages"]}
    for stage in (REPLAYS, "over-training/influence-lissa", "over-training/scores"):
        assert states[stage] == "complete", stage
    table = tables(place)["contributions"]
    assert len(table) == 3 * 5 * N_TRACKED * N_TEST
    stored = (
        opened.contributions("hydra")
        .to_table()
        .sort_by([("test_index", "ascending"), ("train_index", "ascending")])
    )
    frame = table.to_pandas()
    mine = frame[(frame.epoch == 3) & (frame.method == "hydra")].sort_values(["test_index", "train_index"])
    assert (
        np.abs(mine.contribution.to_numpy() - stored["contribution"].to_numpy()).max()
        < 1e-6 * np.abs(mine.contribution).max()
    )


def test_the_same_again_does_nothing_and_lost_work_is_done_again(followed, tmp_path):
    place = Path(shutil.copytree(followed[0], tmp_path / "r"))
    heard = Heard()
    again = by_epoch(str(place), COURSE, Small(), observer=heard)
    assert heard.done == []
    assert again["curves"] == followed[1]["curves"]
    (place / "manifests" / "over-training" / "influence-lissa" / "epoch-00003.json").unlink()
    torn = next((place / "over_training" / REPLAYS.split("/")[1] / "samples").iterdir())
    torn.write_bytes(torn.read_bytes()[:-1])
    heard = Heard()
    again = by_epoch(str(place), COURSE, Small(), observer=heard)
    assert heard.done == ["shard-00000", "epoch-00003"]
    assert again["curves"] == followed[1]["curves"]


def test_any_number_of_shards_gives_the_same_bits(followed, curved, monkeypatch):
    place = curved
    monkeypatch.setattr(FITTING, lambda *_: 4)
    heard = Heard()
    found = by_epoch(str(place), COURSE, Small(), observer=heard)
    assert heard.done[:4] == [*(f"shard-{k:05d}" for k in range(3)), "epoch-00002"]
    assert found["curves"] == followed[1]["curves"]
    for kind, table in tables(place).items():
        assert table.equals(tables(followed[0])[kind]), kind
    monkeypatch.undo()  # the cut is kept: nothing is done again
    heard = Heard()
    by_epoch(str(place), COURSE, Small(), observer=heard)
    assert heard.done == []


def test_an_interrupted_comparison_goes_on(followed, curved, monkeypatch):
    place = curved
    monkeypatch.setattr(FITTING, lambda *_: 4)

    class Stop(Exception):
        pass

    def stopping(event):
        if isinstance(event, events.UnitFinished) and event.unit == "shard-00001":
            raise Stop

    with pytest.raises(Stop):
        by_epoch(str(place), COURSE, Small(), observer=stopping)
    heard = Heard()
    found = by_epoch(str(place), COURSE, Small(), observer=heard)
    assert heard.skipped == ["shard-00000", "shard-00001"]
    assert found["curves"] == followed[1]["curves"]


def test_other_questions_do_what_differs(followed, tmp_path):
    place = Path(shutil.copytree(followed[0], tmp_path / "r"))
    heard = Heard()
    other = Course(every=1, raw_decay=True, influence_from=3, options=OPTIONS, by_test=True)
    found = by_epoch(str(place), other, Small(), observer=heard)
    assert heard.done == ["epoch-00003"]
    assert "made with other options" in heard.said[0]
    assert rows(found, "influence-lissa")[0]["spearman_by_test"] is not None
    mean = [row["spearman"] for row in rows(followed[1], "influence-lissa") if row["epoch"] == 3]
    assert [row["spearman"] for row in rows(found, "influence-lissa")] == pytest.approx(mean)
    heard = Heard()
    fewer = Course(every=2, methods=["hydra"])
    found = by_epoch(str(place), fewer, Small(), observer=heard)
    assert (found["every_epoch"], heard.done) == ([2, 3], ["shard-00000"])
    expected = [row for row in rows(followed[1], "hydra") if row["epoch"] > 1]
    for row, right in zip(rows(found, "hydra"), expected, strict=True):  # other borders round otherwise
        for key, value in row.items():
            assert value == (right[key] if isinstance(value, str) else pytest.approx(right[key], rel=1e-12))
    heard = Heard()  # what was there before is still there
    by_epoch(str(place), COURSE, Small(), observer=heard)
    assert heard.done == ["epoch-00002", "epoch-00003"]
    assert status(open_run(place))["state"] == "complete"


def test_a_record_is_enough(tmp_path):
    place = tmp_path / "r"
    run(spec(place, TwoGroups(), dtype="float32"), stages=["record"])
    found = by_epoch(
        str(place),
        Course(every=2, methods=["hydra", "influence-cg"], options={"influence-cg": {"damping": 5.0}}),
        TwoGroups(),
    )
    assert {row["method"] for row in found["curves"]} == {"hydra", "influence-cg"}
    assert found["influence_from"] == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every 0: must be at least 1"),
        ({"every": 1, "influence_from": 0}, "influence_from 0"),
        (
            {"every": 1, "methods": ["tracin"]},
            "tracin cannot be followed over training; use some of hydra, hydra-ekfac",
        ),
        ({"every": 1, "options": {"influence-cg": {"depth": 2}}}, "no option 'depth'"),
    ],
)
def test_courses_are_checked(wrong, message):
    with pytest.raises(SpecError, match=message):
        Course(**wrong)


def test_what_cannot_be_done_is_refused(followed, tmp_path):
    place = tmp_path / "r"
    given = {"recipe": Small()}
    run(spec(place), stages=["record"])
    with pytest.raises(IncompleteStage, match="has no curvature for hydra-ekfac"):
        by_epoch(str(place), Course(every=1, methods=["hydra-ekfac"]), **given)
    with pytest.raises(SpecError, match="influence_from 4: training has 3 epochs"):
        by_epoch(str(place), Course(every=1, influence_from=4), **given)
    with pytest.raises(SpecError, match="options of influence-cg, which is not among the methods"):
        by_epoch(str(place), Course(every=1, options={"influence-cg": {}}), **given)
    with pytest.raises(InputError, match="name it yourself: hydra-pipe compare"):
        by_epoch(str(place), Course(every=1))
    with pytest.raises(SpecMismatch):
        by_epoch(str(place), Course(every=1), TwoGroups())
    with pytest.raises(DoesNotFit, match="following one tracked sample needs"):
        by_epoch(str(place), Course(every=1), memory=1 << 20, **given)
    with pytest.raises(IncompleteStage, match="was not compared over training yet"):
        read_by_epoch(open_run(place))
    with pytest.raises(EstimatorDiverged, match="influence-lissa diverged"):
        by_epoch(str(place), Course(every=1, options={"influence-lissa": {"scale": 1e-3}}), **given)
    with pytest.raises(NegativeCurvature):
        by_epoch(
            str(place),
            Course(
                every=1,
                methods=["influence-cg"],
                options={"influence-cg": {"damping": 0.0}},
                influence_from=1,
            ),
            **given,
        )
    assert status(open_run(place))["stages"][0]["state"] == "complete"
    shutil.rmtree(place / "manifests" / "record")
    with pytest.raises(IncompleteStage, match="stage record has not finished"):
        by_epoch(str(place), Course(every=1), **given)


def test_other_data_are_noticed(tmp_path):
    place = tmp_path / "r"
    run(spec(place), stages=["record"])
    opened = open_run(place)
    opened.info["chosen"]["tracked"] = "0" * 16
    opened.directory.update(lambda _: opened.info)
    with pytest.raises(SpecMismatch, match="made from other data"):
        by_epoch(str(place), Course(every=1), Small())


def test_overwriting_a_run_takes_it_along(followed, tmp_path):
    place = Path(shutil.copytree(followed[0], tmp_path / "r"))
    open_run(place).directory.delete_results()
    assert [path.name for path in place.iterdir()] == [layout.LOG]


def call(*words, code=0):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, words, prog_name="hydra-pipe")
    assert result.exit_code == code, result.output + result.stderr
    return result


def test_the_command(followed, tmp_path):
    place = str(shutil.copytree(followed[0], tmp_path / "r"))
    words = ["compare", place, "tests/recipes.py:Small", "--every", "1", "--decay-as-published", "--quiet"]
    words += ["--influence-from", "2", "--option", "damping=1.0", "--option", "influence-lissa.depth=20"]
    words += ["--executor", "serial"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydra_pipe.pipeline.spec.spec.RunSpec.differences", lambda self, stored: [])
        out = call(*words).stdout
        assert max(map(len, out.splitlines())) <= 84
        for text in ("against hydra-exact, from epoch 2 on", "influence-lissa", "Spearman", "3 of 3 epochs"):
            assert text in out
        document = json.loads(call(*words, "--format", "json").stdout)
        assert document["curves"] == json.loads(json.dumps(followed[1]["curves"]))
        lines = list(csv.DictReader(io.StringIO(call(*words, "--format", "csv").stdout)))
        assert len(lines) == len(document["curves"])
        assert {"epoch", "reference", "error", "spearman_by_test"} <= set(lines[0])
        pytest.importorskip("matplotlib")
        out = call(*words, "--figures", str(tmp_path / "f")).stdout
    names = ["over-training-error.png", "over-training-signs.png", "over-training-spearman.png"]
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == names
    assert "wrote" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--influence-from", "2"], "--influence-from: only with --every"),
        (["--decay-as-published"], "--decay-as-published: only with --every"),
        (["--influence-by-test"], "--influence-by-test: only with --every"),
        (["--option", "depth=3"], "--option: only with --every"),
        (["--workers", "2"], "--workers: only with --every"),
        (["digits"], "RECIPE: only with --every"),
        (["--every", "1", "-k", "3"], "-k: not with --every"),
        (["--every", "1", "--reference", "hydra"], "--reference: not with --every"),
        (["--every", "0"], "Invalid value for '--every'"),
        (["--every", "1", "--methods", "hydra", "--option", "depth=3"], "needs a --method that has it"),
    ],
)
def test_options_that_do_not_go_together(followed, words, message):
    assert message in call("compare", str(followed[0]), *words, code=2).stderr


class Adamic(Small):
    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=0.01)


def test_published_decay_is_of_sgd(tmp_path):
    run(spec(tmp_path / "run", recipe=Adamic()))
    with pytest.raises(SpecError, match="the record is of AdamW; leave --decay-as-published out"):
        by_epoch(str(tmp_path / "run"), Course(every=1, raw_decay=True), recipe=Adamic())
