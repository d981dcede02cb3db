"""What goes wrong while a recipe runs is told in one line: what was done, what raised, where."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.executors.events import Note
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.errors import NonFiniteLoss, NonFiniteTangents, RecipeError
from hydra_pipe.workers.data.schedule import schedule_of

from tests.conftest import ROOT
from tests.end_to_end import bad_recipes as bad
from tests.end_to_end.support import cli, serial
from tests.recipes import Small

BAD = "tests.end_to_end.bad_recipes"


def check_line(message: str, *says: str) -> None:
    assert "\n" not in message
    for part in says:
        assert re.search(part, message), f"{part!r} is not in {message!r}"


def notes(out: Any, recipe: Any, **fields: Any) -> list[str]:
    """Run; return what was said in notes."""
    heard: list[str] = []

    def observer(event: Any) -> None:
        if isinstance(event, Note):
            heard.append(event.message)

    run(RunSpec(recipe=recipe, out=str(out), executor="serial", device="cpu", **fields), observer=observer)
    return heard


# ---------------------------------------------------------------------- numbers that are none


class Late(bad.Lengths):
    """As Lengths, in a batch that the survey's few steps do not see."""

    batch_size = 4


def test_a_gradient_that_is_no_number_names_step_and_samples(tmp_path):
    recipe = Late()
    recipe.zeros = (11,)
    with pytest.raises(NonFiniteTangents) as caught:
        serial(tmp_path / "run", recipe)
    step = int(re.search(r"at step (\d+) of 36", str(caught.value))[1])  # type: ignore[index]
    assert 11 in schedule_of(recipe, 45).batches[step]
    assert step < 12  # its first visit
    check_line(
        str(caught.value),
        r"gradient of parameter '0.weight' is not finite",
        r"though the batch loss is \d",
        "that of train_index 11 alone is not",
        "look at these samples",
    )
    assert not (tmp_path / "run" / "trajectory.zarr").exists()


def test_a_loss_that_is_no_number_names_its_sample_alone(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"the batch loss is nan at step \d+ of 18 \(train_index 17\)"):
        serial(tmp_path / "run", bad.NanLoss())


def test_a_test_gradient_that_is_no_number_names_the_test_sample(tmp_path):
    with pytest.raises(NonFiniteTangents) as caught:
        serial(tmp_path / "run", bad.TestLengths())
    check_line(
        str(caught.value), "loss of test_index 5 is not finite", r"the loss is 1\.1", "look at", "--test"
    )
    assert serial(tmp_path / "run", bad.TestLengths(), test="5", overwrite=True).uri


# ---------------------------------------------------------------------- code that raises

PLACES = {
    "losses": r"step \d+ of 18 raised",
    "test losses": r"record trajectory raised",
    "train item": r"fetching the batch of step \d+ \(train_index \d+, .*\) raised",
    "test item": r"record trajectory raised",
    "optimizer": r"optimizer\(\) failed:",
    "scheduler": r"moving the scheduler after epoch \d raised",
}
"""Where user code raises -> what the message begins with."""
IN_THE_RECIPE = r"in misbehave\(\) \(.*bad_recipes.py, line \d+\)"
RAISES = {
    "KeyError": "KeyError: 'weight'",
    "exit": r"SystemExit: sys.exit\(3\) was called",
    "base": "Halt: stop here",
}


@pytest.mark.parametrize(
    ("where", "how"), [*((where, "exit") for where in PLACES), ("losses", "base"), ("train item", "KeyError")]
)
def test_what_user_code_raises_is_one_line(where, how, tmp_path):
    with pytest.raises(RecipeError) as caught:
        serial(tmp_path / "run", Settled(where, how))
    check_line(str(caught.value), PLACES[where], RAISES[how], IN_THE_RECIPE, "correct")


class Settled(bad.Calls):
    """Counts from the record on: what the survey called does not matter."""

    def __init__(self, where: str, how: str) -> None:
        super().__init__(where, how, 10**9)

    def arguments(self):  # called once the survey is done, before any stage
        self.after, self.calls = 1, 0
        return {}


def test_loader_processes_tell_the_same(tmp_path):
    recipe = Settled("train item", "exit")
    recipe.num_workers = 1
    with pytest.raises(
        RecipeError, match=r"fetching the batch of step \d+ .*sys.exit\(3\) was called in misbeh"
    ):
        serial(tmp_path / "run", recipe)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("where", "how"),
    [("losses", "exit"), ("losses", "base"), ("train item", "KeyError"), ("test losses", "exit")],
)
def test_ray_tells_the_same(where, how, warm_ray, tmp_path):
    recipe = Settled(where, how)
    spec = RunSpec(recipe=recipe, out=str(tmp_path / "run"), executor="ray", address=warm_ray, workers=1)
    with pytest.raises(RecipeError) as caught:
        run(spec)
    check_line(str(caught.value), PLACES[where], RAISES[how], IN_THE_RECIPE)


