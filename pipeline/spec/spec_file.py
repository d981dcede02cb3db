"""Run specifications in TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from ...storage.errors import SpecError
from ...storage.files import read_given
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
        table = tomllib.loads(read_given(path, "--config").decode())
    except FileNotFoundError:
        raise SpecError(f"--config {path}: No such file; give a TOML file") from None
    except ValueError as error:
        raise SpecError(f"--config {path}: no TOML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise SpecError(
            f"--config {path}: no TOML for us (nested too deep); write settings, one a line"
        ) from None
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
