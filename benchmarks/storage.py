"""Storage: how fast rows go to disk and come back, and how fast contributions become Parquet."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hydra_pipe.storage.contributions import write_tile
from hydra_pipe.storage.rows import RowStore, chunk_rows_for

from .report import Result
from .timing import take_turns

SIZES: Mapping[str, Any] = {"rows": 1600, "columns": 61_706, "tile": (6400, 1000), "rounds": 5}
QUICK: Mapping[str, Any] = {"rows": 320, "columns": 61_706, "tile": (1600, 360), "rounds": 2}
ZEROS = 0.47


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Time writing and reading rows, and writing a tile; files stay in the system's cache."""
    result = Result(name="storage", sizes=sizes)
    rows, columns = sizes["rows"], sizes["columns"]
    draw = np.random.default_rng(0)
    values = draw.standard_normal((rows, columns), dtype=np.float32)
    values[draw.random((rows, columns), dtype=np.float32) < ZEROS] = 0
    store = RowStore.create(
        str(folder / "rows.zarr"),
        name="hypergradient",
        rows=rows,
        columns=columns,
        dtype="float32",
        chunk_rows=chunk_rows_for(columns, 4, rows),
        dimensions=("train_index", "parameter"),
        row_columns={"train_index": np.arange(rows, dtype=np.int32)},
        attrs={},
    )
    buffer = np.empty_like(values)
    shape = sizes["tile"]
    tile = draw.standard_normal(shape, dtype=np.float32)

    def by_chunk() -> None:
        for start in range(0, rows, store.chunk_rows):
            store.write(start, values[start : start + store.chunk_rows])

    taken = take_turns(
        {
            "write all": lambda: store.write(0, values),
            "write chunks": by_chunk,
            "read": lambda: store.read(0, rows),
            "read into": lambda: store.read(0, rows, buffer),
            "tile": lambda: write_tile(
                str(folder / "contributions" / "part-0.parquet"),
                train_index=np.arange(shape[0]),
                test_index=np.arange(shape[1]),
                train_label=np.arange(shape[0]) % 10,
                test_label=np.arange(shape[1]) % 10,
                contribution=tile,
            ),
        },
        rounds=sizes["rounds"],
    )
    stored = sum(f.stat().st_size for f in (folder / "rows.zarr").rglob("*") if f.is_file())
    parquet = (folder / "contributions" / "part-0.parquet").stat().st_size
    shutil.rmtree(folder / "rows.zarr")
    note = f"{values.nbytes / stored:.2f} times smaller on disk"
    for what, key in (
        ("rows: writing, many chunks at once", "write all"),
        ("rows: writing, one chunk after the other", "write chunks"),
        ("rows: reading into fresh memory", "read"),
        ("rows: reading into a buffer used before", "read into"),
    ):
        result.add(
            what, [values.nbytes / s / 1e9 for s in taken[key]], "GB/s", note=note if "many" in what else ""
        )
    rate = [tile.size / s / 1e6 for s in taken["tile"]]
    result.add(
        "contributions: writing Parquet", rate, "million/s", note=f"{parquet / tile.size:.2f} bytes each"
    )
    return result
