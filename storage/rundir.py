"""The run directory: ``run.json``, and manifests that say what is done.

A unit of work (stage, unit) is done when ``manifests/<stage>/<unit>.json`` is there. That file is
written last, after every data file it names has been flushed and hashed. Readers obey manifests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import files as disk
from . import layout
from .documents import dump, load, plain
from .errors import CorruptStore, IncompleteStage, RunNotFound, StoreError
from .ledger import THREADS, Ledger, Reading
from .lock import check_writable
from .manifest import FileEntry, Manifest, parse
from .place import MARK
from .refused import full_disk_guard
from .threads import in_threads
from .uri import check_uri, is_local, join

__all__ = ["FORMAT", "MARK", "FileEntry", "Manifest", "RunDirectory"]

FORMAT = 1
"""Version of the layout; ``run.json`` carries it under `MARK`."""


class RunDirectory:
    """One run directory, local or remote.

    Attributes:
        uri: The checked address.
        ledger: What its manifests vouch for.
    """

    def __init__(self, uri: str | os.PathLike[str], *, digests: bool = True) -> None:
        """Name a directory; with ``digests`` off, files that are read are compared by size alone."""
        self.uri = check_uri(uri)
        self.ledger = Ledger(self.uri, digests=digests)

    def path(self, *parts: str) -> str:
        """Return the address of something inside the run."""
        return join(self.uri, *parts)

    def of_seed(self, seed: int) -> RunDirectory:
        """Return the run directory inside this one that holds the same run with another seed."""
        return RunDirectory(self.path(layout.of_seed(seed)), digests=self.ledger.digests)

    def vouched(self, uri: str) -> bytes:
        """Return the contents of a file of the run at an address, as its manifest says; see `Ledger.read_bytes`."""
        return self.ledger.read_bytes(uri)

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

    def update(self, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        """Change ``run.json``: it is read, changed and replaced at once, and only where the change makes it another.

        Nothing else writes it, so that what one command noted is never lost to what another had read before.

        Args:
            change: From what it says now (nothing, where there is none) to what it shall say. JSON-able; numpy scalars
                are converted, non-finite numbers become null.

        Raises:
            RunLost: Another command has taken the run over.
        """
        check_writable(self.uri)
        there = self.exists()
        before = self.read() if there else {}
        after = change(dict(before))
        if not there or plain(after) != before:
            disk.write_bytes(self.path(layout.RUN_INFO), dump({MARK: FORMAT, **after}, seal=True))

    def commit(
        self,
        stage: str,
        unit: str,
        files: Sequence[str],
        values: Mapping[str, Any],
        reading: Reading | None = None,
    ) -> Manifest:
        """Flush and hash the files of a finished unit, then write its manifest.

        Args:
            stage: Such as ``record`` or ``hydra/replay``.
            unit: Name inside the stage.
            files: Paths of its files, relative to the run.
            values: JSON-able numbers about the unit.
            reading: What it was made from; None: from nothing in the run.

        Returns:
            The manifest as it will be read back.

        Raises:
            IncompleteStage: A named file is missing; nothing is committed.
            StorageFull: No space for the manifest; the unit counts as not done.
            RunLost: Another command has taken the run over; nothing is committed.
        """
        check_writable(self.uri)
        target = self.manifest_path(stage, unit)
        names = sorted(set(files))
        entries = tuple(in_threads(self._entry, names, THREADS))
        if is_local(self.uri):
            with full_disk_guard(self.uri):
                disk.flush_directories(self.uri, [self.path(name) for name in names])
        inputs = {} if reading is None else self.ledger.inputs(reading)
        made = Manifest(stage=stage, unit=unit, files=entries, values=dict(values), inputs=inputs)
        data = dump(made.document(), seal=True)
        written = parse(data, target, stage, unit)  # what no reader would take is not written
        disk.write_bytes(target, data)
        if is_local(self.uri):
            disk.flush_directories(self.uri, [target])
        self.ledger.forget(stage)
        return written

    def manifest(self, stage: str, unit: str) -> Manifest | None:
        """Return the manifest of a unit, None if it is not done.

        Raises:
            CorruptStore: The manifest is damaged, or that of another unit.
        """
        return self.ledger.manifest(stage, unit)

    def manifests(self, stage: str) -> list[Manifest]:
        """Return the manifests of all finished units of a stage, sorted by unit."""
        return self.ledger.manifests(stage)

    def stages(self) -> list[str]:
        """Return the stages that have at least one finished unit, sorted."""
        names = disk.list_files(self.path(layout.MANIFESTS))
        return sorted({name.rsplit("/", 1)[0] for name in names if name.endswith(".json") and "/" in name})

    def check(self, manifest: Manifest, *, digests: bool, recall: bool = False) -> list[str]:
        """Compare the files on disk with a manifest.

        Args:
            manifest: What they should be.
            digests: Whether to compare contents, or only sizes.
            recall: Whether files need not be read that this process has read since they changed, or that
                an object store calls by the name it gave what was committed.

        Returns:
            One line a problem; empty when all is well.
        """

        found = self.ledger.compare_all(manifest.files, digest=digests, recall=recall)
        return [f"{entry.path}: {line}" for entry, line in zip(manifest.files, found, strict=True) if line]

    def drop(self, stage: str, unit: str | None = None) -> None:
        """Remove the manifest of a unit, or of every unit of a stage: it counts as not done again."""
        check_writable(self.uri)
        names = self.units(stage) if unit is None else [unit]
        for name in names:
            disk.remove(self.manifest_path(stage, name))
        self.ledger.forget(stage)
        folder = self.ledger.folder(stage)
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
        """Remove `litter` and return what was removed. Only while nobody else writes to the run."""
        check_writable(self.uri)
        found = self.litter()
        for name in found:
            disk.remove(self.path(name), recursive=True)
        return found

    def delete_results(self) -> None:
        """Remove a run: its manifests first, then its results and litter, ``run.json`` last.

        What this package did not make stays, and so do the lock of who does this and the log.

        Raises:
            StoreError: The directory holds no ``run.json`` of ours.
        """
        check_writable(self.uri)
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
        except CorruptStore as error:
            what = str(error).rpartition("; ")[0] or str(error)
            raise CorruptStore(
                f"{what}; restore it from a copy, remove its line document_sha256 if you changed it yourself, or choose another --out"
            ) from error

    def _entry(self, name: str) -> FileEntry:
        uri, tag = self.path(name), None
        try:
            if not is_local(uri):  # before it is read: a later version has another tag
                tag = disk.tagged(uri)[1]
            sha256, size = disk.digest(uri, sync=True)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise IncompleteStage(f"{uri} is missing and cannot be committed; run the stage again") from error
        return FileEntry(path=name, bytes=size, sha256=sha256, etag=tag)

    def manifest_path(self, stage: str, unit: str) -> str:
        """Return where the manifest of a unit lies, once it is done."""
        return self.ledger.address(stage, unit)

    def units(self, stage: str) -> list[str]:
        """Return the names of the finished units of a stage, sorted; manifests are not read."""
        return self.ledger.units(stage)
