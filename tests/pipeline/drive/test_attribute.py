"""Estimators added to a run: resumed, refused, read back; on the serial executor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.pipeline.analysis.export import export
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.executors.events import UnitFinished, UnitSkipped
from hydra_pipe.pipeline.units.work import Work
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import (
    IncompleteStage,
    InputError,
    NegativeCurvature,
    SpecError,
    SpecMismatch,
)

from hydra_pipe import RunSpec, open_run, run
from tests.recipes import Plain, Small

DAMPED = {"damping": 2.0}


class Events(list):
    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of ``Plain`` with 20 tracked and 12 test samples; copied by every test."""
    out = tmp_path_factory.mktemp("made") / "run"
    run(spec(out))
    return out


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return str(tmp_path / "run")


def spec(out, recipe=None, **changes):
    values = {"executor": "serial", "dtype": "float64", "track": "20", "shards": 2, **changes}
    return RunSpec(recipe=recipe or Plain(), out=str(out), **values)


def table(place, method):
    found = open_run(place).contributions(method).to_table().to_pandas().drop(columns="method")
    return found.sort_values(["test_index", "train_index"]).reset_index(drop=True)


def test_methods_lie_beside_hydra_and_all_readers_know_them(place, tmp_path):
    methods = {"influence-cg": DAMPED, "tracin": {}, "relatif": DAMPED}
    finished = attribute(place, methods, Plain())
    assert finished.methods() == ["hydra", "influence-cg", "tracin", "relatif"]
    for method in methods:
        assert len(table(place, method)) == 20 * 12
        assert set(finished.samples(method)["shard"].to_pylist()) == {-1}
    influence, relative = (table(place, m)["contribution"] for m in ("influence-cg", "relatif"))
    assert (np.sign(influence) == np.sign(relative)).all()
    checked = verify(finished)
    assert checked.ok, checked.problems
    assert checked.notes == ()
    found = status(finished)
    assert found["state"] == "complete"
    assert found["methods"] == dict.fromkeys(["hydra", *methods], "complete")
    stages = [stage["stage"] for stage in found["stages"]]
    assert stages[-3:] == ["relatif/prepare", "relatif/attribute", "relatif/reduce"]
    assert finished.top(3, method="tracin").num_rows == 3
    assert export(finished, tmp_path / "found.csv", method="relatif")["rows"] == 240
    stored = finished.info["methods"]["influence-cg"]
    assert stored["options"] == {"damping": 2.0, "tolerance": 1e-4, "max_iterations": 100}
    notes = finished.directory.manifests("influence-cg/attribute")[1].values
    assert notes["not_converged"] == []
    assert len(notes["iterations"]) == len(notes["residual"]) == notes["rows"]


def test_sgd_influence_is_hydra_exact_for_plain_sgd(tmp_path):
    run(spec(tmp_path / "run", mode="adjoint", hessian="exact"))
    attribute(str(tmp_path / "run"), {"sgd-influence": {}}, Plain())
    assert table(tmp_path / "run", "sgd-influence").equals(table(tmp_path / "run", "hydra-exact"))


