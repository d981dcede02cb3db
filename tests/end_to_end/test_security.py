"""What docs/security.md says: a stored run is data, and only what the user names is imported. Harmless input only."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.reading.decisions import load_decision
from hydra_pipe.storage import layout
from hydra_pipe.storage.documents import SEAL, dump
from hydra_pipe.storage.errors import CorruptStore, HydraError, InputError
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.workers.training.initial import read_weights

from tests.conftest import ROOT
from tests.end_to_end.support import cli, serial
from tests.recipes import Small

CODE = {
    # What goes from the driver to its own workers and back.
    "workers/recipes/beside.py": {"pickle.loads", "cloudpickle.loads"},
    "workers/actor.py": {"pickle.loads"},
    # A recipe that the user names.
    "workers/recipes/importing.py": {"importlib.import_module", "spec.loader.exec_module"},
    "workers/recipes/loading.py": {"importlib.import_module"},
    # This file of ours beside the driver, with the name of a directory that we made.
    "pipeline/executors/reaper.py": {"subprocess.Popen"},
    # Names of a table in the same file.
    "workers/estimators/__init__.py": {"import_module"},
    # Loads tensors alone: see below.
    "workers/training/initial.py": {"torch.load"},
    # The state of the training in a folder of its own.
    "workers/training/kept.py": {"np.load"},
    "pipeline/reading/decisions.py": {"np.load"},
}
RUNS_CODE = {
    "load",
    "loads",
    "eval",
    "exec",
    "import_module",
    "exec_module",
    "system",
    "popen",
    "__import__",
    "Popen",
}
MODULES = (
    "pickle",
    "cloudpickle",
    "torch",
    "np",
    "numpy",
    "importlib",
    "os",
    "subprocess",
    "spec",
    "marshal",
    "shelve",
)


def calls(path: Path) -> dict[str, list[ast.Call]]:
    """Return the calls in a file of what could run code, by name."""
    found: dict[str, list[ast.Call]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rsplit(".", 1)[-1]
        if (
            last in RUNS_CODE
            and (name == last or name.split(".")[0] in MODULES)
            and name not in ("load", "loads")
        ):
            found.setdefault(name, []).append(node)
    return found


def test_code_is_run_from_bytes_in_these_places_only():
    found = {}
    for room in ("cli", "pipeline", "workers", "storage"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if here := calls(path):
                found[str(path.relative_to(ROOT))] = here
    assert {file: set(names) for file, names in found.items()} == CODE
    (loaded,) = found["workers/training/initial.py"]["torch.load"]
    assert {k.arg: ast.unparse(k.value) for k in loaded.keywords}["weights_only"] == "True"
    (loaded,) = found["pipeline/reading/decisions.py"]["np.load"]
    assert {k.arg: ast.unparse(k.value) for k in loaded.keywords}["allow_pickle"] == "False"


class Marks:
    """Makes a file when it is unpickled, and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return (os.open, (self.path, os.O_CREAT))


def test_weights_are_tensors_and_never_code(tmp_path):
    with pytest.raises(InputError, match=r"w\.pt"):
        read_weights(pickle.dumps({"weight": Marks(tmp_path / "made")}), "w.pt")
    assert not (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("security") / "run"
    serial(place, Small(), shards=2)
    return place


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit(path: Path, change: Any) -> None:
    document = json.loads(path.read_bytes())
    sealed = document.pop(SEAL, None) is not None
    change(document)
    path.write_bytes(dump(document, seal=sealed))


def test_a_recipe_that_a_run_names_is_not_imported(run, tmp_path):
    recipe = tmp_path / "theirs.py"
    recipe.write_text(f"open({str(tmp_path / 'made')!r}, 'w')\n")
    edit(run / "run.json", lambda info: info["identity"].update(recipe=f"{recipe}:Mine"))
    for words in (("status",), ("top",), ("verify", "--quiet"), ("export", "--to", tmp_path / "x.csv")):
        done = cli(words[0], run, *words[1:])
        assert done.exit_code == 0, done.output
    for command in ("evaluate", "replay", "verify"):
        words = (
            ("--out", run) if command == "replay" else (run, *(("--deep",) if command == "verify" else ()))
        )
        refused = cli(command, *words)
        assert refused.exit_code == 1
        assert "unasked" in refused.output
    assert not (tmp_path / "made").exists()


def test_no_name_leaves_the_run(run, tmp_path):
    manifest = next((run / "manifests/record").glob("*.json"))
    before = manifest.read_bytes()
    for path in ("../other", "/etc/passwd", "a/../../b", "a\\..\\b", "."):
        edit(manifest, lambda found, path=path: found["files"][0].update(path=path))
        with pytest.raises(CorruptStore, match="no path inside"):
            RunDirectory(run).manifest("record", manifest.stem)
        assert cli("verify", run, "--quiet").exit_code == 1
    manifest.write_bytes(before)
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("../outside", "a/b", "/x", ""):
        edit(
            run / "run.json", lambda info, name=name: info["methods"].update({name: info["methods"]["hydra"]})
        )
        opened = open_run(run)
        for read in (opened.hypergradient_store, opened.samples, opened.contributions):
            with pytest.raises(HydraError):
                read(name)
        edit(run / "run.json", lambda info, name=name: info["methods"].pop(name))
    with pytest.raises(HydraError):
        load_decision(str(run / layout.decision_folder("nothing")))
    assert list(outside.iterdir()) == []


def test_what_links_lead_to_is_kept(run, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("x")
    shutil.rmtree(run / "hypergradients")
    (run / "hypergradients").symlink_to(kept)
    (run / "x.partial").symlink_to(kept)
    RunDirectory(run).clear_litter()
    RunDirectory(run).delete_results()
    assert not (run / "hypergradients").is_symlink()
    assert (kept / "mine.txt").read_text() == "x"


def test_the_screen_is_not_written_to_by_a_run(run):
    edit(run / "run.json", lambda info: info["recipe"].update(name="\x1b[31mred\x07"))
    edit(run / "run.json", lambda info: info["identity"].update(recipe="\x1b]0;title\x07"))
    for command in ("status", "top", "verify"):
        shown = cli(command, run).output
        assert "\x1b" not in shown
        assert "\x07" not in shown
