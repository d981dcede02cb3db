"""A file system that is small, and one that is nearly full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """Mount a file system of ``size``, such as ``4m``, at a directory that is made for it.

    Raises:
        PermissionError: That is not permitted here.
    """
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, check=False, capture_output=True)
    except FileNotFoundError:
        raise PermissionError("there is no mount command") from None
    if done.returncode != 0:
        raise PermissionError("mounting is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """Fill a file system up to ``leave`` free bytes; return the file to remove."""
    filler = place / ".filler"
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    filler.write_bytes(b"x" * max(0, free - leave))
    return filler
