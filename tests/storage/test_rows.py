"""Row stores: written in chunks, read in any range, never silently wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hydra_pipe.storage import arrays, files, rows
from hydra_pipe.storage.arrays import StoredArray
from hydra_pipe.storage.errors import CorruptStore, IncompleteStage, StorageFull, StoreError
from hydra_pipe.storage.rows import RowStore, chunk_rows_for
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.storage.uri import is_local, join

N, D, CHUNK = 11, 7, 4


def a_store(place: str, **changes: Any) -> RowStore:
    arguments: dict[str, Any] = {
        "name": "hypergradient",
        "rows": N,
        "columns": D,
        "dtype": "float32",
        "chunk_rows": CHUNK,
        "dimensions": ("train_index", "parameter"),
        "row_columns": {
            "train_index": np.arange(N, dtype=np.int32) * 3,
            "loss": np.full(N, np.nan),
            "label": np.full(N, -1, dtype=np.int16),
        },
        "attrs": {"n_train": 60, "method": "hydra"},
    }
    return RowStore.create(join(place, "method=hydra.zarr"), **{**arguments, **changes})


def values(dtype: str = "float32") -> np.ndarray:
    block = np.random.default_rng(0).standard_normal((N, D)).astype(dtype)
    block[2] = 0
    return block


def filled(place: str, dtype: str = "float32") -> tuple[RowStore, np.ndarray]:
    store, block = a_store(place, dtype=dtype), values(dtype)
    store.write(0, block[:8])
    store.write(8, block[8:])
    return store, block


@pytest.mark.parametrize(
    ("columns", "itemsize", "count", "parts", "expected"),
    [
        (62_006, 4, 60_000, 1, (16 << 20) // (62_006 * 4)),
        (10, 4, 100, 1, 25),
        (10, 4, 100, 4, 7),
        (10, 4, 3, 8, 1),
        (100_000_000, 4, 50, 1, 1),
        (2, 8, 1, 1, 1),
    ],
)
def test_chunk_rows(columns: int, itemsize: int, count: int, parts: int, expected: int) -> None:
    assert chunk_rows_for(columns, itemsize, count, parts) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_range_is_read_back_bit_for_bit(place: str, dtype: str) -> None:
    store, block = filled(place, dtype)
    again = RowStore.open(store.uri, "hypergradient")
    assert (again.rows, again.columns, again.dtype, again.chunk_rows) == (N, D, dtype, CHUNK)
    assert again.attrs == {"n_train": 60, "method": "hydra"}
    for start in range(N + 1):
        for stop in range(start, N + 1):
            np.testing.assert_array_equal(again.read(start, stop), block[start:stop])
    out = np.empty((6, D), dtype)
    assert again.read(3, 9, out) is out
    np.testing.assert_array_equal(out, block[3:9])


def test_special_values_survive(place: str) -> None:
    store, block = a_store(place), values()
    block[0, :4] = (-0.0, np.inf, np.float32(1e-45), np.nan)
    block[4:8] = np.nan  # the fill value: Zarr would by default not even write this chunk
    store.write(0, block)
    assert store.read(0, N).tobytes() == block.tobytes()


def test_other_readers_of_zarr_see_the_same(place: str) -> None:
    store, block = filled(place)
    np.testing.assert_array_equal(store.array[...], block)
    if is_local(place):
        group = zarr.open_group(store.uri, mode="r")
        np.testing.assert_array_equal(group["hypergradient"][3:9], block[3:9])
        np.testing.assert_array_equal(group["train_index"][...], np.arange(N) * 3)
        assert dict(group.attrs)["n_train"] == 60


def test_what_zarr_writes_is_read(tmp_path: Path) -> None:
    store, block = a_store(str(tmp_path)), values()
    array = zarr.open_array(store.uri, path="hypergradient", mode="r+")
    array[...] = block
    np.testing.assert_array_equal(store.read(0, N), block)


def test_the_array_given_to_others_is_read_only(place: str) -> None:
    store, _ = filled(place)
    with pytest.raises(ValueError, match="read"):
        store.array[0] = 0


def test_columns(place: str) -> None:
    store, _ = filled(place)
    assert store.column_names() == ["train_index", "loss", "label"]
    np.testing.assert_array_equal(store.column("train_index"), np.arange(N) * 3)
    assert np.isnan(store.column("loss")).all()
    before = store.metadata_files()
    assert "train_index/c/0" in before
    assert "label/c/1" not in before
    store.write_column("loss", np.arange(8.0))
    store.write_column("label", np.arange(4), start=4)
    assert store.column("label").tolist() == [-1] * 4 + [0, 1, 2, 3] + [-1] * 3
    np.testing.assert_array_equal(store.column("loss"), [*range(8), np.nan, np.nan, np.nan])
    assert set(store.metadata_files()) - set(before) == {"loss/c/0", "loss/c/1", "label/c/1"}
    with pytest.raises(StoreError, match="it has train_index, loss, label"):
        store.column("nothing")
    with pytest.raises(StoreError, match="int16"):
        store.write_column("label", np.full(N, 40_000))
    with pytest.raises(StoreError, match=r"int16.*0\.5|int16"):
        store.write_column("label", np.full(N, 0.5))


def test_columns_of_several_numbers_a_row(place: str) -> None:
    wide = np.arange(2.0 * N).reshape(N, 2)
    columns = {
        "train_index": np.arange(N),
        "given": wide,
        "later": np.broadcast_to(np.float32(np.nan), (N, 3)),
    }
    store = a_store(place, row_columns=columns)
    np.testing.assert_array_equal(store.column("given"), wide)
    later = np.ones((4, 3), np.float32)
    store.write_column("later", later, start=4)
    assert store.column_files("later", 4, 8) == ["later/c/1/0"]
    assert [path for path in store.metadata_files() if path.startswith("later/c")] == ["later/c/1/0"]
    a_store(place, row_columns=columns)  # the same: opened
    found = store.column("later")
    np.testing.assert_array_equal(found[4:8], later)
    assert np.isnan(found[[0, 3, 8, 10]]).all()
    group = zarr.open_group(store.uri, mode="r")
    assert group["later"].metadata.dimension_names == ("train_index", "later_column")
    with pytest.raises(StoreError, match="column given holds other values"):
        a_store(place, row_columns={**columns, "given": wide[:, :1]})
    for shape in ((N, 0), (N, 1, 1)):
        with pytest.raises(StoreError, match=rf"column x has shape \({N}, "):
            a_store(join(place, "other"), row_columns={"x": np.zeros(shape)})


def test_files_name_all_there_is(place: str) -> None:
    store, _ = filled(place)
    assert store.files(0, 4) == ["hypergradient/c/0/0"]
    assert store.files(3, 9) == [f"hypergradient/c/{k}/0" for k in range(3)]
    assert sorted([*store.files(0, N), *store.metadata_files()]) == files.list_files(store.uri)
    run = RunDirectory(place)
    names = [f"method=hydra.zarr/{name}" for name in [*store.files(0, N), *store.metadata_files()]]
    assert run.check(run.commit("hydra/replay", "all", names, {}), digests=True) == []


@pytest.mark.parametrize(("start", "stop"), [(1, 4), (0, 3), (4, 7), (5, 11)])
def test_writes_that_share_a_chunk_are_refused(place: str, start: int, stop: int) -> None:
    store = a_store(place)
    with pytest.raises(StoreError, match=rf"{start}\.\.{stop} .* chunks of {CHUNK} rows"):
        store.write(start, values()[start:stop])
    with pytest.raises(StoreError, match=rf"{start}\.\.{stop} .* chunks of {CHUNK} rows"):
        store.write_column("loss", np.zeros(stop - start), start)


def test_blocks_that_do_not_fit_are_refused(place: str) -> None:
    store = a_store(place)
    for block, message in (
        (np.zeros((4, D + 1), np.float32), r"\(4, 8\)"),
        (np.zeros(4, np.float32), r"\(4,\)"),
        (np.zeros((4, D)), "float64"),
        (np.zeros((16, D), np.float32), r"0\.\.16 .* 11 rows"),
    ):
        with pytest.raises(StoreError, match=message):
            store.write(0, block)
    for start, stop in ((-1, 3), (3, 12), (5, 4)):
        with pytest.raises(StoreError, match=rf"{start}\.\.{stop} .* 11 rows"):
            store.read(start, stop)
    with pytest.raises(StoreError, match="out is float64"):
        store.read(0, 3, np.empty((3, D)))


def test_create_again_opens(place: str) -> None:
    store, block = filled(place)
    store.write_column("loss", np.arange(float(N)))
    np.testing.assert_array_equal(a_store(place).read(0, N), block)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": 8}, "columns is 7, not 8"),
        ({"dtype": "float64"}, "dtype is float32, not float64"),
        ({"chunk_rows": 5}, "chunk_rows is 4, not 5"),
        ({"rows": 5, "row_columns": {}}, "rows is 11, not 5"),
        ({"attrs": {"n_train": 61, "method": "hydra"}}, "n_train is 60, not 61"),
        ({"attrs": {"n_train": 60}}, "method is 'hydra', not None"),
        ({"row_columns": {"train_index": np.arange(N, dtype=np.int32) * 3}}, "columns are"),
        (
            {
                "row_columns": {
                    "train_index": np.arange(N, dtype=np.int32),
                    "loss": np.full(N, np.nan),
                    "label": np.full(N, -1, dtype=np.int16),
                }
            },
            "column train_index holds other values",
        ),
    ],
)
def test_create_refuses_other_metadata(place: str, changes: dict[str, Any], message: str) -> None:
    store, block = filled(place)
    with pytest.raises(StoreError, match=message):
        a_store(place, **changes)
    np.testing.assert_array_equal(RowStore.open(store.uri, "hypergradient").read(0, N), block)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0, "row_columns": {}}, "at least 1"),
        ({"dtype": "float16"}, "float32 or float64"),
        ({"row_columns": {"x": np.zeros(3)}}, r"\(3,\)"),
        ({"row_columns": {"x": np.array(["a"] * N)}}, "numbers"),
        ({"chunk_rows": 1 << 28, "row_columns": {}}, "at most"),
    ],
)
def test_impossible_arguments(place: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        a_store(place, **changes)


def test_an_interrupted_creation_starts_over(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "write_group", killed)
    with pytest.raises(KeyboardInterrupt):
        a_store(place)
    monkeypatch.undo()
    with pytest.raises(IncompleteStage):
        RowStore.open(join(place, "method=hydra.zarr"), "hypergradient")
    store, block = filled(place)
    np.testing.assert_array_equal(store.read(0, N), block)


def test_what_is_not_there(place: str) -> None:
    with pytest.raises(IncompleteStage):
        RowStore.open(join(place, "method=hydra.zarr"), "hypergradient")
    assert not is_local(place) or not os.path.exists(place), "opening must not create anything"
    store = a_store(place)
    with pytest.raises(IncompleteStage, match="no array gradient"):
        RowStore.open(store.uri, "gradient")
    store.write(0, values()[:8])
    store.read(0, 8)
    with pytest.raises(IncompleteStage, match="never written"):
        store.read(7, 9)


@pytest.mark.parametrize("damage", ["flip", "flip the sum", "truncate", "empty", "zeros", "another chunk"])
def test_damaged_chunks_are_noticed(place: str, damage: str) -> None:
    store, _ = filled(place)
    target = join(store.uri, "hypergradient/c/1/0")
    data = bytearray(files.read_bytes(target))
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "flip the sum":
        data[-1] ^= 0x80
    else:
        short = files.read_bytes(join(store.uri, "label/zarr.json"))
        data = {"truncate": data[:-3], "empty": b"", "zeros": bytes(len(data)), "another chunk": short}[
            damage
        ]
    files.write_bytes(target, bytes(data))
    store.read(0, 4)
    with pytest.raises(CorruptStore, match=r"method=hydra\.zarr.*rows 4\.\.8 of hypergradient"):
        store.read(0, N)


def test_every_single_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store, _ = filled(str(tmp_path))
    target = store.uri + "/hypergradient/c/0/0"
    data = files.read_bytes(target)
    for bit in range(0, 8 * len(data), 5):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        Path(target).write_bytes(flipped)
        with pytest.raises(CorruptStore):
            store.read(0, 4)


def test_a_column_is_checked_too(place: str) -> None:
    store, _ = filled(place)
    files.write_bytes(join(store.uri, "train_index/c/0"), b"x" * 60)
    with pytest.raises(CorruptStore, match="train_index"):
        store.column("train_index")


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("zarr.json", b"{", b""),
        ("hypergradient/zarr.json", b'"float32"', b'"float99"'),
        ("hypergradient/zarr.json", b'"blosc"', b'"bl0sc"'),
        ("hypergradient/zarr.json", b'"regular"', b'"rectangular"'),
    ],
)
def test_damaged_metadata(place: str, path: str, old: bytes, new: bytes) -> None:
    store, _ = filled(place)
    text = files.read_bytes(join(store.uri, path))
    files.write_bytes(join(store.uri, path), text.replace(old, new, 1))
    with pytest.raises(CorruptStore, match="damaged"):
        RowStore.open(store.uri, "hypergradient")


def test_codecs_come_from_an_allow_list(tmp_path: Path) -> None:
    store, _ = filled(str(tmp_path))
    zarr.create_array(store.uri, name="hypergradient", shape=(N, D), dtype="float32", overwrite=True)
    with pytest.raises(CorruptStore, match="codecs"):
        RowStore.open(store.uri, "hypergradient")


def test_very_wide_rows_are_split(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_WIDE_ROW_BYTES", 12)  # 3 values
    store, block = filled(place)
    assert store.array.chunks == (CHUNK, 3)
    assert store.files(0, 1) == [f"hypergradient/c/0/{k}" for k in range(3)]
    np.testing.assert_array_equal(store.read(1, 10), block[1:10])
    np.testing.assert_array_equal(store.array[...], block)


def test_one_value(place: str) -> None:
    columns = {"train_index": np.array([5], np.int32)}
    store = a_store(place, rows=1, columns=1, chunk_rows=1, row_columns=columns)
    store.write(0, np.array([[2.5]], np.float32))
    assert store.read(0, 1).tolist() == [[2.5]]
    assert store.column("train_index").tolist() == [5]
    with pytest.raises(StoreError, match="column train_index holds other values"):
        a_store(place, rows=1, columns=1, chunk_rows=1, row_columns={"train_index": np.array([6], np.int32)})


@pytest.fixture
def array(tmp_path: Path) -> StoredArray:
    """Made while there is space."""
    return StoredArray.create(
        str(tmp_path), "x", shape=(8, 4), dtype="float32", chunk=(2, 4), dimensions=("row", "column")
    )


def test_a_full_disk(tmp_path: Path, array: StoredArray, full_writes: None) -> None:
    before = files.list_files(str(tmp_path))
    with pytest.raises(StorageFull, match=r"x/c/\d/0"):
        array.write(0, np.zeros((8, 4), np.float32))
    assert files.list_files(str(tmp_path)) == before


def test_a_really_full_disk(small_disk: Path) -> None:
    """What fitted stays whole, the rest is absent; after space is made the same write succeeds."""
    run = str(small_disk / "run")
    noise = np.random.default_rng(0).standard_normal((64, 8192)).astype(np.float32)  # 2 MiB
    arguments: dict[str, Any] = {"rows": 64, "columns": 8192, "chunk_rows": 4, "row_columns": {}}
    store = a_store(run, **arguments)
    with pytest.raises(StorageFull, match="MB free"):
        store.write(0, noise)
    written = [name for name in files.list_files(store.uri) if "/c/" in name]
    assert written
    assert not any(files.PARTIAL in name for name in written)
    for name in written:
        first = 4 * int(name.split("/")[2])
        np.testing.assert_array_equal(store.read(first, first + 4), noise[first : first + 4])
    with pytest.raises(IncompleteStage):
        store.read(0, 64)
    (small_disk / "filler").write_bytes(
        bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize)
    )
    with pytest.raises(StorageFull):
        a_store(str(small_disk / "other"), **arguments)


def test_a_killed_writer_leaves_whole_chunks_and_litter(tmp_path: Path) -> None:
    a_store(str(tmp_path), rows=400, row_columns={})
    code = (
        "import os, signal, itertools\n"
        "import numpy as np\n"
        "from hydra_pipe.storage import files\n"
        "from hydra_pipe.storage.rows import RowStore\n"
        "count, real = itertools.count(), os.write\n"
        "def write(fd, data):\n"
        "    done = real(fd, data)\n"
        "    if next(count) == 41: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return done\n"
        "files.os.write = write\n"
        f"store = RowStore.open({str(tmp_path / 'method=hydra.zarr')!r}, 'hypergradient')\n"
        "store.write(0, np.ones((400, 7), np.float32))\n"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": path})
    run = RunDirectory(str(tmp_path))
    assert run.litter()
    store = RowStore.open(str(tmp_path / "method=hydra.zarr"), "hypergradient")
    chunks = [n for n in files.list_files(store.uri) if "/c/" in n and files.PARTIAL not in n]
    assert 0 < len(chunks) < 100
    for name in chunks:
        first = 4 * int(name.split("/")[2])
        assert (store.read(first, first + 4) == 1).all()
    run.clear_litter()
    store.write(0, np.ones((400, 7), np.float32))
    assert (store.read(0, 400) == 1).all()


def test_the_first_error_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_cores", lambda: 4)
    seen = []

    def work(item: int) -> None:
        seen.append(item)
        raise StoreError(str(item))

    with pytest.raises(StoreError):
        arrays.run_all(work, range(10_000), "/x")
    assert len(seen) < 10_000
