"""What code a recipe is: digests of its source, of the part that it uses.

From the recipe's class on, everything of the user's that it names is followed: base classes, functions
and constants of its module, and what it imports from modules beside it; not installed packages. Two
digests a file tell an edit from tidying up: one of the syntax tree of what is used, without docstrings
and comments, and one of the whole text. Files are read, never imported, so that the answer does not
depend on what this process has loaded.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OWN = Path(__file__).resolve().parents[1]  # of the room `workers`
_RECIPES = _OWN / "recipes"

_LOOKS = ("show", "picture_shape")
"""What a recipe has for people to look at its samples."""

Names = dict[str, list[ast.stmt]]
Import = tuple[str, int, str | None]
"""Module, level (dots of a relative import) and the name taken from it; None: the module itself."""


def source_of(kind: type) -> dict[str, Any]:
    """Return what identifies the source of a recipe class, JSON-able.

    Returns:
        ``class`` and ``file``, names for messages; ``python``, whose syntax trees differ between
        versions; ``files``: by path, seen from the class's file, the digests ``code`` (of what is used)
        and ``text`` (of all). Without source: ``unknown``, why, instead of ``files``.
    """
    name = kind.__qualname__
    found: dict[str, Any] = {"class": name, "python": ".".join(platform.python_version_tuple()[:2])}
    file = _file_of(kind)
    if file is None:
        return {**found, **_typed(kind)}
    try:
        files = _Closure(file, _depth(kind)).follow(kind)
    except (OSError, SyntaxError, ValueError) as error:
        return {**found, "file": file.name, "unknown": f"{type(error).__name__} reading {file.name}"}
    return {**found, "file": file.name, "files": files}


def source_difference(stored: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Compare two `source_of`: return ``code`` or ``text``, what differs, or None.

    Code is the same where its syntax tree or its whole text is. Where either is unknown, nothing is known.
    """
    before, after = stored.get("files"), now.get("files")
    if before is None or after is None:
        return None
    if any(_differs(before, after, name, ("code", "text")) for name in {*before, *after}):
        return "code"
    return "text" if any(_differs(before, after, name, ("text",)) for name in after) else None


def changed_files(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the files whose text differs, but for the one that holds the class."""
    before, after = stored.get("files", {}), now.get("files", {})
    names = [name for name in sorted({*before, *after}) if _differs(before, after, name, ("text",))]
    return [name for name in names if name != now.get("file")]


def _differs(before: dict[str, Any], after: dict[str, Any], name: str, kinds: tuple[str, ...]) -> bool:
    """Whether a file is on one side alone, or none of the digests ``kinds`` of it is the same."""
    if name not in before or name not in after:
        return True
    return all(before[name][kind] != after[name][kind] for kind in kinds)


def _file_of(kind: type) -> Path | None:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    path = Path(os.path.abspath(file)) if file else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def _depth(kind: type) -> int:
    """Return how many directories above its file the module's top-level package lies."""
    module = sys.modules[kind.__module__]
    package = getattr(module, "__package__", None) or ""
    return len(package.split(".")) if package else 0


def _typed(kind: type) -> dict[str, Any]:
    """Return the source of a class typed into a session, as far as Python keeps it."""
    try:
        text = inspect.getsource(kind)
        tree = ast.parse(textwrap.dedent(text))
        _forget_looks(tree.body[0])
    except (OSError, TypeError, SyntaxError):
        return {"unknown": "the class was not read from a file"}
    return {"files": {"": {"code": _sha(_dump(tree)), "text": _sha(text.encode())}}}


class _File:
    """A parsed file: which statements bind a name, and where imported names come from."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, path.read_bytes()
        self.tree = ast.parse(self.data)
        self.bound: Names = {}
        self.imports: dict[str, list[Import]] = {}
        self.stars: list[Import] = []
        for statement in self.tree.body:
            if not _is_guard(statement):
                for name in _binds(statement):
                    self.bound.setdefault(name, []).append(statement)
                for name, place in _imports(statement):
                    if name == "*":
                        self.stars.append(place)
                    else:
                        self.imports.setdefault(name, []).append(place)
        self.used: set[int] = set()

    def digest(self) -> dict[str, str]:
        used = [statement for statement in self.tree.body if id(statement) in self.used]
        code = b"\n".join(_dump(statement) for statement in used)
        return {"code": _sha(code), "text": _sha(self.data)}


class _Closure:
    """Everything of the user's that a class names, found by reading files."""

    def __init__(self, start: Path, depth: int) -> None:
        self.start = start
        self.root = start.parents[depth]
        self.package = start.parents[depth - 1] if depth else None
        self.built_in = _RECIPES in start.resolve().parents
        self.files: dict[Path, _File | None] = {}
        self.seen: set[tuple[Path, str | None]] = set()
        self.todo: list[tuple[Path, str | None]] = []

    def follow(self, kind: type) -> dict[str, dict[str, str]]:
        """Return the digests of all files that the class uses."""
        for base in kind.__mro__:
            file = _file_of(base)
            if file is not None and self._users(file):
                held = self._open(file)
                for statement in held.bound.get(base.__qualname__, []) if held is not None else []:
                    _forget_looks(statement)
                self._add(file, base.__qualname__.partition(".")[0])
        while self.todo:
            self._visit(*self.todo.pop())
        found = {path: file.digest() for path, file in self.files.items() if file is not None and file.used}
        return {os.path.relpath(path, self.start.parent): found[path] for path in sorted(found)}

    def _add(self, path: Path, name: str | None) -> None:
        if (path, name) not in self.seen:
            self.seen.add((path, name))
            self.todo.append((path, name))

    def _visit(self, path: Path, name: str | None) -> None:
        file = self._open(path)
        if file is None:
            return
        if name is None:
            statements = [s for s in file.tree.body if not _is_guard(s)]
        else:
            statements = file.bound.get(name, [])
            for place in file.imports.get(name, []):
                self._import(path, place)
        for place in file.stars:
            self._import(path, place)
        for statement in statements:
            if id(statement) in file.used:
                continue
            file.used.add(id(statement))
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    self._add(path, node.id)
                for _, place in _imports(node):
                    self._import(path, place)

    def _open(self, path: Path) -> _File | None:
        if path not in self.files:
            try:
                self.files[path] = _File(path)
            except (OSError, SyntaxError, ValueError):
                if path == self.start:
                    raise
                self.files[path] = None
        return self.files[path]

    def _import(self, path: Path, place: Import) -> None:
        """Follow an import: to the name in a file, or to the whole file."""
        module, level, name = place
        if level == 0 and module.partition(".")[0] in (*sys.stdlib_module_names, "torch", "hydra_pipe"):
            return
        parts = module.split(".") if module else []
        bases = [path.parents[level - 1]] if level else self._roots()
        for base in bases:
            inner = base.joinpath(*parts)
            file = _module_file(inner)
            held = self._open(file) if file is not None and self._users(file) else None
            if name == "*":
                name = None
            elif name is not None and (held is None or not {name} & {*held.bound, *held.imports}):
                deeper = _module_file(inner / name)  # `from package import module`
                if deeper is not None:
                    file, name = deeper, None
            if file is not None:
                if self._users(file):
                    self._add(file, name)
                return

    def _roots(self) -> list[Path]:
        return list(dict.fromkeys([self.start.parent, self.root, *(Path(p) for p in sys.path if p)]))

    def _users(self, file: Path) -> bool:
        """Whether a file is the user's own, or of the recipe's own package."""
        real = file.resolve()
        if self.built_in or any(_OWN.parent / room in real.parents for room in _ROOMS):
            return self.built_in and _RECIPES in real.parents
        own = self.package is not None and self.package in file.parents
        place = file.relative_to(self.package) if own and self.package is not None else file
        installed = {"site-packages", "dist-packages"} & set(place.parts)
        return file == self.start or not (installed or any(Path(p) in file.parents for p in _STANDARD))


_ROOMS = ("workers", "storage", "pipeline", "cli", "hydra_pipe")
_STANDARD = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}


