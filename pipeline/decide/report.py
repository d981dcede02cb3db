"""Report: a run as one HTML page that fetches nothing: which samples to look at, and how far to trust that."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage.errors import HydraError, InputError, RunStopped, StoreError
from ...storage.files import staged
from ..executors.events import Observer, null
from ..reading.reader import Reader, open_reader
from .chosen import chosen_detection
from .detect import default_by, detect
from .explain import Asked, explained
from .looks import at_hand, looking
from .page.decisions import decisions_section
from .page.page import page
from .report_facts import gather

if TYPE_CHECKING:
    from ...workers.recipe import Recipe
    from ..reading.detections import Detection

ROWS = 500
"""Ranked samples on a page, unless another number is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """A report that was written.

    Attributes:
        run: Address of the run.
        path: The file.
        bytes: Its size.
        method: Whose contributions it shows.
        detection: What ranked its samples; None: C(i).
        rows: Ranked samples on it.
        samples: How many are ranked in all.
        explained: Test samples with a section of their own.
        notes: What should be known, a line each.
    """

    run: str
    path: str
    bytes: int
    method: str
    detection: str | None
    rows: int
    samples: int
    explained: tuple[int, ...]
    notes: tuple[str, ...] = ()


def report(
    run: Reader | str,
    recipe: Recipe | str | None = None,
    *,
    to: str | os.PathLike[str],
    detection: str | None = None,
    explain: Sequence[int] = (),
    rows: int = ROWS,
    method: str | None = None,
    k: int = 5,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    observer: Observer | None = None,
    **given: Any,
) -> Reported:
    """Write a run's report: one HTML file that opens anywhere and fetches nothing.

    The file appears under its name once it is complete. Contributions are streamed once; memory stays bounded.

    Args:
        run: The run, or where it is.
        recipe: What it was made from, for pictures. A built-in one is found by itself; another is used only
            where it is named.
        to: The file to write, ending in ``.html``; a local path outside the run.
        detection: What ranks the samples; the run's best when None. Where the run has none, the default
            detection is made and stored in it if the recipe is at hand, and else C(i) ranks; a note says so.
        explain: Test samples that get a section.
        rows: Ranked samples on the page, at most; fewer where a page of 4.9 MB does not hold them.
        method: Whose contributions are shown; the run's default when None.
        k: Most helpful and most harmful samples of an explained test sample.
        overwrite: Replace a file that is there.
        progress: Called with contributions read so far, and all.
        observer: Hears of the detection that is made.
        given: ``recipe_args``, where they are not the run's.

    Raises:
        InputError: The file exists, lies inside the run or cannot be made; or a number is out of its range.
        IncompleteStage: The run has no complete method, or no such detection.
    """
    if rows < 1:
        raise InputError(f"rows is {rows}; it must be at least 1")
    opened = run if isinstance(run, Reader) else open_reader(run)
    path = _target(opened, to, overwrite)
    name = opened.method(method)
    wanted = tuple(dict.fromkeys(explain))
    judged, notes = chosen_detection(opened, detection), []
    if judged is None:
        judged, note = _detected(opened, recipe, observer or null, given)
        notes.append(note)
        # Its passes are stages of the run: what run.json said of stages before is out of date.
        opened = open_reader(opened.uri)
    with looking(opened, recipe, command="report", given=given) as looks:
        answers = [
            explained(opened, looks, Asked(test=j), k=k, method=name, detection=judged) for j in wanted
        ]
        facts = gather(opened, name, judged, rows, progress)
        document, shown = page(facts, looks, answers, decisions_section(opened))
    text = document.encode("utf-8")
    try:
        with staged(os.path.abspath(path), sync=True) as partial:
            Path(partial).write_bytes(text)
            if path.exists() and not overwrite:
                raise InputError(f"{path} appeared while it was being written; replace it with --overwrite")
    except StoreError as error:
        # The guard speaks of a run's --out; here it is --to that can be changed.
        raise type(error)(str(error).replace("with --out", "with --to")) from error
    return Reported(
        run=opened.uri,
        path=str(path),
        bytes=len(text),
        method=name,
        detection=None if judged is None else judged.name,
        rows=shown,
        samples=len(facts.ranking),
        explained=wanted,
        notes=(*notes, *(() if looks.note is None else (looks.note,))),
    )


def _detected(
    run: Reader, recipe: Recipe | str | None, observer: Observer, given: Mapping[str, Any]
) -> tuple[Detection | None, str]:
    """Make the default detection of a run that has none; return it, and what is to be said of that."""
    by = default_by()
    typed = f"hydra-pipe detect {run.uri} --by {by}"
    if not at_hand(run, recipe):
        return (
            None,
            f"the run has no detection, so C(i) ranks, a poor sign of wrong labels; better: {typed} RECIPE",
        )
    try:
        # A page must not start a cluster: the work is small, a pass over the data at most.
        found = detect(run, recipe, by=by, observer=observer, executor="serial", **given)[0]
    except RunStopped:
        raise
    except HydraError as error:
        return (
            None,
            f"the run has no detection, so C(i) ranks, a poor sign of wrong labels; {typed} says: {error}",
        )
    return found, f"the run had no detection: {found.name} was made and is now in it ({typed})"


def _target(run: Reader, to: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the path to write to, checked."""
    if "://" in os.fspath(to):
        raise InputError(f"cannot write {to}: a report is written to a local path; copy the file from there")
    path = Path(os.path.expanduser(to))
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"cannot write {path}: the file name must end in .html")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"directory {path.parent} does not exist"
        raise InputError(f"cannot write {path}: {what}; name a file in a directory that exists")
    inside = Path(run.uri).resolve() if "://" not in run.uri else None
    if inside is not None and inside in path.resolve().parents:
        raise InputError(
            f"cannot write {path}: it lies inside the run {run.uri}, where verify would call it a stray file; "
            "name a file beside it"
        )
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or replace it with --overwrite")
    return path
