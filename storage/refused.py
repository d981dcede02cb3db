"""What the system, or a client of an object store, refuses: as this package's errors, each with a remedy."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from .errors import HydraError, StorageFull, StoreError
from .space import free_bytes
from .uri import is_local

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_WORDS = ("no space left on device", "disk quota exceeded")
_WRITE_REMEDIES = {
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or use another file system",
    errno.EEXIST: "something else is in the way there; remove it, or end the other process that writes",
}
REMEDIES = {
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the system has too many files open; end other work",
    errno.ENOMEM: "free some memory",
    errno.EACCES: "check who may read it",
    errno.EPERM: "check who may read it",
    errno.ELOOP: "a symbolic link there leads to itself; remove it",
}
"""What helps against what a system refuses, by number of the error."""
ABSENT = (FileNotFoundError, NotADirectoryError)
"""What says that nothing is there."""


@contextlib.contextmanager
def full_disk_guard(uri: str) -> Iterator[None]:
    """Turn what the system says while writing at ``uri`` into this package's errors.

    Raises:
        StorageFull: The disk is full or a quota is reached (also when zarr, pyarrow or fsspec
            wrapped that error).
        StoreError: The place cannot be written (no directory, read-only, no permission, …).
    """
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        if _is_full(error):
            raise StorageFull(
                f"no space left while writing {uri}{_free_bytes(uri)}; free some space or choose another "
                "place with --out, then run the same command again: what is committed is kept"
            ) from error
        if isinstance(error, OSError):
            remedy = _WRITE_REMEDIES.get(error.errno or 0) or (
                REMEDIES[error.errno]
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
                else "choose a writable directory with --out"
            )
            raise StoreError(f"cannot write {uri}: {reason(error)}; {remedy}") from error
        if not is_local(uri) and not isinstance(error, HydraError):
            raise StoreError(
                f"cannot write {uri}: {_said(error)}; check the connection and the credentials"
            ) from error
        raise


@contextlib.contextmanager
def readable(uri: str) -> Iterator[None]:
    """Turn what the system says while reading at ``uri`` into this package's errors.

    Raises:
        FileNotFoundError: There is nothing.
        StoreError: It is there and cannot be read (no permission, too many open files, …).
    """
    try:
        yield
    except ABSENT as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "check the disk or the connection")
        raise StoreError(f"cannot read {uri}: {reason(error)}; {remedy}, then try again") from error
    except HydraError:
        raise
    except Exception as error:
        if is_local(uri):
            raise
        raise StoreError(
            f"cannot read {uri}: {_said(error)}; check the connection and the credentials"
        ) from error


def reason(error: OSError) -> str:
    """Return what the system says, without numbers and addresses."""
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split()) or type(error).__name__


def _said(error: Exception) -> str:
    """Return one line on what a client of an object store raised."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _is_full(error: BaseException | None) -> bool:
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError):
            text = str(current).lower()
            if current.errno in _FULL or any(words in text for words in _FULL_WORDS):
                return True
        if isinstance(current, BaseExceptionGroup):
            pending += current.exceptions
        pending += [current.__cause__, current.__context__]
    return False


def _free_bytes(uri: str) -> str:
    free = free_bytes(uri)
    return "" if free is None else f" ({free / 1e6:.1f} MB free)"