def test_what_is_done_is_not_done_again(place):
    attribute(place, {"tracin": {}}, Plain())
    before = table(place, "tracin")
    seen = Events()
    attribute(place, {"tracin": {}}, Plain(), observer=seen.append)
    assert not seen.of(UnitFinished)
    assert {event.stage for event in seen.of(UnitSkipped)} == {"tracin/attribute", "tracin/reduce"}
    assert table(place, "tracin").equals(before)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_method_that_was_killed_goes_on_where_it_stood(place, tmp_path, failing, monkeypatch):
    """Blocks of 8: two of prepared samples a worker, two of test samples."""
    whole = str(tmp_path / "whole")
    shutil.copytree(place, whole)
    monkeypatch.setattr("hydra_pipe.pipeline.drive.attribute.PREPARE_ROWS", 16)
    monkeypatch.setattr("hydra_pipe.pipeline.drive.attribute.MOST_TARGETS", 8)
    attribute(whole, {"relatif": DAMPED}, Plain())
    calls = []
    real = Work.__call__

    def killed(self, unit, report):
        calls.append(unit.name)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return real(self, unit, report)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            attribute(place, {"relatif": DAMPED}, Plain())
    found = status(open_run(place))
    assert found["state"] == "partial"
    assert found["methods"]["relatif"] in ("partial", "missing")
    assert "hydra-pipe attribute" in found["resume"]
    assert "--method relatif --option damping=2.0" in found["resume"]
    with pytest.raises(IncompleteStage):
        open_run(place).contributions("relatif")
    seen = Events()
    attribute(place, {"relatif": DAMPED}, Plain(), observer=seen.append)
    assert len(seen.of(UnitSkipped)) == failing - 1
    assert table(place, "relatif").equals(table(whole, "relatif"))
    assert status(open_run(place))["state"] == "complete"


def test_other_options_are_refused_by_name_or_replace_on_request(place):
    attribute(place, {"influence-cg": DAMPED}, Plain())
    before = table(place, "influence-cg")
    other = {"influence-cg": {"damping": 3.0}}
    with pytest.raises(SpecMismatch, match=r"\(damping: stored 2\.0, asked 3\.0\).*--overwrite"):
        attribute(place, other, Plain())
    assert table(place, "influence-cg").equals(before)
    finished = attribute(place, other, Plain(), overwrite=True)
    assert not table(place, "influence-cg").equals(before)
    assert verify(finished).ok


def test_an_option_that_an_older_run_says_nothing_of_was_its_default(place):
    attribute(place, {"tracin": {}}, Plain())
    note = Path(place, "run.json")
    document = json.loads(note.read_text())
    del document["methods"]["tracin"]["options"]["preconditioned"], document["document_sha256"]
    note.write_text(json.dumps(document))
    seen = Events()
    attribute(place, {"tracin": {}}, Plain(), observer=seen.append)
    assert not seen.of(UnitFinished)
    with pytest.raises(SpecMismatch, match="scale: stored 'contribution', asked 'published'"):
        attribute(place, {"tracin": {"scale": "published"}}, Plain())


def test_options_may_change_while_nothing_is_done(tmp_path):
    """The error of a too small damping says which to use: using it must not be refused."""
    run(spec(tmp_path / "run", Small()))
    place = str(tmp_path / "run")
    with pytest.raises(NegativeCurvature, match="option damping"):
        attribute(place, {"influence-cg": {"damping": 0.0}}, Small())
    assert "influence-cg" in attribute(place, {"influence-cg": DAMPED}, Small()).methods()


def test_blocks_and_workers_change_no_bit(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "other")
    attribute(place, {"influence-cg": DAMPED, "gradient-dot": {"ensemble": 2}}, Plain())
    monkeypatch.setattr("hydra_pipe.pipeline.drive.attribute.MOST_TARGETS", 8)
    seen = Events()
    other = str(tmp_path / "other")
    methods = {"influence-cg": DAMPED, "gradient-dot": {"ensemble": 2}}
    attribute(other, methods, Plain(), observer=seen.append)
    done = [event for event in seen.of(UnitFinished) if event.stage == "influence-cg/attribute"]
    assert len(done) == 2
    for method in methods:
        assert table(place, method).equals(table(other, method))


