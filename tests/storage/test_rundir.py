"""Manifests: what is done, what is damaged, what may be deleted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hydra_pipe.storage import files
from hydra_pipe.storage.errors import (
    CorruptStore,
    IncompleteStage,
    RunNotFound,
    SpecError,
    StorageFull,
    StoreError,
)
from hydra_pipe.storage.rundir import FileEntry, Manifest, RunDirectory


def a_run(place: str) -> RunDirectory:
    run = RunDirectory(place)
    run.update(lambda _: {"spec": {"epochs": 3}})
    return run


def a_unit(run: RunDirectory, stage: str = "hydra/replay", unit: str = "shard-0") -> Manifest:
    files.write_bytes(run.path("hypergradients", "method=hydra.zarr", "c", "0"), b"abc")
    files.write_bytes(run.path("hypergradients", "method=hydra.zarr", "c", "1"), b"defg")
    names = [f"hypergradients/method=hydra.zarr/c/{k}" for k in (1, 0, 1)]
    return run.commit(stage, unit, names, {"rows": np.int64(7), "loss": float("nan"), "list": (1, 2)})


def test_run_json(place: str) -> None:
    run = RunDirectory(place)
    assert not run.exists()
    with pytest.raises(RunNotFound, match="hydra-pipe run"):
        run.read()
    run.update(lambda _: {"spec": {"epochs": 3}, "D": np.int32(5)})
    assert run.exists()
    assert run.read() == {"spec": {"epochs": 3}, "D": 5}


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_run_json(place: str, content: bytes) -> None:
    run = a_run(place)
    files.write_bytes(run.path("run.json"), content)
    with pytest.raises(CorruptStore, match=r"run\.json"):
        run.read()


def test_a_run_of_a_later_format_is_refused(place: str) -> None:
    run = RunDirectory(place)
    files.write_bytes(run.path("run.json"), b'{"hydra_pipe_run": 2}')
    with pytest.raises(StoreError, match="format 2"):
        run.read()


def test_commit_and_read_back(place: str) -> None:
    run = a_run(place)
    assert run.manifest("hydra/replay", "shard-0") is None
    assert run.manifests("hydra/replay") == []
    assert run.stages() == []
    manifest = a_unit(run)
    assert [(entry.path[-3:], entry.bytes) for entry in manifest.files] == [("c/0", 3), ("c/1", 4)]
    assert manifest.values == {"rows": 7, "loss": None, "list": [1, 2]}
    assert run.manifest("hydra/replay", "shard-0") == manifest
    other = a_unit(run, unit="shard-1")
    run.commit("record", "trajectory", [], {})
    assert run.manifests("hydra/replay") == [manifest, other]
    assert run.stages() == ["hydra/replay", "record"]
    assert run.manifests("hydra") == []
    run.drop("hydra/replay", "shard-0")
    assert run.manifest("hydra/replay", "shard-0") is None
    run.drop("hydra/replay")
    assert run.stages() == ["record"]


def test_nothing_is_committed_that_is_not_there(place: str) -> None:
    run = a_run(place)
    with pytest.raises(IncompleteStage, match="gone"):
        run.commit("record", "trajectory", ["gone"], {})
    assert run.manifest("record", "trajectory") is None


@pytest.mark.parametrize(
    ("stage", "unit"), [("../x", "u"), ("a//b", "u"), ("record", "../u"), ("record", "a/b")]
)
def test_names_are_checked(place: str, stage: str, unit: str) -> None:
    with pytest.raises(SpecError):
        RunDirectory(place).commit(stage, unit, [], {})


def test_paths_stay_inside(place: str) -> None:
    run = a_run(place)
    with pytest.raises(SpecError):
        run.commit("record", "trajectory", ["../elsewhere"], {})


def test_check_finds_what_changed(place: str) -> None:
    run = a_run(place)
    manifest = a_unit(run)
    assert run.check(manifest, digests=True) == []
    first, second = (run.path(entry.path) for entry in manifest.files)
    files.write_bytes(first, b"abX")
    assert run.check(manifest, digests=False) == []
    (line,) = run.check(manifest, digests=True)
    assert "sha256" in line
    files.write_bytes(first, b"ab")
    files.remove(second)
    size, missing = run.check(manifest, digests=False)
    assert "2 bytes, the manifest says 3" in size
    assert missing.endswith("c/1: missing")


@pytest.mark.parametrize("damage", ["truncate", "digit", "path", "type"])
def test_a_damaged_manifest_is_not_believed(place: str, damage: str) -> None:
    run = a_run(place)
    a_unit(run)
    target = run.path("manifests", "hydra", "replay", "shard-0.json")
    text = files.read_bytes(target)
    body = json.loads(text)
    body.pop("document_sha256")
    body["files"][0]["path"] = "../../etc/passwd"
    changed = {
        "truncate": text[:-20],
        "digit": text.replace(b'"rows": 7', b'"rows": 8'),
        "path": json.dumps(body).encode(),
        "type": b'{"stage": "hydra/replay"}',
    }[damage]
    files.write_bytes(target, changed)
    with pytest.raises(CorruptStore, match="shard-0"):
        run.manifest("hydra/replay", "shard-0")


def test_the_manifest_comes_last_and_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of fsync and rename: data, their directories, then the manifest and its directory."""
    run = a_run(str(tmp_path / "run"))
    log: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        log.append("sync " + os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(run.uri))
        real_sync(descriptor)

    def replace(source: str, target: str) -> None:
        log.append("name " + target.removeprefix(run.uri))
        real_replace(source, target)

    files.write_parts(run.path("data", "a"), [b"abc"], sync=False)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    run.commit("record", "trajectory", ["data/a"], {})
    named = log.index("name /manifests/record/trajectory.json")
    for needed in ("sync /data/a", "sync /data", "sync "):
        assert needed in log[:named]
    assert log[named - 1].startswith("sync /manifests/record/trajectory.json.")
    assert "sync /manifests/record" in log[named:]
    assert "sync /manifests" in log[named:]


