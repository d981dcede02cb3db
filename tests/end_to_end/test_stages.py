"""Stages one by one: the later ones read from the run what it has fixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.pipeline.analysis.status import status

from hydra_pipe import open_run
from tests.end_to_end.support import assert_same_bits, cli, files, numbers

RECIPE = "tests.recipes:Small"
FIXED = ("--epochs", "2", "--seed", "5", "--track", "20", "--test", "0:6", "--dtype", "float64")
HERE = ("--executor", "serial", "--device", "cpu", "--quiet")


def done(*words: Any) -> Any:
    result = cli(*words)
    assert result.exit_code == 0, result.stderr
    return result


def refused(result: Any, *says: str) -> None:
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    (line,) = result.stderr.splitlines()
    for words in says:
        assert words in line


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    done("record", RECIPE, *FIXED, *HERE, "--out", tmp_path / "run")
    return tmp_path / "run"


def stages(out: Path, name: str) -> set[str]:
    return {Path(path).parts[1] for path in files(out / "manifests") if path.startswith(f"{name}/")}


def test_what_the_run_has_fixed_is_not_asked_again(recorded, tmp_path):
    done("run", RECIPE, *FIXED, *HERE, "--shards", "2", "--out", tmp_path / "whole")
    done("replay", RECIPE, "--shards", "2", "--out", recorded, "--quiet")
    done("reduce", RECIPE, "--out", recorded, "--quiet")
    assert_same_bits(numbers(recorded), numbers(tmp_path / "whole"))
    # Given again, as scripts do, they agree.
    done("reduce", RECIPE, *FIXED, *HERE, "--shards", "2", "--out", recorded)


def test_a_record_binds_no_method(recorded):
    assert open_run(recorded).info["methods"]["hydra"]["state"] == "asked"
    done("replay", RECIPE, "--mode", "adjoint", "--out", recorded, "--quiet")
    done("reduce", RECIPE, "--out", recorded, "--quiet")  # reads the mode from the run
    assert open_run(recorded).info["methods"]["hydra"]["mode"] == "adjoint"
    assert status(open_run(recorded))["state"] == "complete"


def test_nothing_of_a_method_that_only_record_named_remains(recorded):
    how = ("--mode", "adjoint", "--hessian", "ekfac", "--targets", "mean")
    done("replay", RECIPE, *how, "--option", "curvature-core=4", "--out", recorded, "--quiet")
    done("reduce", RECIPE, "--hessian", "ekfac", "--targets", "mean", "--out", recorded, "--quiet")
    run = open_run(recorded)
    assert run.methods() == list(run.info["methods"]) == ["hydra-ekfac-mean"]
    assert run.info["methods"]["hydra-ekfac-mean"]["options"]["core"] == 4
    found = status(run)
    assert (found["state"], found["resume"]) == ("complete", None)
    # The curvature is the run's for other methods of its form, too; another one is refused.
    done("replay", RECIPE, "--hessian", "ekfac", "--out", recorded, "--quiet")
    assert open_run(recorded).info["methods"]["hydra-ekfac"]["options"]["core"] == 4
    other = cli(
        "replay", RECIPE, "--hessian", "ekfac", "--option", "curvature-core=8", "--out", recorded, "-q"
    )
    refused(other, "options: stored", "(method hydra-ekfac)")


@pytest.mark.parametrize("given", [("--epochs", "3"), ("--set", "samples=9"), ("--track", "all")])
def test_what_differs_from_the_run_is_refused(given, recorded):
    before = (recorded / "run.json").read_bytes()
    name = "recipe_args" if given[0] == "--set" else given[0][2:]
    says = (f"{name}: stored ", ", asked ", "leave these options out")
    refused(cli("replay", RECIPE, *given, "--out", recorded), *says)
    assert (recorded / "run.json").read_bytes() == before


def test_a_configuration_file_may_be_that_of_the_record(recorded, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'recipe = "{RECIPE}"\nout = "{recorded}"\nepochs = 2\noverwrite = true\nhessian = "exact"\n'
    )
    done("replay", "--config", file, "--quiet")
    assert "replay" in stages(recorded, "hydra-exact")
    assert not json.loads((recorded / "run.json").read_text())["spec"]["overwrite"]


@pytest.mark.parametrize("command", ["replay", "reduce"])
def test_what_is_missing_is_said(command, recorded, tmp_path, monkeypatch):
    unnamed = cli(command, "--out", recorded)
    refused(unnamed, "not imported unasked", f"hydra-pipe {command} {RECIPE} --out {recorded}")
    nowhere = tmp_path / "none"
    refused(
        cli(command, RECIPE, "--out", nowhere), f"no run at {nowhere}", f"hydra-pipe record --out {nowhere}"
    )
    assert not nowhere.exists()
    monkeypatch.chdir(tmp_path)
    refused(cli(command, RECIPE), "no run at runs/small")
    refused(cli(command, "tests.recipes:Other", "--out", recorded), "name the recipe it was made from")


def test_reduce_before_replay_says_so(recorded):
    for words in ([], ["--hessian", "exact"], ["--targets", "classes"]):
        refused(cli("reduce", RECIPE, *words, "--out", recorded, "--quiet"), "hydra-pipe replay")
