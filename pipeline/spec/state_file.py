"""A file of weights as part of a specification: where it is, and which file it must be."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from ...storage.errors import SpecError
from ...storage.files import digest, exists
from ...storage.uri import check_uri, is_local

ENDINGS = (".safetensors", ".pt", ".pth")


def state_file(name: str, value: Any) -> str | None:
    """Check that a file of weights is there; return its address, a local path made absolute.

    Workers see it under this address: a relative path would mean another file where they run.
    """
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value).endswith(ENDINGS):
        raise SpecError(f"{name} {value!r}: must be a file of weights, {', '.join(ENDINGS)}")
    uri = check_uri(value)
    if not exists(uri) or (is_local(uri) and not os.path.isfile(uri)):
        raise SpecError(f"{name} {uri}: no such file; correct the path, or put the file back")
    return uri


def identity_of(uri: str | None) -> str | None:
    """Return what decides numbers of a file of weights: its name and digest, not where it lies."""
    if uri is None:
        return None
    return f"{uri.rsplit('/', 1)[-1]} sha256:{sha256_of(uri)}"


def sha256_of(uri: str) -> str:
    """Return the digest of a file; read again only where it has changed."""
    if not is_local(uri):
        return digest(uri)[0]
    try:
        known = os.stat(uri)
        return _local(uri, known.st_size, known.st_mtime_ns)
    except OSError as error:
        raise SpecError(f"{uri}: {error.strerror or error}; put the file of weights back") from error


@lru_cache(maxsize=8)
def _local(uri: str, _size: int, _changed: int) -> str:
    return digest(uri)[0]
