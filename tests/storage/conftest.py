"""Places to store: a temporary directory, memory://, and a disk with room for very little."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hydra_pipe.storage import threads

from tests.small_disk import mounted


@pytest.fixture(autouse=True)
def threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo ``unthreaded``: what threads do to stores is tested here."""
    monkeypatch.setattr(threads, "ThreadPoolExecutor", ThreadPoolExecutor)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Address of an empty run directory."""
    if request.param == "local":
        yield str(tmp_path / "run")
        return
    uri = f"memory://{uuid.uuid4().hex}/run"
    yield uri
    fs = fsspec.filesystem("memory")
    parent = uri.removeprefix("memory:/").rsplit("/", 1)[0]
    if fs.exists(parent):
        fs.rm(parent, recursive=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; the test is skipped where mounting is not allowed."""
    try:
        with mounted(tmp_path / "small", "1m") as place:
            yield place
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["at once", "later"])
def full_writes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `hydra_pipe.storage.files` hit a full disk: at once, or after a part was written."""
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        if request.param == "at once" or len(data) <= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:10])

    monkeypatch.setattr("hydra_pipe.storage.files.os.write", write)
