"""Reduce: the rate of the join, reading from stores, against a bare matrix product of data in memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra_pipe.pipeline.plan.plan import reduce_tiles
from hydra_pipe.pipeline.units.reduce import ReduceJob, bounds, reduce_rows
from hydra_pipe.storage import layout
from hydra_pipe.storage.files import list_files
from hydra_pipe.storage.rows import RowStore, chunk_rows_for
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.workers.determinism import prepare_process
from hydra_pipe.workers.replay.join import Panels, contributions

from .report import Result
from .timing import ratio, take_turns

SIZES: Mapping[str, Any] = {
    "shapes": ((6400, 1000, 5_050), (6400, 1000, 61_706)),
    "threads": 2,
    "rounds": 3,
    "memory": 1 << 30,
}
QUICK: Mapping[str, Any] = {**SIZES, "shapes": ((1600, 360, 5_050),), "rounds": 2}
ZEROS = 0.47
"""Share of exact zeros in hypergradients of LeNet-5, which decides how far rows compress."""


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Time each shape."""
    result = Result(name="reduce", sizes=sizes)
    prepare_process(sizes["threads"])
    for tracked, tests, dimension in sizes["shapes"]:
        _shape(result, tracked, tests, dimension, sizes, folder)
    return result


def _shape(
    result: Result, tracked: int, tests: int, dimension: int, sizes: Mapping[str, Any], folder: Path
) -> None:
    run_uri = folder / f"reduce-{dimension}"
    run_directory = RunDirectory(str(run_uri))
    draw = np.random.default_rng(0)
    left, left_rows = _store(
        run_uri / "hypergradients" / "method=hydra.zarr", "hypergradient", tracked, dimension, draw
    )
    right, right_rows = _store(run_uri / "test_gradients.zarr", "gradient", tests, dimension, draw)
    for stage, unit, store in (
        ("hydra/replay", "shard-00000", layout.hypergradients("hydra")),
        ("test-gradients", "block-00000", layout.TEST_GRADIENTS),
    ):
        names = [f"{store}/{name}" for name in list_files(run_directory.path(store))]
        run_directory.commit(stage, unit, names, {})
    tiles = reduce_tiles(tracked, tests, dimension * 4, sizes["memory"])
    unknown = np.zeros(tracked, dtype=np.int64)
    job = ReduceJob(
        method="hydra",
        base="hydra",
        mode="forward",
        tiles=tiles,
        n_train=tracked,
        tracked=np.arange(tracked),
        train_labels=unknown,
        visits=unknown,
        shard_of=unknown,
    )
    out = np.empty((tracked, tests), np.float32)
    product = torch.empty(tracked, tests)
    device = torch.device("cpu")

    def join() -> None:
        panels = Panels(right.read, bounds(tests, tiles.panel_rows), dimension, right.dtype, device)
        strips = Panels(left.read, bounds(tracked, tiles.strip_rows), dimension, left.dtype, device)
        for first, last, strip in strips:
            contributions(strip, panels, tracked, out[first:last])

    def with_parquet() -> None:
        for start, stop in bounds(tracked, tiles.unit_rows):
            reduce_rows(run_directory, job, f"rows-{start:05d}", start, stop, device, lambda _a, _b: None)

    a, b = torch.from_numpy(left_rows), torch.from_numpy(right_rows)
    taken = take_turns(
        {
            "product": lambda: torch.mm(a, b.T, out=product),
            "join": join,
            "parquet": with_parquet,
            "reading": lambda: _read(left, tiles.strip_rows),
        },
        rounds=sizes["rounds"],
    )
    shutil.rmtree(run_uri)
    operations = 2.0 * tracked * tests * dimension
    name = f"n = {tracked:,}, M = {tests:,}, D = {dimension:,}"
    rates = {key: [operations / s / 1e9 for s in taken[key]] for key in ("product", "join", "parquet")}
    result.add(f"{name}: matrix product in memory", rates["product"], "GFLOP/s")
    result.add(f"{name}: join from stores", rates["join"], "GFLOP/s")
    result.add(f"{name}: join from stores, with Parquet", rates["parquet"], "GFLOP/s")
    share = [100 * v for v in ratio(rates["join"], rates["product"])]
    result.add(f"{name}: join / matrix product", share, "%", at_least=60)
    share = [100 * v for v in ratio(rates["parquet"], rates["product"])]
    result.add(f"{name}: with Parquet / matrix product", share, "%")
    reading = [100 * v for v in ratio(taken["reading"], taken["join"])]
    result.add(f"{name}: reading hypergradients alone / join", reading, "%", note="done while products run")


def _read(store: RowStore, rows: int) -> None:
    buffer = np.empty((rows, store.columns), np.float32)
    for start, stop in bounds(store.rows, rows):
        store.read(start, stop, buffer[: stop - start])


def _store(
    uri: Path, name: str, rows: int, columns: int, draw: np.random.Generator
) -> tuple[RowStore, np.ndarray]:
    values = draw.standard_normal((rows, columns), dtype=np.float32)
    for row in values:  # row by row: a mask of the whole would be as large again
        row[draw.random(columns, dtype=np.float32) < ZEROS] = 0
    index = np.arange(rows, dtype=np.int32)
    columns_of = (
        {"train_index": index} if name == "hypergradient" else {"test_index": index, "label": index % 10}
    )
    store = RowStore.create(
        str(uri),
        name=name,
        rows=rows,
        columns=columns,
        dtype="float32",
        chunk_rows=chunk_rows_for(columns, 4, rows),
        dimensions=("row", "parameter"),
        row_columns=columns_of,
        attrs={},
    )
    store.write(0, values)
    return store, values
