"""Reading a run through its manifests: no byte is a result that none of them vouches for.

A file is found by its path: the path says which stages may have written it, their manifests say which unit did
and what it must be. Size is always compared; the digest when this process first reads the file, and again
whenever times, size or inode of a local file changed. What was read is remembered by unit, for the manifest of
what is made from it.
"""

from __future__ import annotations

import contextlib
import posixpath
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from weakref import WeakSet

from . import files as disk
from . import layout
from .errors import CorruptStore, IncompleteStage, StoreError
from .manifest import (
    CONTRADICTION,
    FileEntry,
    Manifest,
    count_of,
    named,
    of_range,
    parse,
    parse_input,
    stages_named,
)
from .stages import is_temporary, stages_of
from .threads import in_threads
from .uri import check_name, is_local, join, parent

THREADS = 8
LOCAL_DIGEST_BYTES, REMOTE_DIGEST_BYTES = 4 << 30, 256 << 20
"""Of tables: how much a process reads only to compare digests; beyond it sizes and page checksums must do."""
LISTED = 4
"""So many files of one folder are asked for by a listing, on an object store; fewer one by one."""
_MANIFESTS = 1 << 14
_HELD_BYTES, _HELD_FILES = 64 << 10, 1 << 10
"""Of remote files that are not fetched again: metadata, labels, settings of a training."""
_FRESH_SECONDS = 0.1
"""A file that changed less than this ago may change again without another time: it is not remembered."""


@dataclass(slots=True)
class _Known:
    """What a process knows, whichever objects ask.

    Attributes:
        manifests: By address: signature or tag, the manifest, and its content once somebody asked.
        seen: Files whose digest was compared, by address: (signature, digest).
        held: Contents of small remote files whose digest was compared, by (address, digest), the last used last.
        read: Bytes of tables read only to compare digests.
    """

    manifests: OrderedDict[str, tuple[object, Manifest, list[str]]] = field(default_factory=OrderedDict)
    seen: dict[str, tuple[disk.Signature, str]] = field(default_factory=dict)
    held: OrderedDict[tuple[str, str], bytes] = field(default_factory=OrderedDict)
    read: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_known = _Known()


@dataclass(frozen=True, slots=True)
class _Stage:
    """The manifests of a stage, the unit and entry of each file, what is damaged; and of ranges of units what was asked."""

    units: Mapping[str, Manifest]
    files: Mapping[str, tuple[Manifest, FileEntry]]
    damaged: Mapping[str, str]
    ranges: dict[tuple[str, str], str] = field(default_factory=dict)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Reading:
    """What was read of a run since it was made, as long as it is held: the units' manifests, by (stage, unit)."""

    units: dict[tuple[str, str], Manifest] = field(default_factory=dict)


