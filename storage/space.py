"""Room on a disk: how much there is, and refusing to begin what will not find enough."""

from __future__ import annotations

import os
import shutil

from .errors import StorageFull
from .uri import is_local, parent


def free_bytes(uri: str) -> int | None:
    """Return the bytes free where ``uri`` is or will be; None where nobody says."""
    if not is_local(uri):
        return None
    directory = uri
    while directory != "/" and not os.path.isdir(directory):
        directory = parent(directory)
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None


def require_free(uri: str, needed: int, what: str) -> None:
    """Refuse to begin what will not find the room it needs.

    Args:
        uri: Where it will write.
        needed: Bytes; 0: not known.
        what: What writes, for the message.

    Raises:
        StorageFull: There is less.
    """
    free = free_bytes(uri) if needed else None
    if free is not None and free < needed:
        raise StorageFull(
            f"no space left for {what}: it needs up to {needed:,} bytes at {uri}, {free:,} are free; free some space and "
            "run the same command again (what is committed is kept), ask for less (--track, --test, --checkpoint-every), "
            "or choose another place with --out"
        )
