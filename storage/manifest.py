"""What a finished unit of work leaves in writing: its files, its numbers, and what it was made from.

A unit is identified by its **content**: a digest of its stage, name, files, values and inputs, but not of how
long it took. The inputs of a unit are the contents of the units that it read, and their inputs. So a unit that is done again with
the same bits is the same unit, and one with other bits is another: whatever was made from it can be told.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import layout
from .documents import load, plain
from .errors import CorruptStore, SpecError
from .stages import may_write
from .typed import from_json
from .uri import check_name, join

MEASURED = frozenset({"seconds", "peak_bytes"})
"""Values that say how a unit was done and not what came of it."""
CONTRADICTION = "several"
"""Stands for the content of an input of which units that were read had seen several: it is never that."""
FEW = 16
"""Units of a stage that are named one by one as inputs; of more, a range is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file a manifest vouches for.

    Attributes:
        path: Relative to the run, ``/``-separated.
        bytes: Its size.
        sha256: Its digest, hex.
        etag: What an object store called this version of it; None: no object store, or it gives none.
    """

    path: str
    bytes: int
    sha256: str
    etag: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What one finished unit of work left behind.

    Attributes:
        stage: Such as ``record`` or ``hydra/replay``.
        unit: Name of the unit inside the stage.
        files: The files, sorted by path.
        values: Numbers the unit reported, JSON-able.
        inputs: What it was made from, and what that was made from: contents by ``<stage>/<unit>``, or by ``<stage>/<first>:<last>`` for a range
            of units; those of a run with another seed begin with its place. None: a version committed it that did not say.
    """

    stage: str
    unit: str
    files: tuple[FileEntry, ...]
    values: Mapping[str, Any]
    inputs: Mapping[str, str] | None = None

    def content(self) -> str:
        """Return the digest by which units made from this one know it, hex."""
        values = {key: value for key, value in self.values.items() if key not in MEASURED}
        files = [[entry.path, entry.bytes, entry.sha256] for entry in self.files]
        body = [self.stage, self.unit, files, plain(values), plain(self.inputs)]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def document(self) -> dict[str, Any]:
        """Return it as it is stored, before the seal."""
        files = [{k: v for k, v in asdict(entry).items() if v is not None} for entry in self.files]
        body = {"stage": self.stage, "unit": self.unit, "files": files, "values": dict(self.values)}
        return body if self.inputs is None else {**body, "inputs": dict(self.inputs)}


def parse(data: bytes, target: str, stage: str, unit: str) -> Manifest:
    """Return the manifest in a file.

    Args:
        data: What the file holds.
        target: Its address, for messages.
        stage: Of the unit whose name the file bears.
        unit: Likewise.

    Raises:
        CorruptStore: It is damaged, is that of another unit, or lists a file that such a unit never writes.
    """
    body = load(data, target)
    try:
        manifest = from_json(Manifest, body, target)
        for entry in manifest.files:
            join(target, entry.path)  # a path that leaves the run is refused here
    except SpecError as error:
        raise CorruptStore(f"{target} is no manifest ({error}); remove it and run the stage again") from error
    if (manifest.stage, manifest.unit) != (stage, unit):
        raise CorruptStore(
            f"{target} is the manifest of {manifest.stage} {manifest.unit}; remove it and run the stage again"
        )
    foreign = next((entry.path for entry in manifest.files if not may_write(stage, entry.path)), None)
    if foreign is not None:
        raise CorruptStore(
            f"{target} lists {foreign}, which {stage} never writes; remove it and run the stage again"
        )
    return manifest


def named(used: Mapping[tuple[str, str], str], known: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the ``inputs`` of a manifest.

    Args:
        used: Content by (stage, unit), of each unit that was read.
        known: Content by unit, of all units of a stage of which more than `FEW` were read; by stage.
    """
    found: dict[str, str] = {}
    for stage in sorted({stage for stage, _ in used}):
        mine = {unit: content for (of, unit), content in used.items() if of == stage}
        if len(mine) <= FEW:
            found |= {f"{stage}/{unit}": mine[unit] for unit in sorted(mine)}
            continue
        first, last = min(mine), max(mine)
        found[f"{stage}/{first}:{last}"] = of_range({**known.get(stage, {}), **mine}, first, last)
    return found


def of_range(contents: Mapping[str, str], first: str, last: str) -> str:
    """Return ``<count>:<digest>`` of the units of a stage whose names lie between two, both included."""
    mine = sorted(unit for unit in contents if first <= unit <= last)
    text = "".join(f"{unit} {contents[unit]}\n" for unit in mine)
    return f"{len(mine)}:{hashlib.sha256(text.encode()).hexdigest()}"


def count_of(content: str) -> int:
    """Return the number of units that `of_range` was made of; 0 where that is no such text."""
    count = content.partition(":")[0]
    return int(count) if count.isdecimal() else 0


def parse_input(key: str, where: str) -> tuple[str, str, str]:
    """Return (stage, first unit, last unit) of a key of ``inputs``.

    Raises:
        CorruptStore: It is none.
    """
    stage, _, units = key.rpartition("/")
    first, _, last = units.partition(":")
    try:
        for part in (*layout.split_seed(stage)[1].split("/"), first, last or first):
            check_name(part, "input")
    except SpecError as error:
        raise CorruptStore(f"{where} names the input {key!r}: {error}; run the stage again") from error
    return stage, first, last or first


def stages_named(manifests: Iterable[Manifest]) -> set[str]:
    """Return the stages that manifests name as inputs."""
    return {key.rpartition("/")[0] for one in manifests for key in (one.inputs or ())}