class Ledger:
    """The manifests of one run, and reading by them. Several threads may read.

    Attributes:
        uri: Address of the run.
        digests: Whether digests are compared; sizes always are.
    """

    def __init__(self, uri: str, *, digests: bool = True) -> None:
        self.uri, self.digests = uri, digests
        self._stages: dict[str, _Stage] = {}
        self._readings: WeakSet[Reading] = WeakSet()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Callable[..., Ledger], tuple[str, bool]]:
        return _opened, (self.uri, self.digests)

    # ------------------------------------------------------------------ manifests

    def folder(self, stage: str) -> str:
        """Return where the manifests of a stage lie."""
        return join(self.uri, layout.MANIFESTS, *(check_name(part, "stage") for part in stage.split("/")))

    def address(self, stage: str, unit: str) -> str:
        """Return where the manifest of a unit lies, once it is done."""
        return join(self.folder(stage), f"{check_name(unit, 'unit')}.json")

    def units(self, stage: str) -> list[str]:
        """Return the names of the finished units of a stage, sorted; manifests are not read."""
        return sorted(self._listed(stage))

    def manifest(self, stage: str, unit: str) -> Manifest | None:
        """Return the manifest of a unit, None if it is not done.

        Raises:
            CorruptStore: It is damaged, or that of another unit.
        """
        target = self.address(stage, unit)
        try:
            known = disk.signature(target) if is_local(self.uri) else None
            return self._read(target, stage, unit, known)
        except FileNotFoundError:
            return None

    def manifests(self, stage: str) -> list[Manifest]:
        """Return the manifests of a stage as they are now, sorted by unit; remote ones that have not changed are not read again.

        Raises:
            CorruptStore: One is damaged, or that of another unit.
        """
        found = []
        for unit, tag in sorted(self._listed(stage).items()):
            with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
                found.append(self._read_listed(stage, unit, tag))
        return found

    def content(self, manifest: Manifest) -> str:
        """Return ``manifest.content()``, computed once a process."""
        target = self.address(manifest.stage, manifest.unit)
        known = _known.manifests.get(target)
        if known is None or known[1] is not manifest:
            return manifest.content()
        if not known[2]:
            known[2].append(manifest.content())
        return known[2][0]

    def readable(self, stage: str) -> list[Manifest]:
        """Return the manifests of a stage as they are now, sorted by unit, without those that are damaged."""
        self.forget(stage)
        return list(self._stage(stage).units.values())

    def damaged(self, stage: str) -> list[str]:
        """Return what is wrong with manifests of a stage, one line each."""
        self.forget(stage)
        return list(self._stage(stage).damaged.values())

    def contents(self, stage: str) -> dict[str, str]:
        """Return the content of each unit of a stage as it is now, by name."""
        return {manifest.unit: self.content(manifest) for manifest in self.readable(stage)}

    def refresh(self) -> None:
        """Look again at all stages when they are next asked for: other processes have been at work."""
        with self._lock:
            self._stages.clear()

    def forget(self, stage: str) -> None:
        """Look again when a stage is next asked for: something was committed or dropped."""
        with self._lock:
            self._stages.pop(stage, None)

    def _listed(self, stage: str) -> dict[str, object]:
        """Return the units of a stage and, of remote ones, the tags of their manifests."""
        folder = self.folder(stage)
        names: Mapping[str, object] = (
            dict.fromkeys(disk.list_names(folder)) if is_local(self.uri) else disk.etags(folder)
        )
        return {
            name.removesuffix(".json"): tag
            for name, tag in names.items()
            if "/" not in name and name.endswith(".json")
        }

    def _read_listed(self, stage: str, unit: str, tag: object) -> Manifest:
        """Read a manifest, or recall it where it has not changed; ``tag`` is what `_listed` says of it."""
        target = join(self.folder(stage), f"{unit}.json")  # a stray's name may be none of a unit's
        if is_local(self.uri):
            tag = disk.signature(target)
        elif not (isinstance(tag, tuple) and tag[1] is not None):
            tag = None
        return self._read(target, stage, unit, tag)

    def _read(self, target: str, stage: str, unit: str, tag: object) -> Manifest:
        """Read a manifest, or recall it where ``tag`` says that it is the same."""
        known = _known.manifests.get(target)
        if known is not None and tag is not None and known[0] == tag:
            return known[1]
        data, signature = disk.read_signed(target, most=disk.DOCUMENT_BYTES)
        found = parse(data, target, stage, unit)
        tag = signature if signature is not None else tag
        if tag is not None and not (signature and _fresh(signature)):
            with _known.lock:
                _known.manifests[target] = (tag, found, [])
                while len(_known.manifests) > _MANIFESTS:
                    _known.manifests.popitem(last=False)
        return found

    def _stage(self, stage: str) -> _Stage:
        with self._lock:
            if stage not in self._stages:
                seed, own = layout.split_seed(stage)
                of = Ledger(join(self.uri, seed)) if seed else self
                self._stages[stage] = of._load(own)
            return self._stages[stage]

    def _load(self, stage: str) -> _Stage:
        units: dict[str, Manifest] = {}
        damaged: dict[str, str] = {}
        for unit, tag in sorted(self._listed(stage).items()):
            try:
                units[unit] = self._read_listed(stage, unit, tag)
            except FileNotFoundError:
                continue
            except CorruptStore as error:
                damaged[unit] = str(error)
        files: dict[str, tuple[Manifest, FileEntry]] = {}
        for manifest in units.values():
            for entry in manifest.files:
                other = files.setdefault(entry.path, (manifest, entry))
                if other[1].sha256 != entry.sha256:
                    damaged[manifest.unit] = (
                        f"{self.uri}: {entry.path} is listed by {stage} {other[0].unit} and by {manifest.unit} with "
                        "other contents; run the stage again"
                    )
        return _Stage(units=units, files=files, damaged=damaged)

    # ------------------------------------------------------------------ files

    def find(self, path: str) -> tuple[Manifest, FileEntry] | None:
        """Return the manifest and entry that vouch for a file, None where none does.

        Args:
            path: Relative to the run.

        Raises:
            CorruptStore: None does, and a manifest that could is damaged.
        """
        place = layout.locate(path)
        stages = () if place is None else stages_of(place)
        for stage in stages:
            if (found := self._stage(stage).files.get(path)) is not None:
                return found
        for stage in stages:
            for problem in self._stage(stage).damaged.values():
                raise CorruptStore(problem)
        return None

    def listed(self, folder: str) -> list[FileEntry]:
        """Return the entries of all files below a folder that manifests list, sorted by path; they count as read.

        Raises:
            CorruptStore: A manifest that could list one is damaged.
        """
        place = layout.locate(f"{folder}/file")
        found = []
        for stage in () if place is None else stages_of(place):
            self.forget(stage)
            there = self._stage(stage)
            for problem in there.damaged.values():
                raise CorruptStore(problem)
            for path, (manifest, entry) in there.files.items():
                if path.startswith(f"{folder}/"):
                    self._note(manifest)
                    found.append(entry)
        return sorted(found, key=lambda entry: entry.path)

    def read_bytes(self, uri: str) -> bytes:
        """Return the contents of a file of the run, as its manifest says.

        Args:
            uri: Its address.

        Raises:
            FileNotFoundError: It is not there, and no manifest lists it.
            IncompleteStage: It is there, and no manifest lists it.
            CorruptStore: It is not what its manifest says.
        """
        path = uri.removeprefix(f"{self.uri.rstrip('/')}/")
        for last in (False, True):
            found = self.find(path)
            if found is not None and (held := _held(uri, found[1])) is not None:
                self._note(found[0])
                return held
            try:
                data, signature = disk.read_signed(uri)
            except FileNotFoundError:
                if found is None:
                    raise
                problem = "missing"
            else:
                if found is None:
                    problem = ""
                else:
                    problem = self._differs(uri, data, signature, found[1])
                    if not problem:
                        self._note(found[0])
                        if self.digests and not is_local(uri):
                            _hold(uri, found[1], data)
                        return data
            if not last:  # perhaps it was committed since: look again
                self._forget_about(path)
        if found is None:
            raise IncompleteStage(
                f"{uri} is not committed: no manifest lists it; run again what writes it, or remove it"
            )
        raise CorruptStore(self._told(found, problem))

    def trust(self, entries: Sequence[FileEntry]) -> None:
        """Compare files that something else will read: sizes, and digests as far as `LOCAL_DIGEST_BYTES` goes.

        Raises:
            CorruptStore: One is not what its manifest says.
        """
        problems = [line for line in in_threads(self._distrust, entries, THREADS) if line]
        if problems:
            raise CorruptStore(problems[0])

    def compare_all(
        self, entries: Sequence[FileEntry], *, digest: bool, recall: bool = True, limit: int | None = None
    ) -> list[str]:
        """Compare several files; see `compare`. One line each, empty where nothing differs."""
        tags = {} if is_local(self.uri) else self._tags(entries)

        def problem(entry: FileEntry) -> str:
            return self.compare(entry, digest=digest, recall=recall, limit=limit, tag=tags.get(entry.path))

        return in_threads(problem, entries, THREADS)

    def _tags(self, entries: Sequence[FileEntry]) -> dict[str, disk.Tag]:
        """Return size and tag of remote files as listings of their folders say, where that takes fewer requests."""
        by_top: dict[str, list[str]] = {}
        for entry in entries:
            by_top.setdefault(entry.path.partition("/")[0], []).append(entry.path)
        found: dict[str, disk.Tag] = {}
        for paths in by_top.values():
            if len(paths) >= LISTED:
                folder = posixpath.commonpath([parent(path) for path in paths])
                found |= {f"{folder}/{name}": tag for name, tag in disk.etags(join(self.uri, folder)).items()}
        return found

    def compare(
        self,
        entry: FileEntry,
        *,
        digest: bool,
        recall: bool = True,
        limit: int | None = None,
        tag: disk.Tag | None = None,
    ) -> str:
        """Compare a file with its entry; return what differs, or nothing.

        Args:
            entry: What it should be.
            digest: Whether its contents must be the same, too.
            recall: Whether it need not be read where nothing speaks for a change since it last was.
            limit: Leave digests out once this process has read so many bytes for them.
            tag: Size and tag of a remote file, where somebody has just asked for them.
        """
        uri = join(self.uri, entry.path)
        try:
            return self._compare(uri, entry, digest, recall, limit, tag)
        except FileNotFoundError:
            return "missing"
        except StoreError as error:
            return f"cannot be read ({error})"

    def _compare(
        self,
        uri: str,
        entry: FileEntry,
        digest: bool,
        recall: bool,
        limit: int | None,
        tag: disk.Tag | None,
    ) -> str:
        if is_local(uri):
            signature = disk.signature(uri)
            size, same = signature[2], _known.seen.get(uri) == (signature, entry.sha256)
        else:
            size, name = tag or disk.tagged(uri)
            same = name is not None and name == entry.etag  # of other contents the store would make another
            signature = None
        if size != entry.bytes:
            return f"{size} bytes, the manifest says {entry.bytes}"
        if not digest or (recall and same) or (limit is not None and _known.read + size > limit):
            return ""
        if limit is not None:
            with _known.lock:
                _known.read += size
        found, size = disk.digest(uri)
        if found != entry.sha256:
            return f"sha256 {found}, the manifest says {entry.sha256}"
        if signature is not None and not _fresh(signature):
            _known.seen[uri] = (signature, found)
        return ""

    def _distrust(self, entry: FileEntry) -> str:
        limit = LOCAL_DIGEST_BYTES if is_local(self.uri) else REMOTE_DIGEST_BYTES
        problem = self.compare(entry, digest=self.digests, limit=limit)
        if not problem:
            return ""
        found = self.find(entry.path)
        return self._told(found, problem) if found else f"{self.uri}: {entry.path}: {problem}"

    def _differs(self, uri: str, data: bytes, signature: disk.Signature | None, entry: FileEntry) -> str:
        if len(data) != entry.bytes:
            return f"{len(data)} bytes, the manifest says {entry.bytes}"
        if not self.digests or (signature and _known.seen.get(uri) == (signature, entry.sha256)):
            return ""
        found = sha256(data).hexdigest()
        if found != entry.sha256:
            return f"sha256 {found}, the manifest says {entry.sha256}"
        if signature is not None and not _fresh(signature):
            _known.seen[uri] = (signature, found)
        return ""

    def _told(self, found: tuple[Manifest, FileEntry], problem: str) -> str:
        manifest, entry = found
        return (
            f"{self.uri}: {entry.path} is damaged: {problem}; the command that made {manifest.stage} "
            f"(`hydra-pipe status {self.uri}` shows it), run again, does {manifest.unit} anew"
        )

    def _forget_about(self, path: str) -> None:
        place = layout.locate(path)
        for stage in () if place is None else stages_of(place):
            self.forget(stage)

    # ------------------------------------------------------------------ inputs

    def remember(self) -> Reading:
        """Return what remembers, from now on and as long as it is held, which units are read."""
        found = Reading()
        with self._lock:
            self._readings.add(found)
        return found

    def use(self, units: Iterable[Manifest], *, seed: str = "") -> None:
        """Count units as read: their values were, or the tables of a run with another seed at ``seed`` inside this one."""
        for manifest in units:
            self._note(manifest, f"{seed}/" if seed else "")

    def inputs(self, reading: Reading) -> dict[str, str]:
        """Return what a manifest says of what was read: these units, and what they were made from."""
        lasting = {key: one for key, one in reading.units.items() if not is_temporary(key[0])}
        known = {
            stage: {unit: self.content(one) for unit, one in self._stage(stage).units.items()}
            for stage in {stage for stage, _ in lasting}
        }
        found = named({key: self.content(one) for key, one in lasting.items()}, known)
        above: dict[str, str] = {}
        for (stage, _), one in reading.units.items():
            place = stage.removesuffix(one.stage)
            for name, content in (one.inputs or {}).items():
                key = place + name
                if above.setdefault(key, content) != content:
                    above[key] = CONTRADICTION
        return {**above, **found}

    def other_inputs(self, manifest: Manifest) -> list[str]:
        """Return which inputs of a unit are no longer what they were, in words; what is gone is not counted."""
        where = self.address(manifest.stage, manifest.unit)
        found = []
        for key, content in (manifest.inputs or {}).items():
            stage, first, last = parse_input(key, where)
            there = self._stage(stage)
            units = there.units
            if ":" not in key.rpartition("/")[2]:
                if first in units and self.content(units[first]) != content:
                    found.append(f"{stage} {first}")
                continue
            if (first, last) not in there.ranges:
                mine = {unit: self.content(one) for unit, one in units.items() if first <= unit <= last}
                there.ranges[first, last] = of_range(mine, first, last)
            now = there.ranges[first, last]
            if now != content and count_of(now) >= count_of(content):
                found.append(f"{stage} {first} to {last}")
        return found

    def missing_inputs(self, manifest: Manifest) -> list[str]:
        """Return which inputs of a unit are not there any more, in words."""
        where = self.address(manifest.stage, manifest.unit)
        found = []
        for key, content in (manifest.inputs or {}).items():
            stage, first, last = parse_input(key, where)
            there = [unit for unit in self._stage(stage).units if first <= unit <= last]
            if ":" in key.rpartition("/")[2]:
                if len(there) < count_of(content):
                    found.append(f"{stage} {first} to {last}")
            elif not there:
                found.append(f"{stage} {first}")
        return found

    def outdated(self, units: Iterable[Manifest]) -> str | None:
        """Return why some units are not results of the run as it is, None where they are."""
        mine = list(units)
        for stage in stages_named(mine):
            self.forget(stage)
        for manifest in mine:
            if other := self.other_inputs(manifest):
                return f"{manifest.stage} {manifest.unit} was made from another version of {other[0]}"
        return None

    def outdated_units(self, stages: Iterable[str]) -> list[Manifest]:
        """Return all units of some stages that were made from another version of what is there."""
        self.refresh()
        return [
            one for stage in stages for one in self._stage(stage).units.values() if self.other_inputs(one)
        ]

    def _note(self, manifest: Manifest, place: str = "") -> None:
        if not self._readings:
            return
        with self._lock:
            for reading in self._readings:  # the first version counts: what read two is to be done again
                reading.units.setdefault((place + manifest.stage, manifest.unit), manifest)


def _held(uri: str, entry: FileEntry) -> bytes | None:
    """Return what this process has read, and compared, of a remote file that manifests still list as it was."""
    with _known.lock:
        if (data := _known.held.get((uri, entry.sha256))) is not None:
            _known.held.move_to_end((uri, entry.sha256))
    return data


def _hold(uri: str, entry: FileEntry, data: bytes) -> None:
    if len(data) <= _HELD_BYTES:
        with _known.lock:
            _known.held[uri, entry.sha256] = data
            while len(_known.held) > _HELD_FILES:
                _known.held.popitem(last=False)


def _opened(uri: str, digests: bool) -> Ledger:
    return Ledger(uri, digests=digests)


def _fresh(signature: disk.Signature) -> bool:
    return time.time() - max(signature[:2]) / 1e9 < _FRESH_SECONDS
