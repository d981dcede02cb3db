"""Wrong input: one line that names the value and what to do, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.end_to_end.support import cli, files, serial
from tests.recipes import Small

GOOD = "tests.recipes:Small"
BAD = "tests.end_to_end.bad_recipes"

REMEDY = re.compile(
    r"\b(use|must|say|set|give|choose|check|did you mean|write|correct|install|stay within|remove|name every|"
    r"pass|run|freeze|add|split|build|unfreeze|number the classes|lower|free|keep|neither|make|try|return|"
    r"accepts|needs?|name|negate|the recipes there are|ends? in)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrong:
    """One wrong call: words after ``run``, what the message must say, and the exit code."""

    words: tuple[str, ...]
    says: tuple[str, ...]
    code: int = 1
    recipe: str | None = GOOD


def wrong(*words: str, says: tuple[str, ...], code: int = 1, recipe: str | None = GOOD) -> Wrong:
    return Wrong(words=words, says=says, code=code, recipe=recipe)


def bad(name: str, *says: str, words: tuple[str, ...] = ()) -> Wrong:
    """The recipe ``name`` of ``bad_recipes`` is refused; the message says ``says``."""
    return Wrong(words=words, says=says, recipe=f"{BAD}:{name}")


RUNS = {
    # the recipe's name
    "unknown recipe": wrong(recipe="digit", says=("'digit'", "did you mean digits")),
    "recipe of another world": wrong(recipe="resnet", says=("'resnet'", "module:Class")),
    "no such module": wrong(recipe="nowhere.at_all:Mine", says=("nowhere", "install it")),
    "no such class": wrong(recipe="tests.recipes:Smal", says=("Smal", "did you mean Small")),
    "no such file": wrong(recipe="/no/such/recipe.py:Mine", says=("/no/such/recipe.py", "no Python file")),
    "file without class": wrong(recipe="recipe.py", says=("recipe.py", "names a file but no class")),
    "not a recipe": wrong(recipe=f"{BAD}:NotARecipe", says=("NotARecipe", "not a subclass")),
    "the base class": wrong(recipe="hydra_pipe.workers.recipe:Recipe", says=("base class",)),
    "a module that cannot be imported": wrong(recipe="{broken}:Mine", says=("importing recipe", "line 1")),
    "a syntax error": wrong(recipe="{syntax}:Mine", says=("syntax error", "line 2")),
    # --set
    "unknown --set key": wrong(
        "--set", "wdith=3", recipe=f"{BAD}:ConstructorRaises", says=("did you mean width",)
    ),
    "--set without value": wrong("--set", "width", says=("KEY=VALUE", "width"), code=2),
    "--set that the recipe refuses": wrong(
        "--set", "width=5", recipe=f"{BAD}:ConstructorRaises", says=("width=5", "is odd")
    ),
    "--set of another type": wrong("--set", "label_noise=abc", recipe="digits", says=("label_noise", "abc")),
    "--set to a recipe that takes none": wrong("--set", "width=5", says=("width", "accepts no arguments")),
    # numbers
    "no shards": wrong("--shards", "0", says=("shards", "'0'|0", "at least 1")),
    "negative shards": wrong("--shards", "-1", says=("-1", "at least 1")),
    "shards that are no number": wrong("--shards", "abc", says=("'abc'", "auto")),
    "no epochs": wrong("--epochs", "0", says=("--epochs", "0"), code=2),
    "no batch": wrong("--batch-size", "0", says=("--batch-size", "0"), code=2),
    "epochs that are no number": wrong("--epochs", "many", says=("--epochs", "many"), code=2),
    "negative seed": wrong("--seed", "-3", says=("seed", "-3")),
    "half precision": wrong("--dtype", "float16", says=("--dtype", "float16", "float32"), code=2),
    "no workers": wrong("--workers", "0", says=("--workers", "0"), code=2),
    "no attempts": wrong("--max-attempts", "0", says=("--max-attempts",), code=2),
    "no threads": wrong("--threads", "0", says=("--threads",), code=2),
    "half a GPU too much": wrong("--gpus-per-actor", "1.5", says=("1.5", "use 2")),
    "no CPU": wrong("--cpus-per-actor", "0", says=("cpus_per_actor", "0.01")),
    "--memory that is no size": wrong("--memory", "lots", says=("'lots'", "4GiB")),
    "--memory too small for a process": wrong("--memory", "1MiB", says=("1,048,576 bytes", "--memory")),
    "--reduce-memory too small": wrong("--reduce-memory", "100", says=("--reduce-memory", "use at least")),
    "--checkpoint-every 0": wrong("--checkpoint-every", "0", says=("--checkpoint-every",), code=2),
    "unknown executor": wrong("--executor", "dask", says=("--executor", "dask"), code=2),
    "unknown mode": wrong("--mode", "sideways", says=("--mode", "sideways"), code=2),
    "unknown targets": wrong("--targets", "each", says=("--targets", "each"), code=2),
    "classes in forward mode": wrong(
        "--targets", "classes", says=("targets 'classes'", "adjoint", "samples")
    ),
    "classes without labels": wrong(
        "--mode",
        "adjoint",
        "--targets",
        "classes",
        recipe="tests.pipeline.spec.test_targets:Unlabelled",
        says=("targets 'classes'", "no label", "labels()"),
    ),
    "exact rank without ekfac": wrong("--exact-rank", "3", says=("exact_rank 3", "ekfac")),
    "a bad address": wrong(
        "--executor", "ray", "--address", "ray://head:10001", says=("ray://head", "host:port")
    ),
    "an address without port": wrong("--executor", "ray", "--address", "head", says=("'head'", "host:port")),
    "an address where nobody is": wrong(
        "--executor", "ray", "--address", "127.0.0.1:1", says=("127.0.0.1:1", "check --address")
    ),
    # samples
    "track none": wrong("--track", "0", says=("--track 0", "1 to 45")),
    "track too many": wrong("--track", "9999999", says=("9999999", "1 to 45")),
    "a range backwards": wrong("--track", "9:3", says=("9:3", "A must be below B")),
    "a range outside": wrong("--track", "0:46", says=("46", "0:45")),
    "an empty share": wrong("--track", "0%", says=("0%", "above 0%")),
    "a share too large": wrong("--track", "101%", says=("101%", "at most 100%")),
    "a range of words": wrong("--track", "a:b", says=("a:b", "neither")),
    "a list that is missing": wrong(
        "--track", "/no/such/list.txt", says=("/no/such/list.txt", "a file that exists")
    ),
    "an empty list": wrong("--track", "{empty}", says=("--track", "at least one")),
    "a list with a sample twice": wrong(
        "--track", "{twice}", says=("line 3", "already", "every sample once")
    ),
    "a list of words": wrong("--track", "{words}", says=("line 2", "'seven'", "no integer")),
    "a list with a sample outside": wrong("--track", "{outside}", says=("45", "0 to 44")),
    "a list that is a directory": wrong("--track", "/tmp", says=("/tmp", "cannot be read")),
    "a list of bytes": wrong("--track", "{binary}", says=("not a text file",)),
    "test none": wrong("--test", "0", says=("--test 0", "1 to 12")),
    "test too many": wrong("--test", "13", says=("--test 13", "1 to 12")),
    "test list twice": wrong("--test", "{twice}", says=("line 3", "every sample once")),
    "test list missing": wrong("--test", "no.txt", says=("--test no.txt", "a file that exists")),
    # recipes
    "nothing defined": bad("Empty", "does not define model", "add it"),
    "adagrad": bad("UsesAdagrad", "Adagrad", "use torch.optim.SGD"),
    "own sgd": bad("OwnSgd", "Mine", "use torch.optim.SGD"),
    "maximize": bad("Maximizes", "maximize", "negate"),
    "nothing optimised": bad("OptimizesNothing", "0 of the model's", "build it from"),
    "optimizer raises": bad("OptimizerRaises", "no such group", r"optimizer\(\)"),
    "iterable": bad("Streams", "not map-style", "__len__"),
    "no length": bad("NoLength", "no length", "__len__"),
    "no samples": bad("NoSamples", "train dataset has 0 samples"),
    "no test samples": bad("NoTestSamples", "test dataset has 0 samples"),
    "dataset raises": bad("DatasetRaises", r"train_dataset\(\)", "there is no data.npz"),
    "item raises": bad("ItemRaises", "disk read error"),
    "mean loss": bad("MeanLoss", r"shape \(\)", "reduction='none'"),
    "loss per class": bad("LossPerClass", r"shape \(3, 3\)", r"shape \(3,\)"),
    "loss is float": bad("LossIsFloat", "float", "one loss a sample"),
    "loss raises": bad("LossRaises", r"losses\(\) failed", "cannot be multiplied"),
    "loss detached": bad("LossDetached", "does not require grad", "first training step"),
    "integer loss": bad("IntegerLoss", "int64", "floating"),
    "overlap": bad("Shares", "share 5 samples", "index 40"),
    "same object": bad("SameObject", "same object"),
    "few labels": bad("FewLabels", "3 labels for 45", "one a sample"),
    "negative labels": bad("NegativeLabels", "-1", "0 to 32767"),
    "labels that are names": bad("NamedLabels", r"labels\(\)", "cat"),
    "labels raise": bad("LabelsRaise", r"labels\(\)", "targets"),
    "collate raises": bad("CollateRaises", "ragged"),
    "max_norm": bad("MaxNorm", "max_norm=1.0", "remove max_norm"),
    "sync batch norm": bad("Synced", "SyncBatchNorm", "use BatchNorm"),
    "lazy": bad("Lazy", "lazy", "sizes"),
    "frozen": bad("Frozen", "0 parameters", "unfreeze"),
    "no model": bad("NoModel", r"model\(\)", "NoneType", "nn.Module"),
    "model raises": bad("ModelRaises", r"model\(\) failed", "no such layer"),
    "no epochs in the recipe": bad("NoEpochs", "epochs is 0", "1 or more"),
    "half a sample": bad("HalfBatch", "batch_size is 2.5", "integer"),
    "bad interval": bad("BadInterval", "'batch'", "epoch, step"),
    "scheduler raises": bad("SchedulerRaises", r"scheduler\(\)", "total_steps is missing"),
    "scheduler is none": bad("SchedulerIsNone", r"scheduler\(\)", "int"),
    "test samples of another shape": bad("OtherTestShape", "first 3 test samples", "shapes"),
    "validation raises": bad("ValidationRaises", r"validation_dataset\(\)", "no split"),
    "bad name": bad("BadName", "'../escape'"),
    "one sample left over": bad("Left", "41 mod 8", "layer '1'", "another batch_size, such as 7"),
    "clipped": bad("Clipped", "clip_grad_norm is -1.0", "a positive number"),
    "gradient that is no number": bad("Lengths", "train_index 17|train_index 30", "'0.weight'", "look at"),
    "constructor that exits": bad("ConstructorExits", "could not be constructed", "SystemExit"),
    "losses that exit": bad(
        "Calls", r"losses\(\)|step", "sys.exit\\(3\\)", words=("--set", "how=exit", "--set", "after=4")
    ),
}


@pytest.fixture
def lists(tmp_path: Path) -> dict[str, str]:
    """Files of wrong samples and wrong recipes, by the name that stands for them in the table."""
    folder = tmp_path / "lists"
    folder.mkdir()
    contents = {
        "empty": b"# nothing\n\n",
        "twice": b"1\n2\n1\n",
        "words": b"1\nseven\n",
        "outside": b"1\n45\n",
        "binary": b"\xff\xfe\x00\x01",
        "broken.py": b"raise OSError('no data here')\n",
        "syntax.py": b"x = 1\ndef (:\n",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name.removesuffix(".py"): str(folder / name) for name in contents}


def check_refused(result: Any, code: int, says: tuple[str, ...]) -> None:
    """Check exit code, the single line, what it says, and that it says what to do."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    text = result.stderr
    assert "Traceback" not in text
    if code == 2:
        assert text.startswith("Usage: ")
        message = text.split("\n\n", 1)[-1] if "\n\n" in text else text
        message = " ".join(message.split())
        assert "Error: " in message
    else:
        lines = text.splitlines()
        assert len(lines) == 1, text
        assert lines[0].startswith("error: ")
        message = lines[0]
        assert REMEDY.search(message), f"no remedy: {message}"
        assert len(message) < 600
    for part in says:
        assert re.search(part, message), f"{part!r} is not in {message!r}"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: what lies in the checkout does not matter, and litter shows."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS.keys())
