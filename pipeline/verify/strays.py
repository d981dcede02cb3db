"""Files of a run that no manifest lists, and units made from what the run no longer holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ...storage import layout

if TYPE_CHECKING:
    from ...storage.manifest import Manifest
    from ...storage.rundir import RunDirectory

_OURS = (layout.RUN_INFO, layout.MANIFESTS, *(kind.folder for kind in layout.KINDS))


def beside(paths: Iterable[str]) -> Iterator[str]:
    """Give the files among the manifests that are none, and those that bear the name of a result and an ending.

    A user's own files beside the results are nobody's business.

    Args:
        paths: Of all files of the run, relative.
    """
    for path in paths:
        top, _, rest = path.partition("/")
        if top == layout.MANIFESTS:
            if not path.endswith(".json") or "/" not in rest:
                yield path
        elif top not in _OURS and any(top.startswith(name) for name in _OURS):
            yield path  # run.json.bak, contributions~/…


def made_from_another(directory: RunDirectory, manifests: Sequence[Manifest]) -> list[str]:
    """Return which units were made from another version of what is there, one line each."""
    found = []
    for manifest in manifests:
        if other := directory.ledger.other_inputs(manifest):
            more = f" and {len(other) - 1} others" if len(other) > 1 else ""
            found.append(
                f"{manifest.stage} {manifest.unit}: made from another version of {other[0]}{more}; "
                "the command that made it, run again, does it anew"
            )
    return found


def unknown_inputs(directory: RunDirectory, manifests: Sequence[Manifest]) -> list[str]:
    """Return in words of how many units it cannot be told whether they belong to what is there."""
    silent = sum(manifest.inputs is None for manifest in manifests)
    gone = [m for m in manifests if directory.ledger.missing_inputs(m)]
    notes = []
    if silent:
        notes.append(f"{silent} units were committed by a version that did not say what they were made from")
    if gone:
        what = directory.ledger.missing_inputs(gone[0])[0]
        notes.append(f"{len(gone)} units were made from what is not there any more, such as {what}")
    return notes
