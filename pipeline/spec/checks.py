"""The checks that fields are declared with: value in, checked and normalised value out, or SpecError."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...storage.errors import SpecError
from ...storage.secrets import holds_credentials

Check = Callable[[str, Any], Any]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{tail}": 1000**n for n, letter in enumerate("kmgt", start=1) for tail in ("", "b")}
_UNITS |= {f"{letter}{tail}": 1024**n for n, letter in enumerate("kmgt", start=1) for tail in ("i", "ib")}
MOST = 10**9
"""What a count may be where nothing says less: beyond it something overflows, or never ends."""
MOST_BYTES = 1 << 60
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")


def parse_bytes(size: Any, what: str) -> int:
    """Turn a number of bytes, or text with a unit (kB, MB, GB, TB, KiB, MiB, GiB, TiB), into bytes.

    Raises:
        SpecError: It is no size, or below one byte.
    """
    if _is_integer(size):
        value = int(size)
    else:
        match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
        if match is None or match[2].lower() not in _UNITS:
            raise SpecError(
                f"{what} {shown(size)}: no size in bytes; write a number, or one such as 4GiB or 512MB"
            )
        amount = float(match[1]) * _UNITS[match[2].lower()]
        value = int(min(amount, 2.0 * MOST_BYTES))
    if not 1 <= value <= MOST_BYTES:
        raise SpecError(f"{what} {shown(size)}: must be at least one byte and at most {MOST_BYTES >> 50} PiB")
    return value


def shown(value: Any) -> str:
    """Return a wrong value as a message shows it: its beginning."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def near(word: str, known: list[str]) -> str:
    """Return ``did you mean ...?`` with the closest of ``known``, or the whole list."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"


def _is_integer(value: Any) -> bool:
    # numpy's integers too; bool is an int that nobody means here.
    return not isinstance(value, bool) and hasattr(value, "__index__")


def one_of(*known: str, optional: bool = False) -> Check:
    """Return the check of a word out of ``known``."""

    def check(name: str, value: Any) -> str | None:
        if optional and value is None:
            return None
        if not isinstance(value, str) or value not in known:
            raise SpecError(f"{name} {shown(value)}: {near(str(value), list(known))} ({' or '.join(known)})")
        return value

    return check


def whole(least: int, most: int | None = None, *, optional: bool = False) -> Check:
    """Return the check of a whole number from ``least`` to ``most``."""

    most = MOST if most is None else most

    def check(name: str, value: Any) -> int | None:
        if optional and value is None:
            return None
        if not _is_integer(value) or not least <= int(value) <= most:
            raise SpecError(
                f"{name} {shown(value)}: must be a whole number, at least {least} and at most {most:,}"
            )
        return int(value)

    return check


def number(least: float, *, optional: bool = False, whole_above_one: bool = False) -> Check:
    """Return the check of a number from ``least`` on."""

    def check(name: str, value: Any) -> float | None:
        if optional and value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SpecError(f"{name} {shown(value)}: must be a number, at least {least:g}")
        if value < least:
            raise SpecError(f"{name} {shown(value)}: must be at least {least:g}")
        if whole_above_one and value > 1 and value != int(value):
            raise SpecError(
                f"{name} {shown(value)}: above 1 only whole GPUs can be given; use {math.ceil(value)}"
            )
        return float(value)

    return check


def between(least: float, most: float) -> Check:
    """Return the check of a number from ``least`` to ``most``."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise SpecError(f"{name} {shown(value)}: must be a number from {least:g} to {most:g}")
        return float(value)

    return check


def size(*, optional: bool = False) -> Check:
    """Return the check of a size in memory; see `parse_bytes`."""

    def check(name: str, value: Any) -> int | None:
        return None if optional and value is None else parse_bytes(value, name)

    return check


def flag(name: str, value: Any) -> bool:
    """Check a yes or no."""
    if not isinstance(value, bool):
        raise SpecError(f"{name} {shown(value)}: must be true or false")
    return value


def recipe(name: str, value: Any) -> Any:
    """Check that ``value`` names a recipe or is as good as one."""
    if isinstance(value, str):
        if not value.strip():
            raise SpecError("recipe '': must be a built-in name, module:Class or path/to/file.py:Class")
        return value.strip()
    if isinstance(value, type):
        raise SpecError(f"recipe {value.__qualname__}: a class; pass an instance, {value.__qualname__}()")
    # No import of the Recipe class here: it needs torch.
    missing = [m for m in ("model", "train_dataset", "test_dataset", "losses") if not hasattr(value, m)]
    if missing:
        raise SpecError(
            f"recipe {type(value).__name__}: has no {missing[0]}(); pass a name or a hydra_pipe.Recipe"
        )
    return value


