"""Whether a run may be made at an address, only where nothing is that is not ours; and what lies inside a run."""

from __future__ import annotations

import os

from . import layout
from .errors import StoreError
from .files import PARTIAL, filesystem
from .refused import readable
from .uri import is_local, parent

MARK = "hydra_pipe_run"
"""Key of ``run.json`` by which a run is known; its value is the version of the layout."""
_LOOK_BYTES = 1 << 20
_HARMLESS = frozenset({"lost+found", *layout.BESIDE})


def check_place(uri: str) -> None:
    """Refuse an address that holds something but no run: its files must never be mixed with ours.

    An empty directory is taken, and so is one with nothing but hidden files, ``lost+found`` (a fresh
    volume), the lock of a command, or leftovers of a run that was killed before its first write was complete.

    Args:
        uri: A checked address without ``run.json``.

    Raises:
        StoreError: A file is in the way, or the directory holds something.
    """
    if is_local(uri):
        above = uri
        while not os.path.lexists(above) and above != parent(above):
            above = parent(above)
        if not os.path.isdir(above):
            raise StoreError(
                f"cannot write {uri}: {above} is no directory; choose a directory of its own with --out"
            )
        with readable(uri):
            names = os.listdir(uri) if above == uri else []
    else:
        fs, path = filesystem(uri)
        try:
            with readable(uri):
                names = [name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)]
        except FileNotFoundError:
            names = []
    found = sorted(n for n in names if not n.startswith(".") and PARTIAL not in n and n not in _HARMLESS)
    if found:
        raise StoreError(
            f"{uri} holds no run but {len(found)} other entries ({found[0]}{', …' if found[1:] else ''}); "
            "choose an empty or new directory with --out"
        )


def run_around(path: str | os.PathLike[str]) -> str | None:
    """Return the run inside which a local path lies, links followed; None: none.

    Only our own files belong there: what else lies among results would be taken for one.
    """
    above = os.path.dirname(os.path.realpath(path))
    while True:
        try:
            with open(os.path.join(above, layout.RUN_INFO), "rb") as file:
                if MARK.encode() in file.read(_LOOK_BYTES):
                    return above
        except OSError:
            pass
        if above == os.path.dirname(above):
            return None
        above = os.path.dirname(above)
