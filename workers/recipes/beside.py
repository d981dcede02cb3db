"""Modules beside a recipe that it imports late, inside a method, here and in workers elsewhere.

While a recipe's file is imported its directory is on ``sys.path``; later it is not. A finder at the end
of ``sys.meta_path`` then answers imports that code of that directory makes, and no others. Workers are
sent the sources of what a recipe may import there, for machines that lack the directory.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import importlib
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import cloudpickle

_MACHINERY = ("<frozen importlib", importlib.__file__)

_ROOTS: dict[str, set[str]] = {}
"""Directory -> the recipe files loaded from it."""

_PLACES: dict[str, str] = {}
"""Directory of code, as its functions name it -> where its modules are in this process."""

FOUND: dict[str, Path] = {}
"""Name of every module found beside a recipe -> the directory it was searched in."""


class _Finder:
    """Looks beside the recipe whose code imports; see ``sys.meta_path``."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module beside the importing code, None where there is none."""
        directory = None if path is not None else _asking()
        if directory is None:
            return None
        spec = PathFinder.find_spec(name, [_PLACES[directory]])
        if spec is not None:
            FOUND[name] = Path(directory)
        return spec


def look_beside(directory: Path, file: Path) -> None:
    """Let code in ``directory``, such as the recipe's ``file``, import what lies there from now on."""
    _ROOTS.setdefault(str(directory), set()).add(str(file))
    _place(str(directory), str(directory))


def packed(handler: Any) -> bytes:
    """Return a handler as bytes that `unpacked` reads, with the sources its recipe may import late."""
    sources = {directory: _sources(directory, files) for directory, files in _ROOTS.items()}
    return pickle.dumps((sources, cloudpickle.dumps(handler)))


def unpacked(payload: bytes) -> Any:
    """Inverse of `packed`, in another process."""
    sources, handler = pickle.loads(payload)
    with contextlib.ExitStack() as stack:
        for directory, files in sources.items():
            if files:
                _place(directory, _kept(directory, files))
                stack.enter_context(_on_path(_PLACES[directory]))
        return cloudpickle.loads(handler)


def _place(directory: str, place: str) -> None:
    _PLACES[directory] = _PLACES[place] = place
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
    importlib.invalidate_caches()


def _asking() -> str | None:
    """Return the known directory that holds the code which imports; None for any other code."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    if frame is None:
        return None
    file = Path(os.path.abspath(frame.f_code.co_filename))
    if "site-packages" in file.parts:  # an environment below the recipe's directory
        return None
    return next((str(parent) for parent in file.parents if str(parent) in _PLACES), None)


def _sources(directory: str, files: set[str]) -> dict[str, bytes]:
    """Return the Python files beside a recipe that it, or one of them, imports: by path below it."""
    found: dict[str, bytes] = {}
    root = Path(directory)
    names = [name for name, place in FOUND.items() if str(place) == directory]
    todo = [*map(Path, files), *_files_of(root, names)]
    seen: set[Path] = set()
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        with contextlib.suppress(OSError):
            source = file.read_bytes()
            if str(file) not in files:
                found[file.relative_to(root).as_posix()] = source
            todo += _files_of(root, _imports(source))
    return found


def _imports(source: bytes) -> set[str]:
    """Return the top-level names of what Python source imports, anywhere in it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _files_of(root: Path, names: Sequence[str] | set[str]) -> list[Path]:
    """Return the files of the modules and packages ``names`` in ``root``; none where there are none."""
    found = []
    for name in sorted(names):
        if (root / f"{name}.py").is_file():
            found.append(root / f"{name}.py")
        elif (root / name).is_dir():
            found += sorted((root / name).rglob("*.py"))
    return found


def _kept(directory: str, files: dict[str, bytes]) -> str:
    """Return a directory of this machine that holds the files: the one they come from, or a new one."""
    with contextlib.suppress(OSError):
        if all((Path(directory) / name).read_bytes() == source for name, source in files.items()):
            return directory
    place = tempfile.mkdtemp(prefix="hydra-pipe-recipe-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for name, source in files.items():
        path = Path(place) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)
    return place


@contextlib.contextmanager
def _on_path(directory: str) -> Iterator[None]:
    sys.path.append(directory)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)
