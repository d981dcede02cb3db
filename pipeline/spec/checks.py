"""The check of every field of a RunSpec: value in, checked and normalised value out, or SpecError."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from ...storage.errors import SpecError
from .. import vocabulary

Check = Callable[[str, Any], Any]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{tail}": 1000**n for n, letter in enumerate("kmgt", start=1) for tail in ("", "b")}
_UNITS |= {f"{letter}{tail}": 1024**n for n, letter in enumerate("kmgt", start=1) for tail in ("i", "ib")}
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
                f"{what} {size!r}: no size in bytes; write a number, or one such as 4GiB or 512MB"
            )
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    if value < 1:
        raise SpecError(f"{what} {size!r}: must be at least one byte")
    return value


def near(word: str, known: list[str]) -> str:
    """Return ``did you mean ...?`` with the closest of ``known``, or the whole list."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"


def _is_integer(value: Any) -> bool:
    # numpy's integers too; bool is an int that nobody means here.
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _one_of(*known: str) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise SpecError(f"{name} {value!r}: {near(str(value), list(known))} ({' or '.join(known)})")
        return value

    return check


def _whole(least: int, most: int | None = None, *, optional: bool = False) -> Check:
    limit = f"at least {least}" if most is None else f"{least} to {most}"

    def check(name: str, value: Any) -> int | None:
        if optional and value is None:
            return None
        if not _is_integer(value) or int(value) < least or (most is not None and int(value) > most):
            raise SpecError(f"{name} {value!r}: must be a whole number, {limit}")
        return int(value)

    return check


def _number(least: float, *, optional: bool = False, whole_above_one: bool = False) -> Check:
    def check(name: str, value: Any) -> float | None:
        if optional and value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SpecError(f"{name} {value!r}: must be a number, at least {least:g}")
        if value < least:
            raise SpecError(f"{name} {value!r}: must be at least {least:g}")
        if whole_above_one and value > 1 and value != int(value):
            raise SpecError(f"{name} {value!r}: above 1 only whole GPUs can be given; use {math.ceil(value)}")
        return float(value)

    return check


def _size(*, optional: bool = False) -> Check:
    def check(name: str, value: Any) -> int | None:
        return None if optional and value is None else parse_bytes(value, name)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{name} {value!r}: must be true or false")
    return value


def _recipe(name: str, value: Any) -> Any:
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


def _arguments(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SpecError(f"{name} {value!r}: must map names of constructor arguments to values")
    for key, entry in value.items():
        if not key.isidentifier():
            raise SpecError(f"{name} {key!r}: no name of an argument; use letters, digits and _")
        try:
            json.dumps(entry, allow_nan=False)
        except (TypeError, ValueError):
            raise SpecError(
                f"{name} {key}={entry!r}: must be plain data (text, number, list, table) to be stored"
            ) from None
    return dict(value)


def _out(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise SpecError(f"{name} {value!r}: must be a path or URI of a directory")
    from ...storage.uri import check_uri

    check_uri(value)
    # As given: who resolves a relative path must see that it was relative (Ray jobs lose those).
    return str(os.fspath(value))


def _shards(name: str, value: Any) -> int | str:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value)
    if value == "auto":
        return "auto"
    if not _is_integer(value) or int(value) < 1:
        raise SpecError(f"{name} {value!r}: must be a whole number, at least 1, or auto")
    return int(value)


def _samples(name: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if _is_integer(value) and not hasattr(value, "__len__"):
        return str(int(value))
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise SpecError(f"{name} {value!r}: must be all, N, A:B, F%, a file, or positions")
    positions = list(value)
    for place, position in enumerate(positions):
        if not _is_integer(position) or int(position) < 0:
            raise SpecError(f"{name}[{place}] {position!r}: must be a position, a whole number from 0")
    if not positions:
        raise SpecError(f"{name}: no sample is named; give at least one, or all")
    return tuple(int(position) for position in positions)


def _address(name: str, value: Any) -> str | None:
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
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SpecError(f"{what} {value!r}: must be host:port, auto or local")
    return str(value)


def _steps(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    try:
        steps = tuple(dict.fromkeys(int(part) for part in parts))
    except (TypeError, ValueError):
        steps = ()
    if not steps or min(steps) < 0:
        raise SpecError(f"{name} {value!r}: write steps of the training, from 0 on, such as 0,100,400")
    return steps


CHECKS: dict[str, Check] = {
    "recipe": _recipe,
    "recipe_args": _arguments,
    "out": _out,
    "shards": _shards,
    "track": _samples,
    "test": _samples,
    "mode": _one_of(*get_args(vocabulary.Mode)),
    "hessian": _one_of(*get_args(vocabulary.Hessian)),
    "targets": _one_of(*vocabulary.KINDS),
    "exact_rank": _whole(0),
    "dtype": _one_of("float32", "float64"),
    "epochs": _whole(1, optional=True),
    "batch_size": _whole(1, optional=True),
    "seed": _whole(0, 2**63 - 1, optional=True),
    "seeds": _whole(1),
    "executor": _one_of("ray", "serial"),
    "address": _address,
    "gpus_per_actor": _number(0, optional=True, whole_above_one=True),
    "cpus_per_actor": _number(0.01),
    "workers": _whole(1, optional=True),
    "threads": _whole(1, optional=True),
    "device": _one_of("auto", "cpu", "cuda"),
    "overwrite": _flag,
    "batch_norm": _one_of("constant", "coupled"),
    "per_sample": _one_of("auto", "vjp"),
    "memory": _size(optional=True),
    "reduce_memory": _size(),
    "checkpoint_every": _whole(1, optional=True),
    "curvature_checkpoints": _whole(1),
    "curvature_at": _steps,
    "curvature_samples": _whole(1),
    "curvature_core": _whole(0),
    "max_attempts": _whole(1),
    "start_timeout": _number(0.1),
}