@pytest.mark.parametrize("how", ["exit", "base", "KeyError"])
def test_the_command_ends_with_1_and_one_line(how, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = (
        "--set",
        "where=losses",
        "--set",
        f"how={how}",
        "--set",
        "after=9",
        "--executor",
        "serial",
        "--quiet",
    )
    result = cli("run", f"{BAD}:Calls", "--out", tmp_path / "run", *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    check_line(result.stderr.strip(), "^error: ", "step", RAISES[how])
    told = cli("run", f"{BAD}:Calls", "--out", tmp_path / "run", *words, "--debug")
    assert "Traceback" in told.stderr


def test_an_interrupt_stays_an_interrupt(tmp_path):
    class Interrupted(Settled):
        def misbehave(self, where):
            if self.after == 1 and where == "losses":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serial(tmp_path / "run", Interrupted("losses", "exit"))


# ---------------------------------------------------------------------- standard output


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Standard output and error of a process that plans and then runs a recipe that prints."""
    words = [f"{BAD}:Says", "--executor", "serial", "--format", "json"]
    words += ["--out", str(tmp_path_factory.mktemp("said") / "out")]
    code = f"""
import sys
from hydra_pipe.cli import main
for command in ("plan", "run"):
    print("COMMAND", file=sys.stderr, flush=True)
    if main([command, *{words!r}], standalone_mode=False):
        sys.exit(command)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("at", [0, 1], ids=["plan", "run"])
def test_prints_of_a_recipe_never_reach_standard_output(at, said):
    stdout, stderr = said
    reader, rest, found = json.JSONDecoder(), stdout, []
    while rest.strip():
        document, end = reader.raw_decode(rest.lstrip())
        found.append(document)
        rest = rest.lstrip()[end:]
    assert [type(document) for document in found] == [dict, dict]
    for line in (
        "from losses",
        "from train_dataset",
        "from the descriptor",
        "from a child",
        "from optimizer",
    ):
        assert line in stderr.split("COMMAND\n")[1 + at]


def test_prints_stay_off_captured_output_too(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = cli("plan", f"{BAD}:Says", "--executor", "serial", "--format", "csv")
    assert result.exit_code == 0
    assert result.stdout.startswith("section,row,key,value\n")
    assert "from losses" not in result.stdout
    assert "from losses" in result.stderr


@pytest.mark.ray
def test_prints_in_workers_of_ray_neither(warm_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = (
        "--executor",
        "ray",
        "--address",
        warm_ray,
        "--workers",
        "1",
        "--format",
        "json",
        "--test",
        "2",
    )
    result = cli("run", f"{BAD}:Says", "--out", tmp_path / "run", *words)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["n_test_tracked"] == 2


# ---------------------------------------------------------------------- what is only said


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (bad.Constant, "the test losses do not depend on the weights"),
        (bad.Still, "the learning rate is 0 at every step"),
    ],
)
def test_contributions_that_are_all_zero_are_said(recipe, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = [line for line in notes(tmp_path / "run", recipe(), test="4") if "zero" in line]
    assert said == [f"warning: all contributions of hydra are zero: {said[0].split('zero: ')[1]}"]
    assert reason in said[0]
    shown = cli("top", tmp_path / "run", "--format", "json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["rows"][0]["contribution"] == 0
    assert shown.stderr == said[0] + "\n"
    assert open_run(tmp_path / "run").summary()["warnings"] == [said[0].removeprefix("warning: ")]


def test_estimators_say_it_too(tmp_path):
    finished = serial(tmp_path / "run", bad.Constant(), test="4")
    heard: list[str] = []
    attribute(
        finished.uri,
        {"tracin": {}},
        bad.Constant(),
        observer=lambda event: heard.append(event.message) if isinstance(event, Note) else None,
        executor="serial",
    )
    assert any("all contributions of tracin are zero: the test losses do not" in line for line in heard)


def test_contributions_that_are_not_are_not(tmp_path):
    assert notes(tmp_path / "run", Small(), test="4") == []
    shown = cli("top", tmp_path / "run")
    assert (shown.exit_code, shown.stderr) == (0, "")


def test_unknown_names_are_said_once(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    right = [
        "warning: recipe 'misspelt' has 'epoch', which nothing reads: did you mean epochs?",
        "warning: recipe 'misspelt' has 'sampler', which nothing reads: say order(epoch, generator), "
        + "which returns the training indices of an epoch",
    ]
    assert notes(tmp_path / "run", bad.Misspelt(), test="4") == right
    planned = cli("plan", f"{BAD}:Misspelt", "--executor", "serial", "--format", "json")
    assert planned.stderr.splitlines() == right
    assert [f"warning: {text}" for text in json.loads(planned.stdout)["warnings"]] == right


def test_float64_data_are_cast_as_training_casts_them(tmp_path):
    found, right = (serial(tmp_path / k.__name__, k(), test="4") for k in (bad.Double, Small))
    assert np.array_equal(found.hypergradients()[:], right.hypergradients()[:])
    assert found.trajectory().checkpoint(-1).weights.dtype == np.float32
