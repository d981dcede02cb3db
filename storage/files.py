"""Whole files at an address, local or remote.

A file is visible under its final name only once it is complete: locally it is written beside its
place under a name ending in ``.partial`` and renamed, remotely the object store's put is atomic.
A killed writer leaves such a ``.partial`` file and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from .errors import SpecError, StorageFull, StoreError
from .uri import is_local, parent

PARTIAL = ".partial"
"""Mark of every temporary name."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_WORDS = ("no space left on device", "disk quota exceeded")
_REFUSED = frozenset(
    {errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EIO}
)
_HASH_BUFFER_BYTES = 8 << 20


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
        if isinstance(error, OSError) and error.errno in _REFUSED:
            reason = os.strerror(error.errno)
            raise StoreError(
                f"cannot write {uri}: {reason}; choose a writable directory with --out"
            ) from error
        raise


def filesystem(uri: str) -> tuple[Any, str]:
    """Return the fsspec file system of a remote address and the path inside it.

    Raises:
        SpecError: The package for this scheme is not installed.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        scheme = uri.split("://")[0]
        raise SpecError(
            f"{scheme}:// needs a package that is missing here; pip install 'hydra-pipe[{scheme}]'"
        ) from error
    # Listings cached by fsspec would hide what other workers wrote.
    fs.invalidate_cache()
    return fs, path


def partial_name(path: str) -> str:
    """Return a fresh temporary sibling name of a local ``path``."""
    return f"{path}.{uuid.uuid4().hex}{PARTIAL}"


@contextlib.contextmanager
def staged(path: str, *, near: str | None = None, sync: bool = False) -> Iterator[str]:
    """Give a temporary path to write, and move it to the local ``path`` on success.

    Args:
        path: Final local path; its directory is made.
        near: Path beside which the temporary file is made, on the same file system (default: ``path``).
        sync: Whether file and directory are flushed to the disk, so that the file survives a power
            cut. Data files leave that to `hydra_pipe.storage.rundir.RunDirectory.commit`.

    Raises:
        StorageFull: The disk is full; nothing is left behind.
    """
    temporary = partial_name(near or path)
    with full_disk_guard(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            yield temporary
            if sync:
                flush(temporary)
            os.replace(temporary, path)
            if sync:
                flush(os.path.dirname(path))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def flush(path: str) -> None:
    """Flush a local file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all, and flush it to the disk.

    Raises:
        StorageFull: The disk is full; the old file, if any, is untouched.
    """
    write_parts(uri, [data], sync=True)


def write_parts(uri: str, parts: Sequence[bytes | memoryview], *, sync: bool) -> None:
    """Write the concatenated ``parts`` as one file, whole or not at all; see `staged` for ``sync``."""
    if is_local(uri):
        with staged(uri, sync=sync) as temporary, open(temporary, "xb", buffering=0) as file:
            for part in parts:
                _write_all(file.fileno(), memoryview(part).cast("B"))
        return
    with full_disk_guard(uri):
        fs, path = filesystem(uri)
        fs.pipe_file(path, b"".join(parts))


def read_bytes(uri: str) -> bytes:
    """Return the contents of a file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if is_local(uri):
        try:
            with open(uri, "rb", buffering=0) as file:
                return file.read()
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path))


Signature = tuple[int, int, int, int]
"""Times of last change (content, status), size and inode of a local file: another one means it may be another file."""


def signature(uri: str) -> Signature:
    """Return what tells whether a local file was touched since.

    Raises:
        FileNotFoundError: There is no such file.
    """
    try:
        return _signature(os.stat(uri))
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error


