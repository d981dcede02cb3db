"""Finding a recipe by what the user typed, and one line for everything that can go wrong."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.recipes.beside import packed
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.recipes.loading import load_recipe

MINE = """
from hydra_pipe import Recipe
import torch
from helper_of_mine import WIDTH, widen
import helper_of_mine

class Mine(Recipe):
    epochs = 3
    def __init__(self, *, width: int = 2, name_of_it: str = "x"):
        self.width = width
    def model(self):
        return torch.nn.Linear(widen(self.width), helper_of_mine.WIDTH)

class Other(Mine):
    def __init__(self, depth=1, **rest):
        super().__init__(**rest)

class NotOne: ...
number = 5
"""
HELPER = """
WIDTH = 7
def widen(width):
    return width + WIDTH
"""


@pytest.fixture
def mine(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helper_of_mine.py").write_text(HELPER)
    return tmp_path / "mine.py"


def refused(reference: str, **arguments: object) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(reference, arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_with_a_sibling(mine):
    path = list(sys.path)
    recipe = load_recipe(f"{mine}:Mine", {"width": 3})
    assert isinstance(recipe, Recipe)
    assert (recipe.epochs, recipe.width) == (3, 3)
    assert recipe.model().weight.shape == (7, 10)
    assert sys.path == path
    assert sys.modules[type(recipe).__module__].__file__ == str(mine)


def test_relative_path_and_home(mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    monkeypatch.setenv("HOME", str(mine.parent))
    classes = {
        type(load_recipe(reference, {})) for reference in ("mine.py:Mine", "./mine.py:Mine", "~/mine.py:Mine")
    }
    assert len(classes) == 1  # one file is imported once


def test_edited_file_is_read_anew(mine):
    load_recipe(f"{mine}:Mine", {})
    mine.write_text(MINE.replace("epochs = 3", "epochs = 4"))
    assert load_recipe(f"{mine}:Mine", {}).epochs == 4


def test_two_directories_with_siblings_of_one_name(tmp_path):
    recipes = []
    for width in (1, 2):
        folder = tmp_path / str(width)
        folder.mkdir()
        (folder / "mine.py").write_text(MINE)
        (folder / "helper_of_mine.py").write_text(HELPER.replace("WIDTH = 7", f"WIDTH = {width}"))
        recipes.append(load_recipe(f"{folder / 'mine.py'}:Mine", {"width": 0}))
    assert [recipe.model().weight.shape for recipe in recipes] == [(1, 1), (2, 2)]
    copies = [cloudpickle.loads(cloudpickle.dumps(recipe)) for recipe in recipes]
    assert [copy.model().weight.shape for copy in copies] == [(1, 1), (2, 2)]


def in_another_process(pickled: Path, cwd: Path) -> str:
    script = (
        "import pickle, sys; recipe = pickle.load(open(sys.argv[1], 'rb')); "
        "print(type(recipe).__name__, recipe.epochs, tuple(recipe.model().weight.shape), recipe.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(pickled)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_worker_needs_neither_the_file_nor_its_sibling(mine, tmp_path):
    recipe = load_recipe(f"{mine}:Mine", {"width": 1})
    recipe.epochs = 11  # an override, as the pipeline sets it
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "recipe.pickle").write_bytes(cloudpickle.dumps(recipe))
    mine.unlink()
    (mine.parent / "helper_of_mine.py").unlink()
    assert in_another_process(elsewhere / "recipe.pickle", elsewhere) == "Mine 11 (7, 8) mine"


LATE = """
import importlib
from hydra_pipe import Recipe
import torch

class Late(Recipe):
    def model(self):
        import late_helper
        from late_package.inner import DEPTH
        named = importlib.import_module("late_named")
        return torch.nn.Linear(late_helper.width(), DEPTH + named.MORE)
"""


@pytest.fixture
def late(tmp_path, monkeypatch) -> Path:
    """A recipe whose ``model`` imports what lies beside it; two workers' machines may lack it."""
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "late_helper.py").write_text(
        "def width():\n    from late_more import WIDTH\n    return WIDTH\n"
    )
    (tmp_path / "late_more.py").write_text("WIDTH = 5\n")
    (tmp_path / "late_named.py").write_text("MORE = 1\n")
    (tmp_path / "late_package").mkdir()
    (tmp_path / "late_package" / "inner.py").write_text("DEPTH = 2\n")
    yield tmp_path / "late.py"
    for name in [name for name in sys.modules if name.partition("_")[0] == "late"]:
        del sys.modules[name]


