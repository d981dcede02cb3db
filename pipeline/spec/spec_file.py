"""Run specifications in TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...storage.errors import SpecError
from .checks import near


def read_spec_file(path: str, names: Sequence[str]) -> dict[str, Any]:
    """Read ``path`` into fields of a run specification.

    Args:
        path: A local TOML file.
        names: Names of the fields; in the file ``-`` may stand for ``_`` and ``[set]`` for
            ``recipe_args``.

    Raises:
        SpecError: The file cannot be read, is no TOML, or has an unknown or doubled key.
    """
    try:
        table = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"--config {path}: {error.strerror or error}; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"--config {path}: no TOML ({error})") from None
    known = ["set" if name == "recipe_args" else name for name in names]
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise SpecError(f"--config {path}: unknown key {key!r}; {near(name, known)}")
        name = "recipe_args" if name == "set" else name
        if name in values:
            raise SpecError(f"--config {path}: {key!r} is there twice, with - and with _; keep one")
        values[name] = value
    return values
