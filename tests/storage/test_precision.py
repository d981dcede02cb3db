"""Rows of 16 bits: how far they are rounded, what other readers see, what does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from hydra_pipe.storage import precision
from hydra_pipe.storage.errors import CorruptStore, IncompleteStage, StoreError
from hydra_pipe.storage.files import list_files
from hydra_pipe.storage.rows import RowStore

ROWS, COLUMNS = 24, 300


def values() -> np.ndarray:
    draw = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
    found = (draw * np.logspace(-36, 36, ROWS)[:, None]).astype(np.float32)
    found[3] = 0
    return found


def store(folder, kept: str | None, dtype: str = "float32", **more) -> RowStore:
    return RowStore.create(
        f"{folder}/rows.zarr",
        name="hypergradient",
        rows=ROWS,
        columns=COLUMNS,
        dtype=dtype,
        chunk_rows=8,
        dimensions=("train_index", "parameter"),
        row_columns={"train_index": np.arange(ROWS)},
        attrs={},
        precision=kept,
        **more,
    )


@pytest.mark.parametrize("kept", precision.PRECISIONS)
def test_rows_come_back_within_the_unit_of_their_type(tmp_path, kept):
    given, made = values(), store(tmp_path, kept)
    made.write(0, given[:8])
    made.write(8, given[8:])
    assert (made.dtype, made.precision) == ("float32", kept)
    found = RowStore.open(made.uri, "hypergradient").read(0, ROWS)
    assert found.dtype == np.float32
    floor = np.abs(given).max(1, keepdims=True) * 2.0**-38 + np.finfo(np.float32).tiny * 2.0**-8
    assert (np.abs(found - given) <= precision.UNIT[kept] * np.abs(given) + floor).all()
    np.testing.assert_array_equal(found, made.as_kept(given))
    out = np.empty((5, COLUMNS), np.float32)
    np.testing.assert_array_equal(made.read(6, 11, out), found[6:11])


def test_other_readers_of_zarr_open_bfloat16_as_float32(tmp_path):
    made = store(tmp_path, "bfloat16")
    made.write(0, values())
    array = zarr.open_array(made.uri, path="hypergradient", mode="r")
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array[:], made.read(0, ROWS))
    assert not (made.read(0, ROWS).view(np.uint32) & 0xFFFF).any()


def test_other_readers_of_zarr_open_float16_with_a_scale_a_row(tmp_path):
    made = store(tmp_path, "float16")
    made.write(0, values())
    group = zarr.open_group(made.uri, mode="r")
    assert group["hypergradient"].dtype == np.float16
    scale = group["scale"][:]
    assert (np.frexp(scale)[0] == 0.5).all()
    np.testing.assert_array_equal(
        group["hypergradient"][:].astype(np.float32) * scale[:, None], made.read(0, ROWS)
    )
    assert any(name.startswith("scale/c/") for name in made.files(0, 8))


def test_files_are_half_as_large(tmp_path):
    sizes = {}
    noise = np.random.default_rng(1).standard_normal((ROWS, 300)).astype(np.float32)
    for kept in (None, *precision.PRECISIONS):
        made = store(tmp_path / str(kept), kept)
        made.write(0, noise)
        files = [tmp_path / str(kept) / "rows.zarr" / name for name in list_files(made.uri)]
        sizes[kept] = sum(file.stat().st_size for file in files if "hypergradient/c" in str(file))
    for kept in precision.PRECISIONS:
        assert sizes[kept] <= precision.NUMBER_BYTES[kept] * noise.size + 3 * 512
        assert sizes[kept] < 0.6 * sizes[None]


def test_bfloat16_is_rounded_to_the_nearest_even():
    unit = np.float32(2.0**-7)
    given = np.array([1 + unit / 2, 1 + 3 * unit / 2, 1 + 0.51 * unit, -1 - 0.49 * unit], np.float32)
    np.testing.assert_array_equal(precision.to_bfloat16(given), [1, 1 + 2 * unit, 1 + unit, -1])


@pytest.mark.parametrize("kept", precision.PRECISIONS)
def test_what_would_become_infinite_is_refused(tmp_path, kept):
    most = np.float32(precision.LARGEST)
    given = np.full((ROWS, COLUMNS), most, np.float32)
    made = store(tmp_path, kept)
    made.write(0, given)
    np.testing.assert_allclose(made.read(0, ROWS), given, rtol=2.0**-10)
    given[17, 3] = -np.finfo(np.float32).max
    with pytest.raises(
        StoreError,
        match=r"hold 3\.4028e\+38, rounded .* at most 3\.3895e\+38 can be kept; keep them as float32",
    ):
        made.write(0, given)


def test_a_lost_scale_is_said(tmp_path):
    made = store(tmp_path, "float16")
    made.write(0, values())
    (tmp_path / "rows.zarr" / "scale" / "c" / "1").unlink()
    with pytest.raises(IncompleteStage, match="scale"):
        made.read(0, ROWS)


def test_stores_of_other_precision_are_not_mixed_up(tmp_path):
    made = store(tmp_path, "bfloat16")
    with pytest.raises(StoreError, match="precision is bfloat16, not None"):
        store(tmp_path, None)
    with pytest.raises(StoreError, match="the block is float64, rows are float32; convert it"):
        made.write(0, values().astype(np.float64))
    with pytest.raises(StoreError, match="'bfloat16' of float64 is not supported"):
        store(tmp_path / "other", "bfloat16", dtype="float64")
    group = tmp_path / "rows.zarr" / "zarr.json"
    metadata = json.loads(group.read_text())
    metadata["attributes"]["hydra_pipe_rows"]["precision"] = "float8"
    group.write_text(json.dumps(metadata))
    with pytest.raises(CorruptStore, match="is float32 and said to hold 'float8'"):
        RowStore.open(made.uri, "hypergradient")
