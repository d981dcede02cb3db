"""A run knows its recipe: what was edited is refused by name, what was only tidied up goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.errors import SpecMismatch
from hydra_pipe.workers.recipes.loading import load_recipe

from tests.end_to_end.support import assert_same_bits, cli, numbers, serial

RECIPE = '''
import torch
import torch.nn.functional as F
from hydra_pipe import Recipe
from torch import nn
from torch.utils.data import TensorDataset

HIDDEN = 5
UNUSED = 1


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)


class Mine(Recipe):
    """What is edited below."""

    epochs, batch_size, seed = 3, 8, 0

    def model(self):
        net = nn.Sequential(nn.Linear(6, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 3))
        return net

    def train_dataset(self):
        return data(24, 1)

    def test_dataset(self):
        return data(9, 2)

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


if __name__ == "__main__":
    print(Mine())
'''

EDITS = {
    "learning rate": ("lr=0.1", "lr=0.05", ["learning rate of the first steps (stored 0.1, now 0.05 at step 0)", "losses"]),
    "loss": ('reduction="none")', 'reduction="none", label_smoothing=0.2)', ["losses of the first steps (stored 1."]),
    "test data of the same size": ("data(9, 2)", "data(9, 3)", ["test samples"]),
    "training data of the same size": ("data(24, 1)", "data(24, 4)", ["training samples", "losses of the first"]),
    "classes": ("torch.arange(count) % 3", "torch.arange(count) % 2", ["training labels", "test labels"]),
    "initial weights": ("return net", "nn.init.zeros_(net[2].weight); return net", ["initial weights"]),
    "layers": ("nn.Tanh()", "nn.ReLU()", ["the model's layers", "losses of the first steps"]),
    "schedule": ("gamma=0.5", "gamma=0.9", []),
    "a constant it uses": ("HIDDEN = 5", "HIDDEN = 2 + 3", []),
}  # fmt: skip
"""What, from, to, and what the message names beside the source."""

OPTIONS = ("--executor", "serial", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``mine.py`` and its finished run ``run``."""
    place = tmp_path_factory.mktemp("made")
    (place / "mine.py").write_text(RECIPE)
    assert cli("run", f"{place}/mine.py:Mine", "--out", place / "run", *OPTIONS).exit_code == 0
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "made")
    info = json.loads((tmp_path / "made" / "run" / "run.json").read_text())
    del info["document_sha256"]
    # As if the copy had been made there: the reference is part of the identity.
    text = json.dumps(info).replace(str(made), str(tmp_path / "made"))
    (tmp_path / "made" / "run" / "run.json").write_text(text)
    return tmp_path / "made"


def edit(place: Path, before: str, after: str) -> None:
    text = (place / "mine.py").read_text()
    assert before in text
    (place / "mine.py").write_text(text.replace(before, after))


def ask(place: Path, command: str = "run", *words: str) -> Any:
    recipe = f"{place}/mine.py:Mine"
    if command in ("run", "record", "replay", "reduce"):
        return cli(command, recipe, "--out", place / "run", *OPTIONS, *words)
    return cli(command, place / "run", recipe, *words)


def refused(result: Any, *says: str) -> None:
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    for words in says:
        assert words in line


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_refused_by_name_and_overwrite_makes_a_fresh_run(name, place):
    before, after, says = EDITS[name]
    edit(place, before, after)
    stored = (place / "run" / "run.json").read_bytes()
    source = "the recipe's source (class Mine in mine.py)"
    refused(ask(place), *says, source, "--overwrite", "--out")
    assert (place / "run" / "run.json").read_bytes() == stored
    if name == "learning rate":
        assert ask(place, "run", "--overwrite").exit_code == 0
        serial(place / "fresh", f"{place}/mine.py:Mine")
        assert_same_bits(numbers(place / "run"), numbers(place / "fresh"))