def test_a_full_disk_commits_nothing(
    tmp_path: Path, full_writes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(str(tmp_path))
    (tmp_path / "data").write_bytes(b"abc")
    with pytest.raises(StorageFull):
        run.commit("record", "trajectory", ["data"], {})
    monkeypatch.undo()
    assert run.manifest("record", "trajectory") is None
    assert run.stages() == []
    assert run.litter() == []
    run.commit("record", "trajectory", ["data"], {})
    assert run.stages() == ["record"]


def test_litter(place: str) -> None:
    run = a_run(place)
    a_unit(run)
    kept = files.list_files(run.uri)
    files.write_bytes(run.path("trajectory.zarr.0f.partial", "c", "0"), b"x")
    files.write_bytes(run.path("hypergradients", "method=hydra.zarr", "c", "2.0f.partial"), b"x")
    found = ["hypergradients/method=hydra.zarr/c/2.0f.partial", "trajectory.zarr.0f.partial"]
    assert run.litter() == found
    assert run.clear_litter() == found
    assert run.litter() == []
    assert files.list_files(run.uri) == kept


def test_an_empty_partial_directory_is_litter(tmp_path: Path) -> None:
    (tmp_path / "trajectory.zarr.0f.partial" / "c").mkdir(parents=True)
    run = RunDirectory(tmp_path)
    assert run.clear_litter() == ["trajectory.zarr.0f.partial"]
    assert os.listdir(tmp_path) == []


def test_delete_results_removes_a_run_and_nothing_else(place: str) -> None:
    run = a_run(place)
    a_unit(run)
    files.write_bytes(run.path("exact.bin"), b"listed in a manifest")
    run.commit("hydra-exact/adjoint", "all", ["exact.bin"], {})
    for name in ("trajectory.zarr/zarr.json", "samples/method=x/part-0.parquet", "notes.txt"):
        files.write_bytes(run.path(*name.split("/")), b"x")
    run.delete_results()
    assert files.list_files(run.uri) == ["notes.txt"]
    with pytest.raises(StoreError, match="not deleted"):
        run.delete_results()


@pytest.mark.parametrize("content", [None, b"{}", b"no json"])
def test_delete_results_refuses_other_directories(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.txt").write_text("x")
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(StoreError, match="not deleted"):
        RunDirectory(tmp_path).delete_results()
    assert (tmp_path / "samples" / "mine.txt").exists()


def test_entries_are_frozen() -> None:
    entry = FileEntry(path="a", bytes=1, sha256="0")
    with pytest.raises(AttributeError):
        entry.path = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stage", 5),
        ("values", [1]),
        ("files", {"a": 1}),
        ("files", [{"path": "a", "bytes": "x", "sha256": "b"}]),
        ("files", [{"path": 5, "bytes": 1, "sha256": "b"}]),
        ("files", [{"path": "a", "bytes": 1, "sha256": None}]),
    ],
)
def test_a_manifest_of_other_types_is_named(tmp_path, field, value):
    run = RunDirectory(str(tmp_path))
    run.commit("record", "trajectory", [], {})
    file = tmp_path / "manifests" / "record" / "trajectory.json"
    body = {**json.loads(file.read_text()), field: value}
    del body["document_sha256"]
    file.write_text(json.dumps(body))
    with pytest.raises(CorruptStore, match=rf"trajectory\.json: {field}.* must be"):
        run.manifest("record", "trajectory")