def test_run_refuses(case, lists, tmp_path, elsewhere):
    out = tmp_path / "out"
    words = [word.format(**lists) for word in case.words]
    executor = () if "--executor" in words else ("--executor", "serial")
    recipe = () if case.recipe is None else (case.recipe.format(**lists),)
    result = cli("run", *recipe, "--out", out, *executor, *words)
    check_refused(result, case.code, case.says)
    assert not out.exists()
    assert list(elsewhere.iterdir()) == []


TAKES_A_RUN: dict[str, tuple[str, ...]] = {
    "top": ("top",),
    "verify": ("verify",),
    "status": ("status",),
    "export": ("export", "--to", "x.csv"),
}


@pytest.mark.parametrize("command", TAKES_A_RUN.values(), ids=TAKES_A_RUN.keys())
@pytest.mark.parametrize("place", ["missing", "empty", "foreign", "file"])
def test_readers_refuse_what_is_no_run(command, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / place
    if place == "empty":
        target.mkdir()
    elif place == "foreign":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    elif place == "file":
        target.write_text("mine")
    before = files(tmp_path)
    check_refused(cli(*command, target), 1, (str(target), "no run"))
    assert files(tmp_path) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any) -> str:
    out = tmp_path_factory.mktemp("finished") / "run"
    return serial(out, Small(), track="10", test="4").uri


