"""One small file that changes hands: made only where none is, and replaced only by who knows what it says.

Locally a file is made by a hard link, which fails where one is, and replaced under the kernel's lock on it
(``flock``), by a rename. On an object store both are conditional puts (``If-None-Match``, ``If-Match``). Where a
file system has neither, the same is done in steps, of which another may come in between: `LockFile.exact` says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import StoreError
from .files import DOCUMENT_BYTES, filesystem, partial_name, read_bytes
from .refused import full_disk_guard, readable
from .uri import is_local

_NO_LINKS = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EXDEV}
)
_RETRIES = 20
_PATIENCE_SECONDS = 5.0  # for the kernel's lock, which is held for a few system calls
_BLOCK = 1024  # bytes: files are padded to whole blocks, so that one can be rewritten in place on a full disk


@dataclass(frozen=True, slots=True)
class Seen:
    """A version of the file.

    Attributes:
        data: What it says.
        version: What an object store calls it; None: its contents do.
    """

    data: bytes
    version: str | None = None


class LockFile(ABC):
    """One such file.

    Attributes:
        uri: Where it is.
        exact: Whether nothing can come between looking and writing.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.exact = True

    @abstractmethod
    def read(self) -> Seen | None:
        """Return what it says; None: there is none."""

    @abstractmethod
    def create(self, data: bytes) -> Seen | None:
        """Make it; None: there is one.

        Raises:
            StoreError: Nothing can be written there.
        """

    @abstractmethod
    def swap(self, data: bytes, seen: Seen) -> Seen | None:
        """Replace what was seen; None: it says something else by now, or is gone."""

    @abstractmethod
    def remove(self, seen: Seen) -> bool:
        """Remove what was seen; False: it says something else by now."""


def lock_file(uri: str) -> LockFile:
    """Return the file at a checked address."""
    if is_local(uri):
        return _Local(uri)
    return _Memory(uri) if uri.startswith("memory:") else _Remote(uri)


