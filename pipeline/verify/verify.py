"""Check every file of a run against its manifest, and its contents against each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ...storage import layout
from ...storage.errors import HydraError, RunNotFound
from ...storage.files import PARTIAL, list_files
from ...storage.schemas import SCHEMAS
from ...storage.stages import is_temporary
from ..reading.kept_rows import StoreLoss, store_losses
from ..reading.stage_states import stage_states
from ..spec.targets import store_of
from ..vocabulary import (
    ADJOINT,
    ATTRIBUTE,
    BY_EPOCH,
    BY_EPOCH_SCORES,
    CLEAN,
    CLEAN_OUTCOME,
    CLEAN_RETRAIN,
    COMPLETE,
    CORRECTION,
    CURVATURE,
    DETECT,
    DIRECTIONS,
    EVALUATE,
    EVALUATE_SCORES,
    KINDS,
    MISSING,
    PREPARE,
    RECORD,
    REDUCE,
    REPLAY,
    TEST_GRADIENTS,
    TRAINING_GRADIENTS,
    TRAINING_OUTPUTS,
    judges,
    stage_of,
    stages_of,
)
from . import conservation as law
from . import contents_between as between
from . import contents_decisions as deciding
from .conservation import conservation
from .contents import Contents
from .contents_visits import visits
from .strays import beside, made_from_another, unknown_inputs

if TYPE_CHECKING:
    from ...storage.rundir import FileEntry
    from ..reading.reader import Reader

__all__ = ["Progress", "Verification", "conservation", "verify"]

Progress = Callable[[int, int, str], None]
"""Called with bytes checked, bytes in all, and what is being checked."""

T = TypeVar("T")

SCORES = (EVALUATE_SCORES, BY_EPOCH_SCORES)
OF_NO_METHOD = (TRAINING_OUTPUTS,)
"""Stages without which a method is complete all the same."""

GROUP_BYTES, GROUP_FILES = 256 << 20, 64
"""How much is hashed between two moves of the progress bar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        run: Where the run is.
        files: Files checked.
        bytes: Their size.
        rows: Rows read, by part.
        problems: One line each; empty when all is well.
        notes: What was not checked and why, one line each.
        conservation: What `conservation.conservation` returns.
        stores: What storing hypergradients in fewer numbers or bits costs, one mapping a method; see
            `reading.kept_rows.StoreLoss`.
    """

    run: str
    files: int
    bytes: int
    rows: dict[str, int]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    conservation: dict[str, Any]
    stores: tuple[StoreLoss, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(run: Reader, *, progress: Progress | None = None) -> Verification:
    """Check a run: digests and sizes of all files, no stray files, readable stores, counts, values.

    Stages that are not complete are noted and their contents are not judged; what they have
    committed is still checked against its manifests. Runs with other seeds inside this one are
    checked after it, and what is said of them begins with their place.
    """
    from ..reading.reader import open_reader

    found = _verify(run, progress)
    for seed in run.noted.other_seeds:
        place = layout.of_seed(seed)
        try:
            inner = _verify(open_reader(run.directory.of_seed(seed).uri), progress)
        except RunNotFound:
            found = replace(found, notes=(*found.notes, f"{place}: not begun"))
            continue
        except HydraError as error:
            found = replace(found, problems=(*found.problems, _line(f"{place}: {error}")))
            continue
        found = replace(
            found,
            files=found.files + inner.files,
            bytes=found.bytes + inner.bytes,
            rows={**found.rows, **{f"{place}/{part}": rows for part, rows in inner.rows.items()}},
            problems=(*found.problems, *(f"{place}/{line}" for line in inner.problems)),
            notes=(*found.notes, *(f"{place}/{line}" for line in inner.notes)),
        )
    return found


def _verify(run: Reader, progress: Progress | None) -> Verification:
    run.directory.ledger.refresh()  # the run as it is now, whenever it was opened
    try:
        verifier = _Verifier(run, progress)
    except HydraError as error:  # a manifest that cannot be read: nothing can be held against it
        damaged = []
        with contextlib.suppress(HydraError):
            ledger = run.directory.ledger
            damaged = [line for stage in run.directory.stages() for line in ledger.damaged(stage)]
        return unreadable(run.uri, (*damaged, str(error)), "every manifest")
    return verifier.verify()


def unreadable(uri: str, problems: Sequence[str], what: str) -> Verification:
    """Return the verdict on a run of which ``what`` cannot be read."""
    return Verification(
        run=uri,
        files=0,
        bytes=0,
        rows={},
        problems=tuple(dict.fromkeys(map(_line, problems))),
        notes=(f"nothing else is checked until {what} can be read",),
        conservation={"applicable": False, "reason": f"not before {what} can be read"},
    )


class _Verifier:
    def __init__(self, run: Reader, progress: Progress | None) -> None:
        self.run = run
        self.info = run.noted
        self.states = {state.stage: state for state in stage_states(run.directory, run.noted)}
        self.manifests = [m for stage in run.directory.stages() for m in run.directory.manifests(stage)]
        self.sizes = {entry.path: entry.bytes for m in self.manifests for entry in m.files}
        self.damaged: set[str] = set()
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.progress = progress
        self.checked = 0

    def verify(self) -> Verification:
        directory = self.run.directory
        self._guard("manifests", self._files)
        self._guard("strays", self._strays)
        self.problems += self._guard("manifests", partial(made_from_another, directory, self.manifests)) or []
        self.notes += self._guard("manifests", partial(unknown_inputs, directory, self.manifests)) or []
        contents = Contents(self.run, self._advance)
        self._stages()
        if self._readable(RECORD, layout.TRAJECTORY):
            self._guard(layout.TRAJECTORY, contents.trajectory)
            self._guard(layout.TRAJECTORY, partial(visits, contents))
        if self._readable(TEST_GRADIENTS, layout.TEST_GRADIENTS):
            self._guard(layout.TEST_GRADIENTS, contents.test_gradients)
        for kind in KINDS[1:]:
            if self._state(stage_of(kind)) != MISSING and self._readable(stage_of(kind), store_of(kind)):
                self._guard(store_of(kind), partial(contents.target_gradients, kind))
        record = not any(path.startswith(f"{layout.TRAJECTORY}/") for path in self.damaged)
        found: dict[str, Any] = {}
        for method in self.info.method_names():
            name = layout.hypergradients(method)
            if self._readable(f"{method}/{REPLAY}", name) and any(p.startswith(name) for p in self.sizes):
                found |= self._guard(name, partial(contents.hypergradients, method, lawful=record)) or {}
            if self._readable(f"{method}/{REDUCE}", *(layout.table(k, method) for k in SCHEMAS)):
                self._guard(layout.table("contributions", method), partial(contents.contributions, method))
                if self.run.averages(method):
                    self._guard(
                        layout.table("contributions_spread", method), partial(contents.average, method)
                    )
        for stage in self.states:
            self._between(stage, contents)
        if not found:
            reason = law.not_applicable(self.run) or "the stores it needs are damaged"
            found = {"applicable": False, "reason": reason}
        stores = self._guard(layout.HYPERGRADIENTS, partial(store_losses, self.run)) or []
        return Verification(
            run=self.run.uri,
            files=len(self.sizes),
            bytes=sum(self.sizes.values()),
            rows=contents.rows,
            # A file that two manifests list is named once.
            problems=tuple(dict.fromkeys([*self.problems, *contents.problems])),
            notes=tuple(self.notes),
            conservation=found,
            stores=tuple(stores),
        )

    def _between(self, stage: str, contents: Contents) -> None:
        """Judge what a stage left that is no table of a method."""
        if stage.startswith((f"{EVALUATE}/", f"{BY_EPOCH}/")):
            if self._state(stage) == COMPLETE:
                self._guard(stage, partial(between.judging, contents, stage, self.damaged))
            return
        if stage == DETECT:
            self._guard(stage, partial(between.detections, contents, self.damaged))
            return
        if stage in (CLEAN, CLEAN_RETRAIN):
            check_all = deciding.decisions if stage == CLEAN else deciding.retrainings
            self._guard(stage, partial(check_all, contents, self.damaged))
            return
        owner, _, part = stage.rpartition("/")
        if stage == TRAINING_OUTPUTS:
            if self._readable(stage, layout.TRAINING_OUTPUTS):
                self._guard(layout.TRAINING_OUTPUTS, partial(between.training_outputs, contents))
            return
        if owner == TRAINING_GRADIENTS:
            name = layout.training_gradients(part)
            if self._readable(stage, name):
                self._guard(name, partial(between.training_gradients, contents, part))
            return
        if part in (ADJOINT, ATTRIBUTE):
            check, names = between.by_test, [layout.by_test(owner)]
        elif part == PREPARE:
            check, names = between.prepared, [layout.prepared(owner)]
        elif part == CURVATURE:
            check, names = between.curvature, [layout.curvature(owner)]
        elif part == CORRECTION and self._state(f"{owner}/{DIRECTIONS}") == COMPLETE:
            stores = (layout.DIRECTIONS, layout.COORDINATES, layout.CORRECTED)
            check, names = between.corrections, [layout.corrections(owner, name) for name in stores]
        else:
            return
        if self._readable(stage, *names):
            self._guard(names[0], partial(check, contents, owner))

    def _stages(self) -> None:
        """Note what is not complete; it is a problem where ``run.json`` claims that it is."""
        claimed = {name for name, entry in self.info.methods.items() if entry.state == COMPLETE}
        for state in self.states.values():
            if state.state == COMPLETE:
                continue
            of = "" if state.units is None else f" of {state.units}"
            done = f"{state.stage}: {state.done}{of} units committed"
            if judges(state.stage):
                self.notes.append(f"{done}; contents not judged")
            elif claimed and ("/" not in state.stage or state.stage.split("/")[0] in claimed):
                self.problems.append(
                    f"{done}, though run.json calls the method complete; running it again does what is missing"
                )
            else:
                self.notes.append(f"{done}; contents not judged")

    def _files(self) -> None:
        """Compare every listed file's size and sha256 with its manifest."""
        for manifest in self.manifests:
            for files in _groups(manifest.files):
                found = self.run.directory.check(replace(manifest, files=files), digests=True)
                self.problems += [_line(problem) for problem in found]
                self.damaged |= {
                    f.path for f in files if any(line.startswith(f"{f.path}: ") for line in found)
                }
                self._advance(sum(f.bytes for f in files), manifest.stage)

    def _strays(self) -> None:
        """Report files where results lie that no manifest lists: readers' globs would find them."""
        waiting: dict[str, int] = {}
        litter = self.run.directory.litter()
        paths = list_files(self.run.uri)
        self.problems += [f"{path}: no manifest lists this file; remove it" for path in beside(paths)]
        for path in paths:
            place = layout.locate(path)
            if path in self.sizes or place is None or PARTIAL in path or self._of_a_seed(place):
                continue
            stage = self._still_writing(place, path)
            if stage is None:
                self.problems.append(f"{path}: no manifest lists this file; remove it")
            else:
                waiting[stage] = waiting.get(stage, 0) + 1
        if litter:
            self.notes.append(
                f"{len(litter)} temporary files of an interrupted run; running it again removes them"
            )
        for stage, count in waiting.items():
            self.notes.append(f"{stage}: {count} files are not committed yet")

    def _of_a_seed(self, place: layout.Place) -> bool:
        """Whether a file is that of a run with another seed, which is checked by itself."""
        others = self.info.other_seeds
        return place.kind.form == "run" and place.key in {str(seed) for seed in others}

    def _still_writing(self, place: layout.Place, path: str) -> str | None:
        """Return the stage that may have been interrupted before it committed a file; None: there is none."""
        stages = stages_of(place)
        if stages in ((DETECT,), (CLEAN, CLEAN_OUTCOME)):  # each detection and decision by itself
            writing = CLEAN_OUTCOME if path.rsplit("/", 1)[-1] in layout.OUTCOME_FILES else stages[0]
            return None if place.key is None or place.key in self.run.directory.units(writing) else writing
        begun = [s for s in stages if s in self.states or s in self.info.stages]
        for stage in begun:
            owner = stage.rpartition("/")[0]
            used_up = is_temporary(stage) and self.info.entry(owner).state == COMPLETE
            if self._state(stage) != COMPLETE and not used_up:
                return stage
        if begun:
            return None
        passes = [s for s in stages if s in OF_NO_METHOD or s.startswith(f"{TRAINING_GRADIENTS}/")]
        if passes:  # a store is made before its stage commits anything
            return passes[0]
        if any(stage in SCORES for stage in stages):  # one short unit after long ones, noted nowhere else
            folder = stages[0].split("/")[0]
            return stages[0] if any(name.startswith(f"{folder}/") for name in self.states) else None
        own = [state for name, state in self.states.items() if name.split("/")[0] == place.key]
        return stages[0] if stages and any(state.state != COMPLETE for state in own) else None

    def _state(self, stage: str) -> str:
        return self.states[stage].state if stage in self.states else MISSING

    def _readable(self, stage: str, *names: str) -> bool:
        """Whether the contents are to be judged: the stage is complete and no file of it damaged."""
        if self._state(stage) != COMPLETE:
            return False
        if any(path.startswith(name + "/") for path in self.damaged for name in names):
            self.notes.append(f"{names[0]}: contents not judged, because files of it are damaged")
            return False
        return True

    def _guard(self, name: str, check: Callable[[], T]) -> T | None:
        """Run one check; whatever it raises is a problem of the run and not of the program."""
        try:
            return check()
        except HydraError as error:
            self.problems.append(_line(str(error)))
        except Exception as error:  # noqa: BLE001 - a verdict is given whatever bytes are there
            self.problems.append(_line(f"{name}: cannot be read: {type(error).__name__}: {error}"))
        return None

    def _advance(self, count: int, what: str) -> None:
        self.checked += count
        if self.progress is not None:
            # Stores are read a second time for their contents: twice the bytes is the closest bound.
            total = 2 * sum(self.sizes.values())
            self.progress(min(self.checked, total), total, what)


def _groups(files: Sequence[FileEntry]) -> Iterator[tuple[FileEntry, ...]]:
    """Split files so that several are hashed at a time and progress still moves."""
    group: list[FileEntry] = []
    for entry in files:
        group.append(entry)
        if sum(f.bytes for f in group) >= GROUP_BYTES or len(group) == GROUP_FILES:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _line(text: str) -> str:
    return " ".join(text.split())