def test_refusals(place, tmp_path):
    with pytest.raises(SpecError, match="did you mean 'tracin'"):
        attribute(place, {"trackin": {}}, Plain())
    with pytest.raises(SpecError, match="no option 'damp'; did you mean 'damping'"):
        attribute(place, {"influence-cg": {"damp": 1}}, Plain())
    with pytest.raises(InputError, match="is not imported unasked"):
        attribute(place, {"tracin": {}})
    with pytest.raises(SpecMismatch, match=r"recipe: stored \"tests.recipes:Plain\", asked"):
        attribute(place, {"tracin": {}}, Small())
    with pytest.raises(SpecError, match="epochs is the run's own"):
        attribute(place, {"tracin": {}}, Plain(), epochs=3)
    assert open_run(place).methods() == ["hydra"]
    assert not open_run(place).info["methods"].keys() - {"hydra"}
    run(spec(tmp_path / "recorded"), stages=["record"])
    with pytest.raises(IncompleteStage, match="test-gradients"):
        attribute(str(tmp_path / "recorded"), {"tracin": {}}, Plain())


def test_hydra_goes_on_beside_the_others(place):
    attribute(place, {"tracin": {}}, Plain())
    before = table(place, "tracin")
    finished = run(spec(place, mode="adjoint", hessian="exact"))
    assert finished.methods() == ["hydra", "tracin", "hydra-exact"]
    assert finished.info["methods"]["tracin"]["state"] == "complete"
    assert table(place, "tracin").equals(before)
    assert verify(finished).ok


def test_a_warning_is_no_failure(place, caplog):
    attribute(place, {"influence-cg": {**DAMPED, "max_iterations": 1, "tolerance": 1e-12}}, Plain())
    assert "stopped at max_iterations" in caplog.text
    (unit,) = [m for m in open_run(place).directory.manifests("influence-cg/attribute") if m.unit != "index"]
    assert unit.values["not_converged"] == list(range(12))


# ---------------------------------------------------------------- the command line


def call(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "run"
    done = call(
        *("run", "digits", "--out", out, "--executor", "serial", "--epochs", 1, "--track", 30, "--test", 9),
        *("--method", "tracin", "--method", "gradient-dot", "--option", "ensemble=2", "-q"),
        *("--set", "train_size=120", "--set", "test_size=20"),
    )
    assert done.exit_code == 0, done.output
    return out


def test_run_adds_methods_and_attribute_knows_a_built_in_recipe(digits):
    assert open_run(str(digits)).methods() == ["hydra", "tracin", "gradient-dot"]
    assert open_run(str(digits)).info["methods"]["gradient-dot"]["options"] == {
        "ensemble": 2,
        "preconditioned": False,
    }
    done = call("attribute", digits, "--method", "mirrored-influence", "--option", "central=true", "-q")
    assert done.exit_code == 0, done.output
    assert "method             mirrored-influence" in done.output
    done = call("top", digits, "--method", "mirrored-influence", "-k", 2, "--format", "csv")
    assert done.exit_code == 0
    assert len(done.output.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--method", "tracing"], 1, "did you mean 'tracin'?"),
        (["--method", "gradient-dot", "--option", "ensemble=3"], 1, "ensemble: stored 2, asked 3"),
        (["--method", "tracin", "--option", "dampin=1"], 1, "tracin has no option 'dampin'"),
        (["--method", "tracin", "--method", "gif", "--option", "x=1"], 1, "none of tracin, gif has"),
        (["--method", "tracin", "--option", "gif.fraction=1"], 1, "there is no --method gif"),
        (["--method", "tracin", "--option", "scale"], 2, "write KEY=VALUE"),
        (["--method", "gif", "--option", "fraction=2"], 1, "option fraction is 2; use a number above 0"),
        ([], 2, "name an estimator with --method"),
    ],
)
def test_one_line_for_what_is_wrong(digits, words, code, text):
    done = call("attribute", digits, *words, "-q")
    assert done.exit_code == code
    assert text in done.output


def test_a_typo_costs_no_run(tmp_path):
    done = call("run", "digits", "--out", tmp_path / "run", "--executor", "serial", "--method", "tracing")
    assert done.exit_code == 1
    assert "did you mean 'tracin'?" in done.output
    assert not (tmp_path / "run").exists()
    done = call("run", "digits", "--out", tmp_path / "run", "--option", "damping=1")
    assert done.exit_code == 2
