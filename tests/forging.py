"""Runs whose numbers are wrong and whose manifests all vouch for them: only what the numbers mean can tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra_pipe.storage import files, layout
from hydra_pipe.storage.documents import dump
from hydra_pipe.storage.manifest import FileEntry, Manifest, of_range
from hydra_pipe.storage.rundir import RunDirectory

Values = Callable[[Manifest], dict[str, Any]]


def vouch(place: Path | str, values: Values = lambda manifest: dict(manifest.values)) -> None:
    """Write all manifests of a run, and of the runs with other seeds inside it, anew for the files as they are.

    Args:
        place: The run.
        values: Gives what a manifest is to say beside its files and inputs.
    """
    top = RunDirectory(str(place))
    found: dict[tuple[str, str, str], Manifest] = {}
    seeds = sorted(Path(place, layout.SEEDS).glob("seed=*"))
    for at in ("", *(f"{layout.SEEDS}/{seed.name}" for seed in seeds)):
        directory = RunDirectory(top.path(at)) if at else top
        for stage in directory.stages():
            for manifest in directory.manifests(stage):
                entries = []
                for entry in manifest.files:
                    sha256, size = files.digest(directory.path(entry.path))
                    entries.append(FileEntry(path=entry.path, bytes=size, sha256=sha256))
                changed = replace(manifest, files=tuple(entries), values=values(manifest))
                found[at, stage, manifest.unit] = changed
    while True:  # inputs have inputs: as often as there are stages in a row
        contents = {key: manifest.content() for key, manifest in found.items()}
        settled = {
            (at, stage, unit): replace(manifest, inputs=_inputs(manifest, at, contents))
            for (at, stage, unit), manifest in found.items()
        }
        if settled == found:
            break
        found = settled
    for (at, stage, unit), manifest in found.items():
        directory = RunDirectory(top.path(at)) if at else top
        files.write_bytes(directory.manifest_path(stage, unit), dump(manifest.document(), seal=True))
        directory.ledger.refresh()


def _inputs(manifest: Manifest, at: str, contents: dict[tuple[str, str, str], str]) -> dict[str, str] | None:
    if manifest.inputs is None:
        return None
    found = {}
    for key in manifest.inputs:
        whole, _, units = key.rpartition("/")
        seed, stage = layout.split_seed(whole)
        first, _, last = units.partition(":")
        mine = {
            unit: content for (of, its, unit), content in contents.items() if (of, its) == (seed or at, stage)
        }
        found[key] = of_range(mine, first, last) if last else mine[first]
    return found
