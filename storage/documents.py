"""JSON documents of a run: strict, readable by any JSON parser, optionally sealed by a digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import CorruptStore

SEAL = "document_sha256"
"""Key of the digest over the rest of a sealed document."""
DEEPEST = 64
"""Lists and objects within each other that a document may have; ours have seven."""


def plain(value: Any) -> Any:
    """Return ``value`` built from JSON's own types only.

    numpy scalars and arrays are converted; NaN and infinities become None, since JSON has none.

    Raises:
        TypeError: It holds something else.
    """
    if value is None or type(value) in (str, bool, int):  # most values
        return value
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON: {value!r}")


def dump(document: Mapping[str, Any], *, seal: bool = False) -> bytes:
    """Return a document as UTF-8 JSON; with ``seal``, `load` notices any later change."""
    body = plain(document)
    if seal:
        body[SEAL] = _digest(body)
    return (json.dumps(body, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def load(data: bytes, where: str) -> dict[str, Any]:
    """Return the document in ``data``, without its seal.

    Args:
        data: What `dump` returned.
        where: Address, for messages.

    Raises:
        CorruptStore: It is not a JSON object, or its seal is broken.
    """
    body = parse(data, where)
    seal = body.pop(SEAL, None)
    if seal is not None and seal != _digest(body):
        raise CorruptStore(f"{where} was changed after it was written; remove it and run the stage again")
    return body


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in ``data``: strict, and of a depth and size of numbers that all of us can handle.

    Raises:
        CorruptStore: It is something else.
    """
    try:
        body = json.loads(data, parse_constant=_no_number, parse_float=_finite)
        if b"\\u" in data:  # half a character, which no file of ours could hold
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else f"deeper than {DEEPEST} levels"
        raise CorruptStore(
            f"{where} is damaged, it is not JSON ({why}); restore it or remove it and run again"
        ) from error
    if not isinstance(body, dict):
        raise CorruptStore(f"{where} holds no JSON object; restore it or remove it and run again")
    level: list[Any] = [body]
    depth = 0
    while level:
        if (depth := depth + 1) > DEEPEST:
            raise CorruptStore(
                f"{where} is damaged, it is not JSON of ours (deeper than {DEEPEST} levels); restore it or remove it and run again"
            )
        inner = (item for held in level for item in (held.values() if isinstance(held, dict) else held))
        level = [item for item in inner if isinstance(item, dict | list)]
    return body


@contextlib.contextmanager
def taken_apart(where: str) -> Iterator[None]:
    """Take a document or metadata apart within; what does not fit is damage.

    Raises:
        CorruptStore: Names ``where``.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise CorruptStore(f"{where} is damaged ({why}); run the stage again") from error


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond float64")
    return value


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