def _forget_looks(statement: ast.stmt) -> None:
    """Take what only shows samples out of a recipe's class: it decides no number."""
    if isinstance(statement, ast.ClassDef):
        statement.body = [part for part in statement.body if not _is_look(part)] or [ast.Pass()]


def _is_look(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return all(isinstance(target, ast.Name) and target.id in _LOOKS for target in targets)
    return isinstance(statement, ast.FunctionDef) and statement.name in _LOOKS


def _module_file(place: Path) -> Path | None:
    for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
        if place.name and file.is_file():
            return file
    return None


def _is_guard(statement: ast.stmt) -> bool:
    """Whether this is ``if __name__ == "__main__":``."""
    test = statement.test if isinstance(statement, ast.If) else None
    return isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id == "__name__"


def _binds(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement of a module binds, or whose object it changes."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name):  # also the X of `X[k] = ...`
                    yield node.id
    elif isinstance(statement, ast.Expr):
        called = statement.value.func if isinstance(statement.value, ast.Call) else statement.value
        inner = called
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        if isinstance(inner, ast.Name) and inner is not called:
            yield inner.id  # `X.update(...)`
    elif isinstance(statement, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                yield from _binds(child)
            elif isinstance(child, ast.ExceptHandler):
                for handling in child.body:
                    yield from _binds(handling)
            elif isinstance(statement, ast.For) and isinstance(child, ast.Name):
                yield child.id


def _imports(node: ast.AST) -> Iterator[tuple[str, Import]]:
    """Yield (name here, where from) of an import statement, or of those in a compound statement."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], (alias.name, 0, None)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, (node.module or "", node.level, alias.name)
    elif isinstance(node, (ast.If, ast.Try)):
        for child in ast.walk(node):
            if child is not node:
                yield from _imports(child) if isinstance(child, (ast.Import, ast.ImportFrom)) else ()


def _dump(tree: ast.AST) -> bytes:
    """Return a syntax tree as text, without positions and docstrings, which the tree loses."""
    return ast.dump(_Undocumented().visit(tree)).encode()


class _Undocumented(ast.NodeTransformer):
    """Takes texts that stand alone, docstrings above all, out of bodies."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_text(s)] or [ast.Pass()]  # type: ignore[attr-defined]
        return node


def _is_text(statement: ast.AST) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
