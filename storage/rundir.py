"""The run directory: ``run.json``, and manifests that say what is done.

A unit of work (stage, unit) is done when ``manifests/<stage>/<unit>.json`` is there. That file is
written last, after every data file it names has been flushed and hashed. Readers obey manifests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import files as disk
from . import layout
from .documents import dump, load
from .errors import CorruptStore, IncompleteStage, RunNotFound, SpecError, StoreError
from .typed import from_json
from .uri import check_name, check_uri, is_local, join

FORMAT = 1
"""Version of the layout; ``run.json`` carries it under `MARK`."""
MARK = "hydra_pipe_run"
_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file a manifest vouches for.

    Attributes:
        path: Relative to the run, ``/``-separated.
        bytes: Its size.
        sha256: Its digest, hex.
    """

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What one finished unit of work left behind.

    Attributes:
        stage: Such as ``record`` or ``hydra/replay``.
        unit: Name of the unit inside the stage.
        files: The files, sorted by path.
        values: Numbers the unit reported, JSON-able.
    """

    stage: str
    unit: str
    files: tuple[FileEntry, ...]
    values: Mapping[str, Any]


class RunDirectory:
    """One run directory, local or remote.

    Attributes:
        uri: The checked address.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = check_uri(uri)

    def path(self, *parts: str) -> str:
        """Return the address of something inside the run."""
        return join(self.uri, *parts)

    def of_seed(self, seed: int) -> RunDirectory:
        """Return the run directory inside this one that holds the same run with another seed."""
        return RunDirectory(self.path(layout.of_seed(seed)))

    def exists(self) -> bool:
        """Return whether there is a run here, that is, a ``run.json``."""
        return disk.exists(self.path(layout.RUN_INFO))

    def read(self) -> dict[str, Any]:
        """Return the contents of ``run.json``.

        Raises:
            RunNotFound: There is none.
            CorruptStore: It is not JSON.
            StoreError: It was written by a later version.
        """
        info = self._read_marked()
        version = info.pop(MARK, "of another program")
        if version != FORMAT:
            raise StoreError(
                f"{self.uri} has format {version!r}, this hydra-pipe reads {FORMAT}; use the version that wrote it, or another --out"
            )
        return info

    def write(self, info: Mapping[str, Any]) -> None:
        """Replace ``run.json`` atomically.

        Args:
            info: JSON-able; numpy scalars are converted, non-finite numbers become null.
        """
        disk.write_bytes(self.path(layout.RUN_INFO), dump({MARK: FORMAT, **info}))

    def commit(self, stage: str, unit: str, files: Sequence[str], values: Mapping[str, Any]) -> Manifest:
        """Flush and hash the files of a finished unit, then write its manifest.

        Args:
            stage: Such as ``record`` or ``hydra/replay``.
            unit: Name inside the stage.
            files: Paths of its files, relative to the run.
            values: JSON-able numbers about the unit.

        Returns:
            The manifest as it will be read back.

        Raises:
            IncompleteStage: A named file is missing; nothing is committed.
            StorageFull: No space for the manifest; the unit counts as not done.
        """
        target = self.manifest_path(stage, unit)
        names = sorted(set(files))
        entries = disk.in_threads(self._entry, names, _THREADS)
        if is_local(self.uri):
            with disk.full_disk_guard(self.uri):
                disk.flush_directories(self.uri, [self.path(name) for name in names])
        body = {"stage": stage, "unit": unit, "files": [asdict(e) for e in entries], "values": dict(values)}
        data = dump(body, seal=True)
        disk.write_bytes(target, data)
        if is_local(self.uri):
            disk.flush_directories(self.uri, [target])
        return self._parse(target, data)

    def manifest(self, stage: str, unit: str) -> Manifest | None:
        """Return the manifest of a unit, None if it is not done.

        Raises:
            CorruptStore: The manifest itself is damaged.
        """
        target = self.manifest_path(stage, unit)
        try:
            return self._parse(target, disk.read_bytes(target, most=disk.DOCUMENT_BYTES))
        except FileNotFoundError:
            return None

    def manifests(self, stage: str) -> list[Manifest]:
        """Return the manifests of all finished units of a stage, sorted by unit."""
        found = [self.manifest(stage, unit) for unit in self.units(stage)]
        return [manifest for manifest in found if manifest is not None]

    def stages(self) -> list[str]:
        """Return the stages that have at least one finished unit, sorted."""
        names = disk.list_files(self.path(layout.MANIFESTS))
        return sorted({name.rsplit("/", 1)[0] for name in names if name.endswith(".json") and "/" in name})

    def check(self, manifest: Manifest, *, digests: bool) -> list[str]:
        """Compare the files on disk with a manifest.

        Args:
            manifest: What they should be.
            digests: Whether to read and hash every file, or only to look at sizes.

        Returns:
            One line a problem; empty when all is well.
        """

        def problem(entry: FileEntry) -> str | None:
            uri = self.path(entry.path)
            try:
                sha256, size = disk.digest(uri) if digests else (entry.sha256, disk.size_of(uri))
            except FileNotFoundError:
                return f"{entry.path}: missing"
            except StoreError as error:
                return f"{entry.path}: cannot be read ({error})"
            if size != entry.bytes:
                return f"{entry.path}: {size} bytes, the manifest says {entry.bytes}"
            if sha256 != entry.sha256:
                return f"{entry.path}: sha256 {sha256}, the manifest says {entry.sha256}"
            return None

        found = disk.in_threads(problem, manifest.files, _THREADS)
        return [line for line in found if line is not None]

    def drop(self, stage: str, unit: str | None = None) -> None:
        """Remove the manifest of a unit, or of every unit of a stage: it counts as not done again."""
        names = self.units(stage) if unit is None else [unit]
        for name in names:
            disk.remove(self.manifest_path(stage, name))
        folder = self._stage_path(stage)
        # Flushed, or a power cut could bring back a manifest whose files have been written anew since.
        if names and is_local(self.uri) and disk.exists(folder):
            disk.flush(folder)

    def litter(self) -> list[str]:
        """Return temporary files and directories (``*.partial*``) that killed writers left, relative.

        Runs with other seeds inside this one have their own.
        """
        found = set()
        for name in [*disk.list_files(self.uri), *self._directories()]:
            parts = name.split("/")
            if parts[0] == layout.SEEDS:
                continue
            for depth, part in enumerate(parts, start=1):
                if disk.PARTIAL in part:
                    found.add("/".join(parts[:depth]))
                    break
        return sorted(found)

    def clear_litter(self) -> list[str]:
        """Remove `litter` and return what was removed. Only while nobody writes to the run."""
        found = self.litter()
        for name in found:
            disk.remove(self.path(name), recursive=True)
        return found

    def delete_results(self) -> None:
        """Remove a run: its manifests first, then its results and litter, ``run.json`` last.

        What this package did not make stays.

        Raises:
            StoreError: The directory holds no ``run.json`` of ours.
        """
        try:
            ours = MARK in self._read_marked()
        except (RunNotFound, CorruptStore):
            ours = False
        if not ours:
            raise StoreError(
                f"{self.uri} is not deleted: it holds no run.json of hydra-pipe; "
                "choose another --out or empty the directory yourself"
            )
        listed = {entry.path for stage in self.stages() for m in self.manifests(stage) for entry in m.files}
        disk.remove(self.path(layout.MANIFESTS), recursive=True)
        if is_local(self.uri):
            disk.flush(self.uri)
        for kind in layout.KINDS:
            disk.remove(self.path(kind.folder), recursive=True)
        for name in sorted(listed):
            disk.remove(self.path(name))
        self.clear_litter()
        disk.remove(self.path(layout.RUN_INFO))

    def _directories(self) -> list[str]:
        # A killed writer may leave an empty directory, which no list of files shows.
        if not is_local(self.uri):
            return []
        return [prefix + name for prefix, names, _ in disk.walk(self.uri) for name in names]

    def _read_marked(self) -> dict[str, Any]:
        target = self.path(layout.RUN_INFO)
        try:
            return load(disk.read_bytes(target, most=disk.DOCUMENT_BYTES), target)
        except FileNotFoundError as error:
            raise RunNotFound(
                f"no run at {self.uri}: run.json is missing; make one with "
                f"`hydra-pipe run --out {self.uri}`, or check the path"
            ) from error

    def _entry(self, name: str) -> FileEntry:
        try:
            sha256, size = disk.digest(self.path(name), sync=True)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise IncompleteStage(
                f"{self.path(name)} is missing and cannot be committed; run the stage again"
            ) from error
        return FileEntry(path=name, bytes=size, sha256=sha256)

    def manifest_path(self, stage: str, unit: str) -> str:
        """Return where the manifest of a unit lies, once it is done."""
        return join(self._stage_path(stage), f"{check_name(unit, 'unit')}.json")

    def _stage_path(self, stage: str) -> str:
        return self.path(layout.MANIFESTS, *(check_name(part, "stage") for part in stage.split("/")))

    def units(self, stage: str) -> list[str]:
        """Return the names of the finished units of a stage, sorted; manifests are not read."""
        names = disk.list_files(self._stage_path(stage))
        return [name.removesuffix(".json") for name in names if "/" not in name and name.endswith(".json")]

    def _parse(self, target: str, data: bytes) -> Manifest:
        body = load(data, target)
        try:
            manifest = from_json(Manifest, body, target)
            for entry in manifest.files:
                self.path(entry.path)  # a path that leaves the run is refused here
        except SpecError as error:
            raise CorruptStore(
                f"{target} is no manifest ({error}); remove it and run the stage again"
            ) from error
        return manifest