@pytest.mark.parametrize("name", EDITS)
def test_without_source_what_it_does_still_tells(name, place, monkeypatch):
    before, after, says = EDITS[name]
    monkeypatch.setattr(
        "hydra_pipe.workers.training.made_of.source_of", lambda _kind: {"class": "Mine", "unknown": "typed"}
    )
    edit(place, before, after)
    result = ask(place)
    if says:
        refused(result, *says)
        assert "the recipe's source" not in result.stderr
    else:  # a later step's schedule, or nothing at all: not to be known
        assert result.exit_code == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("class Mine", "# A remark.\n\n\nclass Mine"),
        ('"""What is edited below."""', '"""Told otherwise."""'),
        ("data(24, 1)", "data(\n            24,\n            1,\n        )"),
        ("UNUSED = 1", "UNUSED = 2"),
        ("print(Mine())", "print(Mine)"),
    ],
)
def test_tidying_up_is_said_once_and_accepted(before, after, place):
    edit(place, before, after)
    result = cli("run", f"{place}/mine.py:Mine", "--out", place / "run", *OPTIONS[:-1])
    assert result.exit_code == 0, result.output
    assert "the source of the recipe was edited (mine.py), but not what it does" in result.stderr
    again = cli("run", f"{place}/mine.py:Mine", "--out", place / "run", *OPTIONS[:-1])
    assert again.exit_code == 0
    assert "was edited" not in again.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("record",),
        ("replay",),
        ("reduce",),
        ("attribute", "--method", "tracin"),
        ("evaluate", "--subsets", "0"),
        ("compare", "--every", "1"),
        ("verify", "--deep"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_that_takes_a_recipe_asks(words, place):
    edit(place, "lr=0.1", "lr=0.05")
    command, *options = words
    before = sorted(str(path) for path in (place / "run").rglob("*"))
    if command == "verify":
        result = cli("verify", place / "run", "--deep", "--recipe", f"{place}/mine.py:Mine")
        if result.exit_code == 2:
            result = cli("verify", place / "run", f"{place}/mine.py:Mine", "--deep")
    else:
        result = ask(place, command, *options)
    refused(
        result,
        "learning rate of the first steps (stored 0.1, now 0.05 at step 0)",
        "another --out",
        "--overwrite",
    )
    assert sorted(str(path) for path in (place / "run").rglob("*")) == before


def test_the_same_recipe_is_welcome_everywhere(place):
    for words in (("run",), ("attribute", "--method", "tracin")):
        result = ask(place, *words)
        assert result.exit_code == 0, result.output
    assert (
        cli("run", f"{place}/mine.py:Mine", "--out", place / "run", *OPTIONS, "--hessian", "ekfac").exit_code
        == 0
    )


def test_a_run_of_before_goes_on_as_before(place):
    path = place / "run" / "run.json"
    info = json.loads(path.read_text())
    del info["made_of"]
    info.pop("document_sha256", None)
    path.write_text(json.dumps(info))
    edit(place, "gamma=0.5", "gamma=0.9")
    assert ask(place).exit_code == 0
    # What it was made from stays unknown: today's recipe need not be it.
    assert "made_of" not in json.loads(path.read_text())


def test_a_run_that_came_to_nothing_is_begun_anew(tmp_path):
    (tmp_path / "mine.py").write_text(
        RECIPE.replace("nn.Tanh()", "nn.Identity()").replace("lr=0.1", "lr=1e30")
    )
    failed = ask(tmp_path)
    assert failed.exit_code == 1
    assert "lower the learning rate" in failed.stderr
    edit(tmp_path, "lr=1e30", "lr=0.1")
    assert ask(tmp_path).exit_code == 0
    edit(tmp_path, "lr=0.1", "lr=0.2")
    refused(ask(tmp_path), "learning rate of the first steps (stored 0.1, now 0.2 at step 0)")


def test_code_beside_the_recipe_counts_where_it_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\nSIZE = 4\n\ndef head():\n    return nn.Linear(SIZE, 3)\n"
    )
    text = RECIPE.replace("import torch\n", "import torch\nfrom net import head\n", 1)
    text = text.replace("nn.Linear(6, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 3)", "nn.Linear(6, 4), head()")
    (tmp_path / "mine.py").write_text(text)

    def again() -> Any:
        """As in a new process: ``net`` is imported anew."""
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", list(sys.path))
            patch.delitem(sys.modules, "net", raising=False)
            done = cli("run", "mine.py:Mine", "--out", "run", *OPTIONS[:-1])
            sys.modules.pop("net", None)
        return done

    assert again().exit_code == 0
    beside = tmp_path / "net.py"
    beside.write_text(beside.read_text() + "\n# Later.\nOTHER = 1\n")
    found = again()
    assert found.exit_code == 0
    assert "was edited (mine.py, net.py)" in found.stderr
    beside.write_text(beside.read_text().replace("nn.Linear(SIZE, 3)", "nn.Linear(SIZE, 3, bias=True)"))
    found = again()
    assert found.exit_code == 1
    assert "the recipe's source (class Mine in mine.py, with net.py)" in found.stderr


def test_instances_in_python_are_known_as_well(tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    recipe = load_recipe(f"{tmp_path}/mine.py:Mine", {})
    serial(tmp_path / "run", recipe)
    type(recipe).optimizer = lambda self, model: _sgd(model)
    with pytest.raises(SpecMismatch, match="learning rate of the first steps"):
        run(RunSpec(recipe=recipe, out=str(tmp_path / "run"), executor="serial", device="cpu"))


def _sgd(model: Any) -> Any:
    import torch

    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)


def test_seeds_share_what_is_no_matter_of_seeds(tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    assert ask(tmp_path, "run", "--seeds", "2").exit_code == 0
    member = json.loads((tmp_path / "run" / "seeds" / "seed=1" / "run.json").read_text())["made_of"]
    assert "losses" not in member
    assert "weights" not in member
    assert ask(tmp_path, "run", "--seeds", "2").exit_code == 0
    edit(tmp_path, "data(9, 2)", "data(9, 3)")
    refused(ask(tmp_path, "run", "--seeds", "2"), "test samples")


def test_serial_runs_where_there_is_no_ray(tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    script = textwrap.dedent(
        """
        import sys
        from importlib import metadata
        sys.modules["ray"] = None  # importing it raises
        found = metadata.version
        def version(name):
            if name == "ray":
                raise metadata.PackageNotFoundError(name)
            return found(name)
        metadata.version = version
        from hydra_pipe.cli import main
        main(["run", "mine.py:Mine", "--out", "run", "--executor", "serial", "--device", "cpu"])
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    versions = json.loads((tmp_path / "run" / "run.json").read_text())["versions"]
    assert versions["ray"] is None
    assert versions["torch"]
