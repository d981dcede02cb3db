"""Importing a user's module so that its recipe also works on machines that lack the file.

cloudpickle writes classes of an importable module by reference. What comes from a recipe file, its
siblings included, is registered to be written by value instead.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cloudpickle

from ...storage.errors import HydraError, RecipeError
from .beside import FOUND, look_beside

_LOCK = threading.RLock()  # sys.path and sys.modules are the whole process's


def file_module(path: str, reference: str) -> ModuleType:
    """Return the module of the Python file ``path``, imported under a name of its own.

    The name is made of the path and the content, so that two files of one name do not meet and an
    edited file is read anew. Its directory is on ``sys.path`` while it is being imported only.

    Raises:
        RecipeError: There is no such file, or it raises while being imported.
    """
    file = Path(os.path.abspath(os.path.expanduser(path)))
    if file.suffix != ".py" or not file.is_file():
        near = [str(found) for found in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else []
        hint = f"the Python files there are {', '.join(near[:5])}" if near else "check the path"
        raise RecipeError(f"recipe {reference!r}: there is no Python file {file}: {hint}")
    try:
        digest = hashlib.sha256(os.fsencode(file) + b"\0" + file.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise RecipeError(
            f"recipe {reference!r}: {file} cannot be read ({error.strerror}): check it"
        ) from error
    stem = "".join(c if c.isalnum() else "_" for c in file.stem)
    name = f"_hydra_pipe_recipe_{digest}_{stem}"
    with _LOCK:
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs, since dataclasses look their module up there
        try:
            with _siblings_of(file.parent), _explained(reference, file):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        cloudpickle.register_pickle_by_value(module)
        look_beside(file.parent, file)
        return module


def searched_module(name: str) -> ModuleType:
    """Return the importable module ``name``, looked for in the working directory last.

    Raises:
        RecipeError: There is no such module, or it raises while being imported.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise RecipeError(
            f"recipe module {name!r} is no module name: say package.module:Class or file.py:Class"
        )
    with _LOCK:
        here = Path.cwd()
        try:
            known = importlib.util.find_spec(name.partition(".")[0]) is not None
        except (ImportError, ValueError):
            known = False
        with contextlib.ExitStack() as stack:
            if not known:
                stack.enter_context(_siblings_of(here))
            stack.enter_context(_explained(name, None))
            module = importlib.import_module(name)
            if not known and module.__file__:
                look_beside(here, Path(module.__file__))
            return module


def top_level_classes(path: Path) -> list[str]:
    """Return the names of the classes a Python file defines, without running it; [] if unreadable."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def one_line(error: BaseException) -> str:
    """Return the error's message on one line."""
    return " ".join(str(error).split())


def raised_where(error: BaseException, file: Path | None = None) -> str:
    """Return ``" (file, line n)"`` of the innermost frame, in ``file`` if it passed there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and frame.filename == str(file)] or frames
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


@contextlib.contextmanager
def _explained(reference: str, file: Path | None) -> Iterator[None]:
    """Turn whatever an import raises into one line."""
    try:
        yield
    except HydraError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or one_line(error)
        if file is None and (reference == missing or reference.startswith(f"{missing}.")):
            raise RecipeError(
                f"there is no module {missing!r} for the recipe {reference!r}: install it, run from the directory "
                "that holds it, or say path/to/file.py:Class"
            ) from error
        raise RecipeError(
            f"recipe {reference!r} needs the module {missing!r}, which is not there"
            f"{raised_where(error, file)}: install it"
        ) from error
    except SyntaxError as error:
        where = f" in {error.filename}, line {error.lineno}" if error.filename else ""
        raise RecipeError(
            f"recipe {reference!r} has a syntax error{where} ({error.msg}): correct it"
        ) from error
    except (Exception, SystemExit) as error:  # a script without a main guard may call sys.exit
        raise RecipeError(
            f"importing recipe {reference!r} raised {type(error).__name__}: {one_line(error)}"
            f"{raised_where(error, file)}: correct it there"
        ) from error


@contextlib.contextmanager
def _siblings_of(directory: Path) -> Iterator[None]:
    """Let imports find the modules beside a recipe; have cloudpickle write those by value.

    A module that an earlier recipe imported from another directory gives way to one of the same
    name in this directory, which would be silently ignored otherwise.
    """
    for name, place in list(FOUND.items()):
        if place != directory and _provides(directory, name.partition(".")[0]):
            sys.modules.pop(name, None)
            del FOUND[name]
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()  # the files may be younger than the finders' listing
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(directory))
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            if _is_beside(module, directory):
                FOUND[name] = directory
                cloudpickle.register_pickle_by_value(module)


def _provides(directory: Path, name: str) -> bool:
    return (directory / f"{name}.py").is_file() or (directory / name).is_dir()


def _is_beside(module: ModuleType, directory: Path) -> bool:
    """Tell whether the module was found through ``directory`` and is no installed package in it."""
    file = getattr(module, "__file__", None)
    if not file or not file.endswith(".py"):
        return False
    top = module.__name__.partition(".")[0]
    path = Path(os.path.abspath(file))
    return (
        path in (directory / f"{top}.py", directory / top / "__init__.py")
        or (directory / top) in path.parents
    )
