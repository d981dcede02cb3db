"""Whole files at an address, local or remote.

A file is visible under its final name only once it is complete: locally it is written beside its
place under a name ending in ``.partial`` and renamed, remotely the object store's put is atomic.
A killed writer leaves such a ``.partial`` file and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from .errors import CorruptStore, SpecError, StoreError
from .refused import ABSENT, full_disk_guard, readable, reason
from .uri import is_local, parent

PARTIAL = ".partial"
"""Mark of every temporary name."""

_HASH_BUFFER_BYTES = 8 << 20

DOCUMENT_BYTES = 256 << 20
"""The largest document (``run.json``, a manifest, metadata) that is read."""
FILE_BYTES = 4 << 30
"""The largest file of a run that is read whole: a chunk has 2 GiB at most."""
GIVEN_BYTES = 64 << 20
"""The largest file of settings or positions that is read for a user."""


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


def read_bytes(uri: str, *, most: int = FILE_BYTES) -> bytes:
    """Return the contents of a file.

    Args:
        uri: The file.
        most: Bytes that a local one may have.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptStore: It is no regular file (a pipe, a device), or larger than ``most``.
        StoreError: It cannot be read.
    """
    return read_signed(uri, most=most)[0]


def read_given(path: str, what: str, *, most: int = GIVEN_BYTES) -> bytes:
    """Return the contents of a local file that a user named: the door for all of them.

    Args:
        path: As given; ``~`` is the home directory.
        what: The option, for messages.
        most: Bytes it may have.

    Raises:
        FileNotFoundError: There is no such file.
        SpecError: It is no regular file, too large, or cannot be read.
    """
    try:
        with open_regular(os.path.expanduser(path)) as file:
            # What says it is a regular file may still have no end (some of /proc).
            data = bytes(io.BufferedReader(file).read(most + 1))
    except FileNotFoundError:
        raise
    except StoreError as error:
        raise SpecError(f"{what} {path}: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise SpecError(f"{what} {path}: cannot be read ({why}); give a text file") from None
    if len(data) > most:
        raise SpecError(f"{what} {path}: has more than the {most:,} bytes that are read; give a smaller file")
    return data


def open_regular(path: str) -> Any:
    """Open a local regular file to read it, unbuffered: neither a pipe, which waits, nor a device without end.

    Raises:
        OSError: It cannot be opened.
        CorruptStore: It is something else.
    """
    # Not blocking, or opening a pipe that nobody writes to would wait without end.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise CorruptStore(f"{path} is no regular file; put a file there")
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


Signature = tuple[int, int, int, int]
"""Times of last change (content, status), size and inode of a local file: another one means it may be another file."""


def signature(uri: str) -> Signature:
    """Return what tells whether a local file was touched since.

    Raises:
        FileNotFoundError: There is no such file.
    """
    with readable(uri):
        return _signature(os.stat(uri))


def read_signed(uri: str, *, most: int = FILE_BYTES) -> tuple[bytes, Signature | None]:
    """Return the contents of a file, and its signature where it is local; see `read_bytes`.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptStore: It is no regular file (a pipe, a device), or larger than ``most``.
        StoreError: It cannot be read.
    """
    if not is_local(uri):
        fs, path = filesystem(uri)
        with readable(uri):
            # s3fs would ask for the size first, to read large files in several parts.
            whole = {"max_concurrency": 1} if uri.startswith("s3://") else {}
            return bytes(fs.cat_file(path, **whole)), None
    with _open_to_read(uri) as file, readable(uri):
        known = os.fstat(file.fileno())
        if known.st_size > most:
            raise CorruptStore(
                f"{uri} has {known.st_size:,} bytes, at most {most:,} are read; restore the file"
            )
        return bytes(file.read()), _signature(known)


Tag = tuple[int, str | None]
"""Size of a remote file, and what its store calls this version of it (None: it does not say)."""


def etags(uri: str) -> dict[str, Tag]:
    """Return the tags of all files below a remote ``uri``, by relative path."""
    fs, path = filesystem(uri)
    root = path.rstrip("/") + "/"
    with readable(uri):
        found = fs.find(path, detail=True)
    return {name.removeprefix(root): _tag(info) for name, info in found.items() if name.startswith(root)}


def tagged(uri: str) -> Tag:
    """Return size and tag of the present version of a remote file; see `etags`.

    Raises:
        FileNotFoundError: There is no such file.
    """
    fs, path = filesystem(uri)
    with readable(uri):
        return _tag(fs.info(path))


def list_names(uri: str) -> list[str]:
    """Return the names of the files in a local directory, none where it is not there.

    Raises:
        StoreError: It cannot be read: its files are not absent.
    """
    try:
        with readable(uri), os.scandir(uri) as entries:
            return [entry.name for entry in entries if not entry.is_dir()]
    except FileNotFoundError:
        return []


def exists(uri: str) -> bool:
    """Return whether there is a file or directory.

    Raises:
        StoreError: The system does not say: what cannot be looked at is not absent.
    """
    try:
        with readable(uri):
            if is_local(uri):
                os.lstat(uri)
                return True
            fs, path = filesystem(uri)
            return bool(fs.exists(path))
    except FileNotFoundError:
        return False


def remove(uri: str, *, recursive: bool = False) -> None:
    """Remove a file, or with ``recursive`` a directory; nothing happens where nothing is.

    A symbolic link is removed, never followed.
    """
    if is_local(uri):
        with full_disk_guard(uri):
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
    """Return the paths of all files below ``uri``, relative, ``/``-separated, sorted; none where nothing is.

    Raises:
        StoreError: A directory cannot be read: its files are not absent.
    """
    if is_local(uri):
        return sorted(prefix + name for prefix, _, names in walk(uri) for name in names)
    fs, path = filesystem(uri)
    root = path.rstrip("/") + "/"
    with readable(uri):
        return sorted(name.removeprefix(root) for name in fs.find(path) if name.startswith(root))


def walk(uri: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Give (relative path with a final ``/``, directories, files) of each local directory below ``uri``.

    Raises:
        StoreError: One cannot be read. (``os.walk`` alone would pass over it without a word.)
    """

    def stop(error: OSError) -> None:
        if not isinstance(error, ABSENT):  # removed meanwhile, or never there
            with readable(str(error.filename or uri)):
                raise error

    for directory, folders, names in os.walk(uri, onerror=stop):
        inner = os.path.relpath(directory, uri)
        yield "" if inner == "." else inner.replace(os.sep, "/") + "/", folders, names


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
        with readable(uri):
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
        with readable(uri):
            return os.stat(uri).st_size
    fs, path = filesystem(uri)
    with readable(uri):
        return int(fs.size(path))


def used_bytes(uri: str) -> int:
    """Return the bytes of all files below a local ``uri``."""
    found = 0
    for prefix, _, names in walk(uri):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                found += os.lstat(f"{uri}/{prefix}{name}").st_size
    return found


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


def _tag(info: Any) -> Tag:
    tag = info.get("ETag") or info.get("etag")
    return int(info.get("size") or 0), None if tag is None else str(tag).strip('"')


def _open_to_read(uri: str) -> Any:
    if is_local(uri):
        with readable(uri):
            try:
                return open_regular(uri)
            except IsADirectoryError as error:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
    fs, path = filesystem(uri)
    with readable(uri):
        return fs.open(path, "rb", block_size=_HASH_BUFFER_BYTES)


def _write_all(descriptor: int, view: memoryview) -> None:
    # One os.write moves at most 2 GiB and may write less than asked.
    while len(view):
        view = view[os.write(descriptor, view) :]