def read_signed(uri: str) -> tuple[bytes, Signature | None]:
    """Return the contents of a file, and its signature where it is local.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not is_local(uri):
        return read_bytes(uri), None
    try:
        with open(uri, "rb", buffering=0) as file:
            found = _signature(os.fstat(file.fileno()))
            return file.read(), found
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error


def etags(uri: str) -> dict[str, tuple[int, str | None]]:
    """Return (size, tag of the version or None) of all files below a remote ``uri``, by relative path."""
    fs, path = filesystem(uri)
    root = path.rstrip("/") + "/"
    found = fs.find(path, detail=True)
    return {name.removeprefix(root): _tag(info) for name, info in found.items() if name.startswith(root)}


def tagged(uri: str) -> tuple[int, str | None]:
    """Return size and tag of the present version of a remote file; see `etags`.

    Raises:
        FileNotFoundError: There is no such file.
    """
    fs, path = filesystem(uri)
    return _tag(fs.info(path))


def list_names(uri: str) -> list[str]:
    """Return the names of the files in a local directory, none where it is not there."""
    try:
        with os.scandir(uri) as entries:
            return [entry.name for entry in entries if not entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def exists(uri: str) -> bool:
    """Return whether there is a file or directory."""
    if is_local(uri):
        return os.path.lexists(uri)
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def remove(uri: str, *, recursive: bool = False) -> None:
    """Remove a file, or with ``recursive`` a directory; nothing happens where nothing is.

    A symbolic link is removed, never followed.
    """
    if is_local(uri):
        if recursive and os.path.isdir(uri) and not os.path.islink(uri):
            shutil.rmtree(uri)
        else:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(uri)
        return
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=recursive)


def list_files(uri: str) -> list[str]:
    """Return the paths of all files below ``uri``, relative, ``/``-separated, sorted."""
    if is_local(uri):
        found = []
        for directory, _, names in os.walk(uri):
            inner = os.path.relpath(directory, uri)
            prefix = "" if inner == "." else inner.replace(os.sep, "/") + "/"
            found += [prefix + name for name in names]
        return sorted(found)
    fs, path = filesystem(uri)
    root = path.rstrip("/") + "/"
    return sorted(name.removeprefix(root) for name in fs.find(path) if name.startswith(root))


def digest(uri: str, *, sync: bool = False) -> tuple[str, int]:
    """Return (sha256 as hex, size in bytes) of a file.

    Args:
        uri: The file.
        sync: Flush a local file to the disk first: what is vouched for must survive a power cut.

    Raises:
        FileNotFoundError: There is no such file.
    """
    hasher, size = hashlib.sha256(), 0
    buffer = bytearray(_HASH_BUFFER_BYTES)
    view = memoryview(buffer)
    with _open_to_read(uri) as file:
        if sync and is_local(uri):
            with full_disk_guard(uri):
                os.fsync(file.fileno())
        while count := file.readinto(view):
            hasher.update(view[:count])
            size += count
    return hasher.hexdigest(), size


def size_of(uri: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if is_local(uri):
        try:
            return os.stat(uri).st_size
        except NotADirectoryError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
    fs, path = filesystem(uri)
    return int(fs.size(path))


def flush_directories(root: str, paths: Sequence[str]) -> None:
    """Flush every directory between a local ``root`` and the files ``paths`` below it."""
    seen = {root}
    for path in paths:
        directory = parent(path)
        while len(directory) > len(root) and directory not in seen:
            seen.add(directory)
            directory = parent(directory)
    for directory in sorted(seen, key=len, reverse=True):
        flush(directory)


def _signature(found: os.stat_result) -> Signature:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _tag(info: Any) -> tuple[int, str | None]:
    tag = info.get("ETag") or info.get("etag")
    return int(info.get("size") or 0), None if tag is None else str(tag).strip('"')


def _open_to_read(uri: str) -> Any:
    if is_local(uri):
        return open(uri, "rb", buffering=0)
    fs, path = filesystem(uri)
    return fs.open(path, "rb", block_size=_HASH_BUFFER_BYTES)


def _write_all(descriptor: int, view: memoryview) -> None:
    # One os.write moves at most 2 GiB and may write less than asked.
    while len(view):
        view = view[os.write(descriptor, view) :]


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
    if not is_local(uri):
        return ""
    directory = uri
    while directory != "/" and not os.path.isdir(directory):
        directory = parent(directory)
    try:
        return f" ({shutil.disk_usage(directory).free / 1e6:.1f} MB free)"
    except OSError:
        return ""