READS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "test sample not there": (("top", "--test", "4"), ("test sample 4", "0 to 3")),
    "negative test sample": (("top", "--test", "-1"), ("-1", "0 to 3")),
    "huge test sample": (("top", "--test", "99999999999"), ("99999999999", "choose")),
    "no rows": (("top", "-k", "0"), ("k is 0", "at least 1")),
    "method not there": (("top", "--method", "tracin"), ("'tracin'", "it has hydra")),
    "method with a slash": (("top", "--method", "../x"), ("'../x'", "it has hydra")),
    "export of a method not there": (("export", "--to", "x.csv", "--method", "x"), ("'x'", "it has hydra")),
    "export of a kind not known": (("export", "--to", "x.xlsx"), ("x.xlsx", "csv")),
    "export into nowhere": (("export", "--to", "no/such/x.csv"), ("no/such", "directory")),
}


@pytest.mark.parametrize(("words", "says"), READS.values(), ids=READS.keys())
def test_readers_refuse(words, says, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(finished)
    check_refused(cli(*words, finished), 1, says)
    assert files(finished) == before
    assert files(tmp_path) == []


def test_export_spares_the_file_that_is_there(finished, tmp_path):
    target = tmp_path / "x.csv"
    target.write_text("mine")
    check_refused(cli("export", finished, "--to", target), 1, ("x.csv", "--overwrite"))
    assert target.read_text() == "mine"
    assert cli("export", finished, "--to", target, "--overwrite").exit_code == 0
    assert len(target.read_text().splitlines()) == 41


# ---------------------------------------------------------------------- where the run goes


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("ftp://host/run", ("ftp", "s3")),
        ("http://host/run", ("http", "s3")),
        ("file::s3://x/y", ("::",)),
        ("", ("out",)),
    ],
)
def test_places_that_are_not_allowed(out, says):
    check_refused(cli("run", GOOD, "--executor", "serial", "--out", out), 1, says)


