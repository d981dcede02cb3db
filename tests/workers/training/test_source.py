"""Digests of a recipe's source: all that it uses, nothing that it does not, and no layout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.recipes.loading import load_recipe
from hydra_pipe.workers.training.source import changed_files, source_difference, source_of

MAIN = """\
import math
from hydra_pipe import Recipe
import tools
from tools import scale as scaled
from pack import part
from pack.inner import *

SETTINGS = {"rate": 1}
SETTINGS["decay"] = 2
SETTINGS.update(more=3)
UNUSED = {"rate": 1}
try:
    import missing_module
except ImportError:
    missing_module = None
if math.pi > 3:
    FLAG = 1


class Base(Recipe):
    def model(self):
        return SETTINGS, FLAG


class Mine(Base):
    def losses(self, model, batch):
        from late import loss
        return loss(scaled(starred(part.value)))


class Other(Base):
    pass


if __name__ == "__main__":
    SETTINGS["rate"] = 4
"""

FILES = {
    "mine.py": MAIN,
    "tools.py": "from deep import factor\ndef scale(x):\n    return x * factor\ndef unused():\n    return 1\n",
    "deep.py": "factor = 2\nother = 3\n",
    "late.py": "def loss(x):\n    return x\n",
    "pack/__init__.py": "",
    "pack/part.py": "from . import sibling\nvalue = sibling.value\n",
    "pack/sibling.py": "value = 1\n",
    "pack/inner.py": "def starred(x):\n    return x\n",
}


@pytest.fixture
def place(tmp_path: Path) -> Any:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def look(place: Path) -> dict[str, Any]:
    return source_of(type(load_recipe(f"{place}/mine.py:Mine", {})))


EDITS = [
    ("mine.py", 'SETTINGS = {"rate": 1}', 'SETTINGS = {"rate": 9}', "code"),
    ("mine.py", 'SETTINGS["decay"] = 2', 'SETTINGS["decay"] = 9', "code"),
    ("mine.py", "more=3", "more=9", "code"),
    ("mine.py", "FLAG = 1", "FLAG = 9", "code"),
    ("mine.py", "return SETTINGS, FLAG", "return FLAG, SETTINGS", "code"),
    ("tools.py", "x * factor", "x + factor", "code"),
    ("deep.py", "factor = 2", "factor = 9", "code"),
    ("late.py", "return x", "return -x", "code"),
    ("pack/part.py", "sibling.value", "-sibling.value", "code"),
    ("pack/sibling.py", "value = 1", "value = 9", "code"),
    ("pack/inner.py", "return x", "return -x", "code"),
    ("mine.py", 'UNUSED = {"rate": 1}', "UNUSED = 9", "text"),
    ("mine.py", 'SETTINGS["rate"] = 4', 'SETTINGS["rate"] = 9', "text"),
    ("mine.py", "class Other(Base):\n    pass", "class Other(Base):\n    x = 1", "text"),
    ("mine.py", "    def model", '    """Said."""\n\n    def model', "text"),
    ("tools.py", "x * factor", "(x   *  factor)  # twice", "text"),
    ("tools.py", "return 1", "return 9", "text"),
    ("deep.py", "other = 3", "other = 9", "text"),
]


@pytest.mark.parametrize(("name", "before", "after", "what"), EDITS)
def test_what_is_used_is_code_and_the_rest_is_text(name, before, after, what, place):
    first = look(place)
    assert before in FILES[name]
    (place / name).write_text(FILES[name].replace(before, after))
    second = look(place)
    assert source_difference(first, second) == what
    assert changed_files(first, second) == ([] if name == "mine.py" else [name])
    assert source_difference(first, first) is None


def test_which_files_are_the_recipes(place):
    found = look(place)
    assert (found["class"], found["file"]) == ("Mine", "mine.py")
    # An empty file has nothing to use.
    assert sorted(found["files"]) == sorted({*FILES} - {"pack/__init__.py"})


def test_a_file_that_went_away_is_a_difference(place):
    first = look(place)
    (place / "mine.py").write_text(MAIN.replace("from late import loss", "loss = abs"))
    assert source_difference(first, look(place)) == "code"


def test_it_does_not_matter_what_is_loaded_already(place):
    first = look(place)
    sys.path.insert(0, str(place))
    try:
        import late  # noqa: F401
    finally:
        sys.path.remove(str(place))
    assert look(place) == first


def test_a_built_in_recipe_is_its_own_modules():
    found = source_of(Digits)
    assert {"digits.py", "image.py"} <= set(found["files"])
    assert not [name for name in found["files"] if "/" in name]


def test_a_class_of_an_installed_package_does_not_drag_it_in():
    import torch

    found = source_of(torch.utils.data.TensorDataset)
    assert all(not name.startswith("../../../..") for name in found["files"])


def test_a_class_without_a_file_is_unknown_and_says_so():
    kind = type("Typed", (), {"__module__": "nowhere"})
    found = source_of(kind)
    assert "unknown" in found
    assert source_difference(found, found) is None
    assert source_difference(found, source_of(Digits)) is None


SHOWN = '''\

    picture_shape = (8, 8)

    def show(self, item):
        """How a digit looks."""
        return unused_drawing(item)
'''


def test_how_samples_are_shown_is_no_part_of_what_a_recipe_is(tmp_path: Path, monkeypatch: Any) -> None:
    """A recipe that gets `show` after it was run is the same recipe."""
    text = "from hydra_pipe import Recipe\n\n\ndef unused_drawing(item):\n    return 1\n\n\n"
    body = "class Seen(Recipe):\n    def model(self):\n        return 1\n"
    found = []
    for more in ("", SHOWN, SHOWN.replace("(8, 8)", "(28, 28)")):
        (tmp_path / "seen.py").write_text(text + body + more)
        sys.modules.pop("seen", None)
        found.append(source_of(type(load_recipe(f"{tmp_path}/seen.py:Seen", {}))))
    assert source_difference(found[0], found[1]) == "text"
    assert source_difference(found[1], found[2]) == "text"
    (tmp_path / "seen.py").write_text(text + body.replace("return 1", "return 2"))
    other = source_of(type(load_recipe(f"{tmp_path}/seen.py:Seen", {})))
    assert source_difference(found[0], other) == "code"