def test_a_module_imported_inside_a_method(late):
    path = list(sys.path)
    assert load_recipe(f"{late}:Late", {}).model().weight.shape == (3, 5)
    assert sys.path == path
    with pytest.raises(ModuleNotFoundError):  # only code beside it sees it
        importlib.import_module("late_unknown")
    del sys.modules["late_more"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("late_more")


def test_a_worker_imports_inside_a_method_too(late, tmp_path):
    """Two workers, one of which finds that what lay beside the recipe is gone."""
    recipe = load_recipe(f"{late}:Late", {})
    assert recipe.model().weight.shape == (3, 5)  # the driver has looked at it: late_named is known
    payload = packed(recipe)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "payload").write_bytes(payload)
    names = ("late.py", "late_helper.py", "late_more.py", "late_named.py", "late_package/inner.py")
    code = """
import os, sys
from hydra_pipe.workers.recipes.beside import unpacked
for gone in ((), sys.argv[2:]):
    for path in gone:
        os.unlink(path)
    child = os.fork()
    if not child:
        recipe = unpacked(open(sys.argv[1], "rb").read())
        assert recipe.model().weight.shape == (3, 5)
        import late_helper
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, gone
"""
    found = subprocess.run(
        [sys.executable, "-c", code, str(elsewhere / "payload"), *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        check=False,
    )
    # The helper is in sys.modules: its own code found it, and this line finds it there.
    assert found.returncode == 0, found.stderr


def test_module_in_the_working_directory(tmp_path, monkeypatch):
    package = tmp_path / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tools.py").write_text(HELPER)
    source = MINE.replace("helper_of_mine import", "package_of_mine.tools import")
    (package / "recipes.py").write_text(
        source.replace("import helper_of_mine\n", "from . import tools as helper_of_mine\n")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    recipe = load_recipe("package_of_mine.recipes:Mine", {})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "recipe.pickle").write_bytes(cloudpickle.dumps(recipe))
    assert in_another_process(elsewhere / "recipe.pickle", elsewhere) == "Mine 3 (7, 9) mine"


def test_installed_module():
    recipe = load_recipe("hydra_pipe.workers.recipes.digits:Digits", {"train_size": 5})
    assert type(recipe) is Digits
    assert recipe.train_size == 5


def test_constructor_with_further_keywords(mine):
    assert load_recipe(f"{mine}:Other", {"width": 9, "depth": 2}).width == 9
    message = refused(f"{mine}:Other", widht=9)
    assert "'widht'" in message
    assert "did you mean width?" in message
    assert "it accepts depth, width, name_of_it" in message


def test_constructor_that_takes_anything(tmp_path):
    file = tmp_path / "open.py"
    file.write_text("from hydra_pipe import Recipe\nclass A(Recipe):\n def __init__(self, **k): self.k = k\n")
    assert load_recipe(f"{file}:A", {"b": 1}).k == {"b": 1}


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("digit", "did you mean digits?"),
        ("fashion_mnist", "did you mean fashion-mnist?"),
        ("zzz", "only digits, mnist, fashion-mnist, cifar10"),
        ("", "no built-in recipe"),
        (":Class", "not of the form"),
        ("module:", "not of the form"),
        ("a.py:not a name", "not of the form"),
        ("nowhere_at_all:Mine", "there is no module 'nowhere_at_all'"),
        ("hydra_pipe.nowhere:Mine", "there is no module 'hydra_pipe.nowhere'"),
        ("not-a-module:Mine", "is no module name"),
        ("/nowhere/at/all.py:Mine", "there is no Python file /nowhere/at/all.py"),
        ("/nowhere/at/all:Mine", "there is no Python file /nowhere/at/all"),
        ("hydra_pipe.workers.recipe:Recipe", "is the base class itself"),
        ("hydra_pipe.workers.recipes.digits:Digit", "did you mean Digits?"),
        ("hydra_pipe.workers.recipes.digits:small_cnn", "not a subclass of hydra_pipe.Recipe"),
        ("os:path", "not a subclass"),
    ],
)
def test_no_such_recipe(reference, words):
    assert words in refused(reference)


def test_wrong_class_in_a_file(mine):
    assert "did you mean Mine?" in refused(f"{mine}:mine")
    assert "the recipes there are Mine, Other" in refused(f"{mine}:NotOne")
    assert "not a subclass" in refused(f"{mine}:number")
    assert f"say {mine}:NotOne" in refused(str(mine))
    assert str(mine) in refused(f"{mine.parent / 'mime.py'}:Mine")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nothing_like_it\n", "needs the module 'nothing_like_it'"),
        ("x = (\n", "syntax error"),
        ("x = 1\nraise KeyError('first\\nsecond')\n", "raised KeyError"),
        ("import sys; sys.exit(3)\n", "raised SystemExit: 3"),
        ("x = unknown_name\n", "line 1"),
        ("\0", "recipe"),
    ],
)
def test_imports_that_raise(tmp_path, source, words):
    file, before = tmp_path / "broken.py", set(sys.modules)
    file.write_text(source)
    message = refused(f"{file}:A")
    assert str(file) in message
    assert words in message
    assert "None" not in message
    assert not [name for name in set(sys.modules) - before if "broken" in name]
    file.write_text("from hydra_pipe import Recipe\nclass A(Recipe): ...\n")
    assert isinstance(load_recipe(f"{file}:A", {}), Recipe)


def test_arguments_are_checked_against_the_constructor(mine):
    message = refused("digits", trainsize=5)
    assert "did you mean train_size?" in message
    assert "label_noise" in message
    assert "--set KEY=VALUE" in message
    assert "it accepts width, name_of_it" in refused(f"{mine}:Mine", hight=1)
    assert refused("digits", label_noise=2).startswith("label_noise is 2")


def test_constructors_that_raise(tmp_path):
    file = tmp_path / "strict.py"
    file.write_text(
        "from hydra_pipe import Recipe\n"
        "class A(Recipe):\n    def __init__(self, must):\n        raise ValueError('no\\nway')\n"
        "class B(Recipe): ...\n"
    )
    message = refused(f"{file}:A", must=1)
    assert "ValueError: no way" in message
    assert f"({file}, line 4)" in message
    assert "missing a required argument: 'must'" in refused(f"{file}:A")
    assert "it accepts no arguments" in refused(f"{file}:B", a=1)