def test_memory_lives_in_one_process():
    check_refused(cli("run", GOOD, "--executor", "ray", "--out", "memory://x"), 1, ("memory://", "serial"))


def test_out_is_a_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("mine")
    check_refused(cli("run", GOOD, "--executor", "serial", "--out", target), 1, (str(target), "--out"))
    inner = target / "run"
    check_refused(cli("run", GOOD, "--executor", "serial", "--out", inner), 1, (str(inner), "--out"))
    assert target.read_text() == "mine"
    assert files(tmp_path) == ["file"]


FOREIGN: dict[str, Callable[[Path], None]] = {
    "a file": lambda place: (place / "notes.txt").write_text("mine"),
    "results of something else": lambda place: (
        (place / "samples").mkdir() or (place / "samples" / "a.partial").write_text("mine")
    ),
    "a run.json of something else": lambda place: (place / "run.json").write_text('{"mine": 1}'),
    "a run.json that is no JSON": lambda place: (place / "run.json").write_text("mine"),
}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("fill", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_directory_that_is_not_ours_is_left_alone(fill, overwrite, tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    fill(place)
    before = {name: (place / name).read_bytes() for name in files(place)}
    result = cli("run", GOOD, "--executor", "serial", "--out", place, *overwrite)
    check_refused(result, 1, (str(place), "--out|run again"))
    assert {name: (place / name).read_bytes() for name in files(place)} == before


def test_an_empty_directory_is_taken(tmp_path):
    result = cli("run", GOOD, "--executor", "serial", "--out", tmp_path, "--test", "2", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "run.json").exists()


# ---------------------------------------------------------------------- configuration files


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shard = 3\n", ("unknown key 'shard'", "did you mean 'shards'")),
        ("shards = [\n", ("no TOML", "config")),
        ("shards = 0\n", ("shards 0", "at least 1")),
        ("dtype = 'float16'\n", ("float16", "float32 or float64")),
        ("max-attempts = 2\nmax_attempts = 3\n", ("twice", "keep one")),
        ("[set]\nwidth = 3\n", ("width", "accepts no arguments")),
    ],
)
def test_configuration_files(text, says, tmp_path, elsewhere):
    config = tmp_path / "run.toml"
    config.write_text(text)
    out = tmp_path / "out"
    result = cli("run", GOOD, "--executor", "serial", "--out", out, "--config", config)
    check_refused(result, 1, says)
    assert not out.exists()
    assert list(elsewhere.iterdir()) == []


