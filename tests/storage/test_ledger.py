"""Reading by manifests: what is listed, of which size and digest, what it costs, and what a unit says it was made from."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest
from hydra_pipe.storage import files, ledger
from hydra_pipe.storage.documents import dump
from hydra_pipe.storage.errors import CorruptStore, IncompleteStage
from hydra_pipe.storage.ledger import LISTED
from hydra_pipe.storage.manifest import CONTRADICTION, FEW
from hydra_pipe.storage.rundir import Manifest, RunDirectory

CHUNK = "hypergradients/method=hydra.zarr/hypergradient/c"


def put(run: RunDirectory, name: str, content: bytes = b"abcd") -> str:
    files.write_bytes(run.path(name), content)
    return name


def a_shard(run: RunDirectory, number: int, content: bytes = b"abcd", *read: Manifest) -> Manifest:
    reading = run.ledger.remember()
    run.ledger.use(read)
    name = put(run, f"{CHUNK}/{number}", content)
    return run.commit("hydra/replay", f"shard-{number:05d}", [name], {"seconds": 1.5}, reading)


def a_record(run: RunDirectory, values: dict[str, int]) -> Manifest:
    return run.commit("record", "trajectory", [put(run, "trajectory.zarr/zarr.json")], values)


def test_only_what_a_manifest_lists_and_as_it_says(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_HELD_BYTES", 0)
    run = RunDirectory(place)
    a_shard(run, 0)
    address = run.path(f"{CHUNK}/0")
    assert RunDirectory(place).vouched(address) == b"abcd"
    put(run, f"{CHUNK}/1")
    with pytest.raises(IncompleteStage, match="no manifest lists it"):
        run.vouched(run.path(f"{CHUNK}/1"))
    with pytest.raises(FileNotFoundError):
        run.vouched(run.path(f"{CHUNK}/2"))
    put(run, f"{CHUNK}/0", b"abcd!")
    with pytest.raises(CorruptStore, match=r"5 bytes, the manifest says 4.*does shard-00000 anew"):
        RunDirectory(place, digests=False).vouched(address)
    put(run, f"{CHUNK}/0", b"abce")
    with pytest.raises(CorruptStore, match=r"sha256 .*the manifest says"):
        RunDirectory(place).vouched(address)
    assert RunDirectory(place, digests=False).vouched(address) == b"abce"
    files.remove(address)
    with pytest.raises(CorruptStore, match="missing"):
        run.vouched(address)
    a_shard(run, 0, b"new!")
    assert run.vouched(address) == b"new!"  # committed since by somebody else


def test_small_remote_files_are_fetched_once_a_process_as_long_as_the_manifests_list_them(
    tmp_path: Path,
) -> None:
    run = RunDirectory(f"memory://{tmp_path.name}-held")
    a_shard(run, 0)
    address = run.path(f"{CHUNK}/0")
    assert run.vouched(address) == b"abcd"
    put(run, f"{CHUNK}/0", b"abce")  # who has read what was committed keeps that
    assert RunDirectory(run.uri).vouched(address) == b"abcd"
    assert run.check(run.manifest("hydra/replay", "shard-00000"), digests=True)  # verify reads again
    a_shard(run, 0, b"new!")
    assert RunDirectory(run.uri).vouched(address) == b"new!"
    local = RunDirectory(tmp_path / "run")
    a_shard(local, 0)
    address = local.path(f"{CHUNK}/0")
    assert local.vouched(address) == b"abcd"
    put(local, f"{CHUNK}/0", b"abce")
    with pytest.raises(CorruptStore, match="the manifest says"):
        local.vouched(address)


def test_many_remote_files_of_a_folder_are_compared_by_a_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(f"memory://{tmp_path.name}-listed")
    names = [put(run, f"{CHUNK}/{k}", b"abcd") for k in range(LISTED)]
    made = run.commit("hydra/replay", "shard-00000", names, {"seconds": 1.5})

    def never(uri: str) -> files.Tag:
        raise AssertionError(uri)

    with monkeypatch.context() as patch:
        patch.setattr(files, "tagged", never)
        assert run.check(made, digests=False) == []
        put(run, names[1], b"abc")
        assert run.check(made, digests=False) == [f"{names[1]}: 3 bytes, the manifest says 4"]
    files.remove(run.path(names[2]))
    assert f"{names[2]}: missing" in run.check(made, digests=False)


def test_a_manifest_of_another_unit_or_with_files_of_others_counts_for_nothing(place: str) -> None:
    run = RunDirectory(place)
    made = a_shard(run, 0)
    data = files.read_bytes(run.manifest_path("hydra/replay", "shard-00000"))
    files.write_bytes(run.manifest_path("hydra/replay", "shard-00001"), data)
    with pytest.raises(CorruptStore, match="is the manifest of hydra/replay shard-00000"):
        run.manifest("hydra/replay", "shard-00001")
    with pytest.raises(CorruptStore, match="which record never writes"):
        run.commit("record", "trajectory", [made.files[0].path], {})
    with pytest.raises(CorruptStore, match="which record never writes"):
        run.commit("record", "trajectory", [put(run, "run.json")], {})
    assert run.manifest("record", "trajectory") is None
    twice = dump(
        {**made.document(), "unit": "shard-00001", "files": [{**made.document()["files"][0], "sha256": "0"}]}
    )
    files.write_bytes(run.manifest_path("hydra/replay", "shard-00001"), twice)
    with pytest.raises(CorruptStore, match="listed by hydra/replay shard-00000 and by shard-00001"):
        RunDirectory(place).ledger.listed("hypergradients/method=hydra.zarr")


def test_an_old_file_is_hashed_once_a_process_and_a_touched_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    a_shard(run, 0)
    path = Path(run.path(f"{CHUNK}/0"))
    monkeypatch.setattr(ledger, "_FRESH_SECONDS", -1.0)  # as if it had been written long ago
    hashed: list[int] = []

    def counted(data: bytes) -> object:
        hashed.append(len(data))
        return hashlib.sha256(data)

    monkeypatch.setattr(ledger, "sha256", counted)
    for _ in range(3):
        RunDirectory(run.uri).vouched(str(path))
    assert hashed == [4]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"abce")
    os.utime(path, ns=times)  # the system's own time of change cannot be set back
    with pytest.raises(CorruptStore, match="sha256"):
        RunDirectory(run.uri).vouched(str(path))


def test_a_store_that_calls_a_file_as_before_need_not_send_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory("memory://ledger-tags/run")
    tags = {run.path(f"{CHUNK}/0"): "one"}
    size = files.size_of
    monkeypatch.setattr(files, "tagged", lambda uri: (size(uri), tags[uri]))
    manifest = a_shard(run, 0)
    assert manifest.files[0].etag == "one"
    assert run.manifest("hydra/replay", "shard-00000") == manifest
    read: list[str] = []
    digest = files.digest

    def counted(uri: str, *, sync: bool = False) -> tuple[str, int]:
        read.append(uri)
        return digest(uri, sync=sync)

    monkeypatch.setattr(files, "digest", counted)
    assert run.check(manifest, digests=True, recall=True) == []
    assert read == []
    assert run.check(manifest, digests=True) == []  # verify reads it all the same
    assert len(read) == 1
    tags[run.path(f"{CHUNK}/0")] = "two"  # copied to another store, say
    assert run.check(manifest, digests=True, recall=True) == []
    files.write_bytes(run.path(f"{CHUNK}/0"), b"abce")
    assert "sha256" in run.check(manifest, digests=True, recall=True)[0]


def test_content_is_what_came_of_it_and_not_how_long_it_took(place: str) -> None:
    run = RunDirectory(place)
    first = a_shard(run, 0)
    run.drop("hydra/replay", "shard-00000")
    reading = run.ledger.remember()
    again = run.commit(
        "hydra/replay", "shard-00000", [f"{CHUNK}/0"], {"seconds": 9.0, "peak_bytes": 7}, reading
    )
    assert again.content() == first.content()
    assert a_shard(run, 0, b"abce").content() != first.content()
    assert a_shard(run, 0, b"abcd", a_record(run, {})).content() != first.content()


def test_many_inputs_are_one_line_and_each_counts(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    record = a_record(run, {})
    shards = [a_shard(run, number, b"abcd", record) for number in range(FEW + 4)]
    reading = run.ledger.remember()
    for number in range(1, FEW + 3):
        run.vouched(run.path(f"{CHUNK}/{number}"))
    made = run.commit("hydra/reduce", "rows-00000", [], {}, reading)
    assert made.inputs is not None
    assert set(made.inputs) == {f"hydra/replay/shard-00001:shard-{FEW + 2:05d}", "record/trajectory"}
    assert run.ledger.outdated([made]) is None
    a_shard(run, 0, b"zzzz", record)  # beyond the range
    assert run.ledger.outdated([made]) is None
    run.drop("hydra/replay", "shard-00005")
    assert run.ledger.outdated([made]) is None  # gone, which voids nothing, and is told
    assert run.ledger.missing_inputs(made) == [f"hydra/replay shard-00001 to shard-{FEW + 2:05d}"]
    a_shard(run, 5, b"zzzz", record)
    assert "another version of hydra/replay shard-00001 to" in (run.ledger.outdated([made]) or "")
    a_shard(run, 5, b"abcd", record)
    assert run.ledger.outdated([made]) is None
    assert shards[5] == run.manifest("hydra/replay", "shard-00005")
    a_record(run, {"other": 1})
    assert "another version of record trajectory" in (run.ledger.outdated([made]) or "")
    assert made in run.ledger.outdated_units(run.stages())


def test_what_was_made_from_two_versions_of_one_thing_is_never_current(place: str) -> None:
    run = RunDirectory(place)
    old = a_shard(run, 0, b"abcd", a_record(run, {}))
    new = a_shard(run, 1, b"abcd", a_record(run, {"other": 1}))
    reading = run.ledger.remember()
    run.ledger.use([old, new])
    made = run.commit("hydra/reduce", "rows-00000", [], {}, reading)
    assert made.inputs is not None
    assert made.inputs["record/trajectory"] == CONTRADICTION
    assert "record trajectory" in (run.ledger.outdated([made]) or "")


def test_the_run_of_another_seed_may_be_an_input(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    inner = run.of_seed(1)
    shard = a_shard(inner, 0, b"abcd", a_record(inner, {}))
    a_record(run, {})
    reading = run.ledger.remember()
    run.ledger.use([shard], seed="seeds/seed=1")
    made = run.commit("hydra-seeds2/reduce", "rows-00000", [], {}, reading)
    assert made.inputs is not None
    assert set(made.inputs) == {"seeds/seed=1/hydra/replay/shard-00000", "seeds/seed=1/record/trajectory"}
    assert run.ledger.outdated([made]) is None
    a_record(run, {"other": 1})
    assert run.ledger.outdated([made]) is None
    a_record(inner, {"other": 1})
    assert "seeds/seed=1/record trajectory" in (run.ledger.outdated([made]) or "")
    assert run.ledger.outdated_units(run.stages()) == [made]


def test_tables_beyond_the_budget_are_compared_by_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    names = [put(run, f"contributions/method=hydra/part-{k}.parquet") for k in range(2)]
    manifest = run.commit("hydra/reduce", "rows-00000", names, {})
    for name in names:
        Path(run.path(name)).write_bytes(b"abce")
    with pytest.raises(CorruptStore, match="sha256"):
        run.ledger.trust(manifest.files)
    monkeypatch.setattr(ledger, "LOCAL_DIGEST_BYTES", 0)
    run.ledger.trust(manifest.files)
    Path(run.path(names[0])).write_bytes(b"abc")
    with pytest.raises(CorruptStore, match="3 bytes"):
        run.ledger.trust(manifest.files)


def test_a_run_directory_pickles(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "run"), digests=False)
    a_shard(run, 0)
    again = pickle.loads(pickle.dumps(run))
    assert (again.uri, again.ledger.digests) == (run.uri, False)
    assert pickle.loads(pickle.dumps(run.vouched))(run.path(f"{CHUNK}/0")) == b"abcd"