class _Local(LockFile):
    def read(self) -> Seen | None:
        try:
            return Seen(read_bytes(self.uri, most=DOCUMENT_BYTES))
        except FileNotFoundError:
            return None

    def create(self, data: bytes) -> Seen | None:
        data = _padded(data)
        for attempt in range(_RETRIES):
            with full_disk_guard(self.uri):
                try:
                    os.makedirs(os.path.dirname(self.uri), exist_ok=True)
                    return self._link(data)
                except FileExistsError:
                    return None
                except FileNotFoundError:  # who has the run clears its litter, or removed the empty directory
                    if attempt == _RETRIES - 1:
                        raise
            time.sleep(0.01)
        return None

    def _link(self, data: bytes) -> Seen:
        with self._written(data) as temporary:
            try:
                os.link(temporary, self.uri)
                return Seen(data)
            except FileExistsError:
                raise
            except OSError as error:
                # A network file system may have done it and lost the answer.
                with contextlib.suppress(OSError):
                    if os.stat(temporary).st_nlink == 2:
                        return Seen(data)
                if error.errno not in _NO_LINKS:
                    raise
        descriptor = os.open(self.uri, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
        return Seen(data)

    @contextlib.contextmanager
    def _written(self, data: bytes) -> Any:
        temporary = partial_name(self.uri)
        try:
            with open(temporary, "xb", buffering=0) as file:
                file.write(data)
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def swap(self, data: bytes, seen: Seen) -> Seen | None:
        data = _padded(data)

        def replace(descriptor: int) -> None:
            for attempt in range(_RETRIES):
                try:
                    with self._written(data) as temporary:
                        os.replace(temporary, self.uri)
                    return
                except FileNotFoundError:
                    if attempt == _RETRIES - 1:
                        raise
                except OSError:
                    if len(data) != len(seen.data):
                        raise
                    # No room for another file: a sign of life must come through all the same.
                    os.pwrite(descriptor, data, 0)
                    return

        return Seen(data) if self._while_seen(seen, replace) else None

    def remove(self, seen: Seen) -> bool:
        return self._while_seen(seen, lambda descriptor: os.unlink(self.uri))

    def _while_seen(self, seen: Seen, act: Callable[[int], None]) -> bool:
        """Act while the kernel keeps others from doing so; False: the file does not say what was seen."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                descriptor = os.open(self.uri, os.O_RDWR)
            except (FileNotFoundError, NotADirectoryError):
                return False
            try:
                if not self._locked(descriptor, deadline):
                    return False
                held = os.fstat(descriptor)
                try:
                    there = os.stat(self.uri)
                except FileNotFoundError:
                    return False
                if (held.st_ino, held.st_dev) != (there.st_ino, there.st_dev):
                    continue  # replaced while we waited
                if os.read(descriptor, len(seen.data) + 1) != seen.data:
                    return False
                act(descriptor)
                return True
            finally:
                os.close(descriptor)
        return False

    def _locked(self, descriptor: int, deadline: float) -> bool:
        try:
            import fcntl
        except ImportError:
            self.exact = False
            return True
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.002)
            except OSError:  # a file system without them
                self.exact = False
                return True


class _Memory(LockFile):
    """In ``memory://``, which is one process's."""

    _mutex = threading.Lock()

    def read(self) -> Seen | None:
        fs, path = filesystem(self.uri)
        try:
            return Seen(bytes(fs.cat_file(path)))
        except FileNotFoundError:
            return None

    def create(self, data: bytes) -> Seen | None:
        with self._mutex:
            return self._put(data) if self.read() is None else None

    def swap(self, data: bytes, seen: Seen) -> Seen | None:
        with self._mutex:
            return self._put(data) if self.read() == seen else None

    def remove(self, seen: Seen) -> bool:
        with self._mutex:
            if self.read() != seen:
                return False
            fs, path = filesystem(self.uri)
            fs.rm(path)
            return True

    def _put(self, data: bytes) -> Seen:
        fs, path = filesystem(self.uri)
        fs.pipe_file(path, data)
        return Seen(data)


class _Remote(LockFile):
    """On an object store: whatever an answer says, what is there afterwards decides."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        # Others have put-if-absent alone.
        self.exact = uri.startswith("s3:")

    def read(self) -> Seen | None:
        fs, path = filesystem(self.uri)
        for _ in range(_RETRIES):
            try:
                with readable(self.uri):
                    before = _tag(fs.info(path))
                    data = bytes(fs.cat_file(path))
                    fs.invalidate_cache()
                    if before == _tag(fs.info(path)):
                        return Seen(data, before)
            except FileNotFoundError:
                return None
        return None

    def create(self, data: bytes) -> Seen | None:
        return self._settled(data, lambda fs, path: _put_new(fs, path, data))

    def swap(self, data: bytes, seen: Seen) -> Seen | None:
        conditions = {"IfMatch": seen.version} if self.exact and seen.version else {}
        if not conditions and self.read() != seen:
            return None
        return self._settled(data, lambda fs, path: fs.pipe_file(path, data, **conditions))

    def remove(self, seen: Seen) -> bool:
        if self.read() != seen:
            return False
        fs, path = filesystem(self.uri)
        with full_disk_guard(self.uri), contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)
        return True

    def _settled(self, data: bytes, put: Callable[[Any, str], object]) -> Seen | None:
        """Put, and look who has the file: an answer may be lost, and a retried put refused by its own first try."""
        failure: StoreError | None = None
        fs, path = filesystem(self.uri)
        try:
            with full_disk_guard(self.uri), contextlib.suppress(FileNotFoundError):
                put(fs, path)
        except StoreError as error:
            failure = error
        found = self.read()
        if found is not None and found.data == data:
            return found
        if found is None and failure is not None:
            raise failure
        return None


def _put_new(fs: Any, path: str, data: bytes) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except (TypeError, NotImplementedError, ValueError):  # an implementation without put-if-absent
        if fs.exists(path):
            return
        fs.pipe_file(path, data)


def _tag(info: dict[str, Any]) -> str | None:
    found = info.get("ETag") or info.get("etag") or info.get("generation")
    return None if found is None else str(found)


def _padded(data: bytes) -> bytes:
    """Return data with blanks at its end: a later version of about the same length takes as much room."""
    return data + b" " * (-len(data) % _BLOCK)