def test_a_configuration_file_that_is_missing(tmp_path):
    check_refused(cli("run", "--config", tmp_path / "no.toml"), 2, ("--config", "no.toml"))


# ---------------------------------------------------------------------- memory and devices


def test_memory_too_small_says_how_many_shards_fit(tmp_path, monkeypatch):
    # What a process needs is measured and varies; here it is fixed, so that the buffers decide.
    monkeypatch.setattr("hydra_pipe.pipeline.plan.survey.peak_bytes", lambda: 100_000_000)
    monkeypatch.setattr("hydra_pipe.pipeline.plan.plan.WRITER_BYTES", 0)
    words = ("plan", "tests.recipes:Long", "--executor", "serial", "--format", "json")
    memory = json.loads(cli(*words, "--shards", "1").stdout)["memory"]
    assert memory["one process without buffers"] == 100_000_000
    room = memory["replay worker"] - memory["buffers of the largest shard"] // 2
    refused = cli(*words, "--shards", "1", "--memory", room)
    check_refused(refused, 1, (f"{room:,} bytes", r"use --shards \d+ or more"))
    fits = re.search(r"--shards (\d+)", refused.stderr)
    assert fits is not None
    assert int(fits[1]) <= 4
    assert cli(*words, "--shards", fits[1], "--memory", room).exit_code == 0
    assert cli(*words, "--memory", room).exit_code == 0  # auto finds a number that fits
    check_refused(cli(*words, "--memory", "2MiB"), 1, ("2,097,152 bytes", "--memory"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path):
    out = tmp_path / "out"
    result = cli("run", GOOD, "--executor", "serial", "--out", out, "--device", "cuda")
    check_refused(result, 1, ("'cuda'", "--device cpu"))
    assert not out.exists()


def test_only_what_is_selected_may_be_wrong_in_a_run_that_exists(finished):
    """A refused command leaves a finished run as it was."""
    before = {name: Path(finished, name).read_bytes() for name in files(finished)}
    for words in (
        ("--track", "0"),
        ("--shards", "0"),
        ("--overwrite", "--reduce-memory", "9"),
        ("--overwrite", "--memory", "1MiB"),
        ("--overwrite", "--epochs", "0"),
    ):
        assert cli("run", GOOD, "--executor", "serial", "--out", finished, *words).exit_code in (1, 2)
    assert {name: Path(finished, name).read_bytes() for name in files(finished)} == before


def test_the_installed_command_prints_one_line_too(tmp_path, elsewhere):
    """Through a real process: no traceback, no warning, nothing on standard output."""
    code = "from hydra_pipe.cli import main; main()"
    words = ["run", f"{BAD}:UsesAdagrad", "--executor", "serial", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: optimizer Adagrad")
    assert not (tmp_path / "out").exists()
