"""The doors to files and documents: whatever lies there or the system says, one named error that says where."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra_pipe.storage import documents, files
from hydra_pipe.storage.arrays import StoredArray, read_group
from hydra_pipe.storage.errors import (
    CorruptStore,
    DoesNotFit,
    HydraError,
    ResourceError,
    SpecError,
    StoreError,
)
from hydra_pipe.storage.place import check_place
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.storage.tables import read_table
from hydra_pipe.storage.typed import from_json

from tests.storage.test_typed import Outer


def failing(number: int) -> Any:
    def fail(path: Any, *others: Any, **more: Any) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    return fail


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "Permission denied; check who may read it"),
        (errno.EMFILE, "Too many open files; raise the limit on open files"),
        (errno.EIO, "Input/output error; check the disk"),
        (errno.ELOOP, "leads to itself"),
    ],
)
def test_what_cannot_be_read_is_named_and_not_missing(number, says, tmp_path, monkeypatch):
    place = str(tmp_path / "file")
    Path(place).write_text("{}")
    for name in ("open", "stat", "lstat"):
        monkeypatch.setattr(f"hydra_pipe.storage.files.os.{name}", failing(number))
    for read in (files.read_bytes, files.digest, files.size_of, files.exists):
        with pytest.raises(StoreError, match=says) as caught:
            read(place)
        assert place in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "choose a writable directory"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EEXIST, "in the way"),
        (errno.ENOENT, "No such file"),
    ],
)
def test_what_cannot_be_written_is_named(number, says, tmp_path, monkeypatch):
    monkeypatch.setattr("hydra_pipe.storage.files.os.write", failing(number))
    with pytest.raises(StoreError, match=says):
        files.write_bytes(str(tmp_path / "file"), b"x")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    (tmp_path / "a").write_text("x")
    run.commit("record", "trajectory", ["a"], {})
    real = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("manifests"):
            failing(errno.EACCES)(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for look in (run.stages, run.litter, lambda: files.list_files(run.uri)):
        with pytest.raises(StoreError, match="manifests: Permission denied"):
            look()
    monkeypatch.setattr("hydra_pipe.storage.place.os.listdir", failing(errno.EACCES))
    with pytest.raises(StoreError, match="Permission denied"):
        check_place(run.uri)


def test_no_pipe_and_no_device_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run.json").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "run.json"):
        for read in (files.read_bytes, files.digest):
            with pytest.raises(CorruptStore, match="no regular file"):
                read(str(path))
        with pytest.raises(SpecError, match=r"--track .*no regular file"):
            files.read_given(str(path), "--track")
    with pytest.raises(CorruptStore, match="no regular file"):
        RunDirectory(tmp_path).read()
    os.makedirs(tmp_path / "manifests/record")
    os.mkfifo(tmp_path / "manifests/record/trajectory.json")
    with pytest.raises(CorruptStore, match="no regular file"):
        RunDirectory(tmp_path).manifest("record", "trajectory")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "run.json", "wb") as file:
        file.truncate(files.DOCUMENT_BYTES + 1)  # sparse
    with pytest.raises(CorruptStore, match="268,435,457 bytes, at most 268,435,456"):
        RunDirectory(tmp_path).read()
    with pytest.raises(SpecError, match="more than the 67,108,864 bytes"):
        files.read_given(str(tmp_path / "run.json"), "--config")
    with pytest.raises(FileNotFoundError):
        files.read_given(str(tmp_path / "nothing"), "--config")
    with pytest.raises(SpecError, match="--config a\0b"):
        files.read_given("a\0b", "--config")


def test_no_threads_are_named(tmp_path, monkeypatch):
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    array = StoredArray.create(
        str(tmp_path), "values", shape=(8, 2), dtype="float32", chunk=(1, 2), dimensions=("row", "column")
    )
    array.write(0, np.zeros((8, 2), np.float32))
    monkeypatch.setattr("hydra_pipe.storage.arrays._cores", lambda: 4)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ResourceError, match="no more threads"):
        array.read()
    with pytest.raises(ResourceError, match="no more threads"):
        RunDirectory(tmp_path).commit("record", "x", array.chunk_files(0, 8), {})


DOCUMENTS = {
    "deep": (b'{"a":' * 100_000 + b"1", "deeper than 64"),
    "rather deep": (b'{"a":' * 200 + b"1" + b"}" * 200, "deeper than 64"),
    "lists": (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "deeper than 64"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "infinity": (b'{"a": 1e999}', "beyond float64"),
    "many digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    "half a character": (b'{"a": "\\ud800"}', "is not JSON"),
    "other bytes": (b'\xff\xfe{"a": 1}', "is not JSON"),
    "a list": (b"[1]", "no JSON object"),
    "nothing": (b"", "is not JSON"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_is_ours_or_damaged(name):
    data, says = DOCUMENTS[name]
    with pytest.raises(CorruptStore, match=says) as caught:
        documents.load(data, "RUN/run.json")
    assert str(caught.value).startswith("RUN/run.json ")
    assert len(str(caught.value)) < 400


def test_no_number_is_beyond_64_bits():
    for key, value in (("numbers", [1, 10**30]), ("parts", {"x": {"count": -(10**30)}})):
        with pytest.raises(CorruptStore, match="a number of 64 bits"):
            from_json(Outer, {"name": "x", "free": {}, "ok": True, key: value}, "run.json")


def metadata(**changes: Any) -> bytes:
    found = json.loads(METADATA)
    for path, value in changes.items():
        *above, last = path.split("__")
        place = found
        for part in above:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(found).encode()


CHUNKS = "chunk_grid__configuration__chunk_shape"
ARRAYS: dict[str, dict[str, Any]] = {
    "no chunks": {CHUNKS: [0, 2]},
    "negative shape": {"shape": [-1, 2]},
    "huge shape": {"shape": [10**30, 2]},
    "more chunks than there can be": {"shape": [2**50, 1], CHUNKS: [1, 1]},
    "huge chunks": {CHUNKS: [10**12, 2]},
    "another number of axes": {CHUNKS: [2]},
    "a shape of texts": {"shape": ["8", "2"]},
    "a shape of yes": {"shape": [True, 2]},
    "objects": {"data_type": "object"},
    "a record": {"data_type": "float32,int8"},
    "a list for a type": {"data_type": ["float32"]},
    "another codec": {"codecs": [{"name": "pickle"}]},
    "codecs of no kind": {"codecs": 3},
    "a codec of no kind": {"codecs__0": None},
    "other keys": {"chunk_key_encoding": {"name": "v2"}},
    "a fill of lists": {"fill_value": []},
    "a huge fill": {"data_type": "int8", "fill_value": 10**400},
    "a group": {"node_type": "group"},
    "another format": {"zarr_format": 2},
    "grids": {"chunk_grid": []},
}


@pytest.fixture(scope="module", autouse=True)
def _metadata(tmp_path_factory: Any) -> None:
    global METADATA
    place = tmp_path_factory.mktemp("array")
    StoredArray.create(
        str(place), "values", shape=(8, 2), dtype="float32", chunk=(2, 2), dimensions=("row", "column")
    )
    METADATA = (place / "values/zarr.json").read_text()


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_ours_or_damaged(name, tmp_path):
    (tmp_path / "values").mkdir()
    (tmp_path / "values/zarr.json").write_bytes(metadata())
    StoredArray.open(str(tmp_path), "values")
    (tmp_path / "values/zarr.json").write_bytes(metadata(**ARRAYS[name]))
    with pytest.raises(CorruptStore, match=r"values(/zarr.json)? ") as caught:
        StoredArray.open(str(tmp_path), "values").read(may_lack=True)
    assert "\n" not in str(caught.value)


def test_more_than_memory_holds_is_named(tmp_path, monkeypatch):
    (tmp_path / "values").mkdir()
    (tmp_path / "values/zarr.json").write_bytes(metadata(shape=[2**48, 2], **{CHUNKS: [2**24, 2]}))
    with pytest.raises(DoesNotFit, match="are to be read at once"):
        StoredArray.open(str(tmp_path), "values").read(may_lack=True)


def test_a_chunk_file_of_another_size_is_damaged(tmp_path):
    array = StoredArray.create(
        str(tmp_path), "values", shape=(8, 2), dtype="float32", chunk=(8, 2), dimensions=("row", "column")
    )
    array.write(0, np.zeros((8, 2), np.float32))
    chunk = tmp_path / array.chunk_files(0, 8)[0]
    with open(chunk, "ab") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CorruptStore, match="1,099,511,627,776 bytes"):
        array.read()


def test_groups_are_ours_or_damaged(tmp_path):
    for data in (b"{}", b'{"zarr_format": 3, "node_type": "group", "attributes": [1]}', b"[", b"[]"):
        (tmp_path / "zarr.json").write_bytes(data)
        with pytest.raises(CorruptStore, match=r"zarr\.json"):
            read_group(str(tmp_path))


def test_a_table_is_whole_or_damaged(tmp_path):
    table = pa.table({"a": pa.array([1, 2, 3], pa.int32())})
    place = tmp_path / "part.parquet"
    pq.write_table(table, place, write_page_checksum=True)
    assert read_table(str(place)).equals(table)
    data = place.read_bytes()
    for end in range(0, len(data), 7):
        place.write_bytes(data[:end])
        with pytest.raises(CorruptStore, match=r"part\.parquet cannot be read"):
            read_table(str(place))
    place.write_bytes(data)
    with pytest.raises(CorruptStore, match=r"part\.parquet cannot be read"):
        read_table(str(place), pa.schema([("b", pa.int32())]))
    place.unlink()
    with pytest.raises(CorruptStore, match="it is missing"):
        read_table(str(place))
    assert issubclass(CorruptStore, HydraError)