def arguments(name: str, value: Any) -> dict[str, Any]:
    """Check keyword arguments that are to be stored as JSON."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SpecError(f"{name} {shown(value)}: must map names of constructor arguments to values")
    for key, entry in value.items():
        if not key.isidentifier():
            raise SpecError(f"{name} {key!r}: no name of an argument; use letters, digits and _")
        try:
            text = json.dumps(entry, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise SpecError(
                f"{name} {key}={shown(entry)}: must be plain data (text, number, list, table) to be stored"
            ) from None
        if holds_credentials(text):  # run.json would keep them, and everybody who reads the run
            raise SpecError(
                f"{name} {key}: holds an address with credentials; leave them out and give them through the provider's "
                "own configuration"
            )
    return dict(value)


def out(name: str, value: Any) -> str | None:
    """Check the address of a run directory."""
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise SpecError(f"{name} {shown(value)}: must be a path or URI of a directory")
    from ...storage.uri import check_uri

    check_uri(value)
    # As given: who resolves a relative path must see that it was relative (Ray jobs lose those).
    return str(os.fspath(value))


def shards(name: str, value: Any) -> int | str:
    """Check a number of shards, or ``auto``."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,18}\s*", value):
        value = int(value)
    if value == "auto":
        return "auto"
    if not _is_integer(value) or not 1 <= int(value) <= MOST:
        raise SpecError(
            f"{name} {shown(value)}: must be a whole number, at least 1 and at most {MOST:,}, or auto"
        )
    return int(value)


def segments(name: str, value: Any) -> int | str | None:
    """Check a number of segments, ``auto``, or None: not asked."""
    return None if value is None else shards(name, value)


def samples(name: str, value: Any) -> str | tuple[int, ...]:
    """Check a choice of samples as far as it can be without the dataset."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if _is_integer(value) and not hasattr(value, "__len__"):
        return str(int(value))
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise SpecError(f"{name} {shown(value)}: must be all, N, A:B, F%, a file, or positions")
    positions = list(value)
    for place, position in enumerate(positions):
        if not _is_integer(position) or not 0 <= int(position) < 2**62:
            raise SpecError(f"{name}[{place}] {shown(position)}: must be a position, a whole number from 0")
    if not positions:
        raise SpecError(f"{name}: no sample is named; give at least one, or all")
    return tuple(int(position) for position in positions)


def patterns(name: str, value: Any) -> tuple[str, ...] | None:
    """Check patterns over names, in a list or as text with commas."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, (bytes, Mapping)) or not hasattr(parts, "__iter__"):
        raise SpecError(f"{name} {shown(value)}: must be patterns over names of parameters, such as fc2.*")
    listed = list(parts)
    if not listed or not all(isinstance(part, str) and part.strip() for part in listed):
        raise SpecError(
            f"{name} {shown(value)}: must be patterns over names of parameters, such as fc2.*,head.weight"
        )
    return tuple(dict.fromkeys(part.strip() for part in listed))


def address(name: str, value: Any) -> str | None:
    """Check the address of a Ray cluster."""
    if value is None:
        return None
    if value in ("auto", "local"):
        return str(value)
    return ray_address(value, name)


def ray_address(value: Any, what: str) -> str:
    """Check that ``value`` is ``host:port`` of a Ray cluster.

    Raises:
        SpecError: It is something else, such as a Ray Client or dashboard address.
    """
    if isinstance(value, str) and "://" in value:
        raise SpecError(
            f"{what} {value}: must be host:port of the cluster (its GCS port, 6379 by default); "
            "from outside the cluster use `ray job submit`"
        )
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise SpecError(f"{what} {shown(value)}: must be host:port, auto or local")
    return str(value)


def steps(name: str, value: Any) -> tuple[int, ...] | None:
    """Check a list of training steps."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    try:
        found = tuple(dict.fromkeys(int(part) for part in parts))
    except (TypeError, ValueError):
        found = ()
    if not found or min(found) < 0 or max(found) > MOST:
        raise SpecError(f"{name} {shown(value)}: write steps of the training, from 0 on, such as 0,100,400")
    return found
