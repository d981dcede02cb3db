"""Contributions as Parquet: right rows, cheap look-ups, readable by everyone, complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq
import pytest
from hydra_pipe.storage import contributions, files, layout
from hydra_pipe.storage.contributions import GROUP_ROWS, dataset, write_table, write_tile
from hydra_pipe.storage.errors import IncompleteStage, StorageFull, StoreError
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.storage.schemas import CONTRIBUTIONS, INTERCLASS, SAMPLES, Kind
from hydra_pipe.storage.uri import is_local, join


def a_tile(rows: int, columns: int, seed: int = 0, first: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "train_index": first + 2 * np.arange(rows),
        "test_index": 5 + np.arange(columns, dtype=np.int32),
        "train_label": rng.integers(-1, 10, rows),
        "test_label": rng.integers(-1, 10, columns).astype(np.int16),
        "contribution": rng.standard_normal((rows, columns)).astype(np.float32),
    }


def part(place: str, name: str = "part-0.parquet", method: str = "hydra") -> str:
    return join(place, "contributions", f"method={method}", name)


def expected(tile: dict[str, Any]) -> pd.DataFrame:
    rows, columns = tile["contribution"].shape
    frame = pd.DataFrame(
        {
            "train_index": np.repeat(tile["train_index"], columns).astype(np.int32),
            "test_index": np.tile(tile["test_index"], rows).astype(np.int32),
            "train_label": np.repeat(tile["train_label"], columns).astype(np.int16),
            "test_label": np.tile(tile["test_label"], rows).astype(np.int16),
            "contribution": tile["contribution"].reshape(-1),
        }
    )
    return frame.sort_values(["test_index", "train_index"], ignore_index=True)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (400, 700), (70_000, 3), (300_000, 2)])
def test_rows_in_order(tmp_path: Path, shape: tuple[int, int]) -> None:
    tile = a_tile(*shape)
    write_tile(part(str(tmp_path)), **tile)
    file = pq.ParquetFile(part(str(tmp_path)))
    assert file.schema_arrow == CONTRIBUTIONS
    pd.testing.assert_frame_equal(file.read().to_pandas(), expected(tile))
    assert max(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)) <= GROUP_ROWS


def test_samples_given_in_any_order_are_sorted(tmp_path: Path) -> None:
    tile = a_tile(50, 30)
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(50), rng.permutation(30)
    shuffled = {
        "train_index": tile["train_index"][rows],
        "train_label": tile["train_label"][rows],
        "test_index": tile["test_index"][columns],
        "test_label": tile["test_label"][columns],
        "contribution": np.asfortranarray(tile["contribution"][rows][:, columns]),
    }
    write_tile(part(str(tmp_path)), **shuffled)
    pd.testing.assert_frame_equal(
        pq.read_table(part(str(tmp_path))).to_pandas()[CONTRIBUTIONS.names], expected(tile)
    )


def test_panels_do_not_change_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = a_tile(37, 101)
    monkeypatch.setattr(contributions, "GROUP_ROWS", 100)
    monkeypatch.setattr(contributions, "_PANEL_BYTES", 2000)
    write_tile(part(str(tmp_path)), **tile)
    file = pq.ParquetFile(part(str(tmp_path)))
    pd.testing.assert_frame_equal(file.read().to_pandas(), expected(tile))
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    assert sizes == [74] * 50 + [37]


def test_encodings_and_statistics(tmp_path: Path) -> None:
    """Groups of whole test samples whose test_index ranges do not overlap: readers skip the others."""
    write_tile(part(str(tmp_path)), **a_tile(2000, 300))
    metadata = pq.ParquetFile(part(str(tmp_path))).metadata
    assert metadata.num_row_groups == 5
    seen = 4
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        columns = {group.column(c).path_in_schema: group.column(c) for c in range(5)}
        for name, column in columns.items():
            assert column.compression == "ZSTD"
            assert ("RLE_DICTIONARY" in column.encodings) == (name != "contribution")
            assert column.statistics.null_count == 0
        assert columns["test_index"].statistics.min == seen + 1
        seen = columns["test_index"].statistics.max
    assert seen == 304


def test_a_look_up_reads_one_row_group(tmp_path: Path) -> None:
    """With all other groups overwritten, the ten best of one test sample are still found by everyone."""
    tile, target = a_tile(2000, 300), part(str(tmp_path))
    write_tile(target, **tile)
    best = tile["train_index"][np.argsort(-tile["contribution"][:, 95])[:10]].tolist()
    metadata = pq.ParquetFile(target).metadata
    with open(target, "r+b") as file:
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            if not group.column(1).statistics.min <= 100 <= group.column(1).statistics.max:
                for column in (group.column(c) for c in range(5)):
                    file.seek(min(filter(None, (column.dictionary_page_offset, column.data_page_offset))))
                    file.write(b"\xff" * column.total_compressed_size)
    query = f"SELECT train_index FROM '{target}' WHERE test_index = 100 ORDER BY contribution DESC LIMIT 10"
    assert [row[0] for row in duckdb.sql(query).fetchall()] == best
    lazy = pl.scan_parquet(target).filter(pl.col("test_index") == 100)
    assert lazy.top_k(10, by="contribution").collect()["train_index"].to_list() == best
    rows = committed(str(tmp_path), "contributions", "hydra").to_table(
        filter=pa_dataset.field("test_index") == 100
    )
    assert rows.sort_by([("contribution", "descending")])["train_index"].to_pylist()[:10] == best
    with pytest.raises(duckdb.Error):
        duckdb.sql(query.replace("100", "5")).fetchall()


def committed(place: str, kind: Kind, method: str) -> pa_dataset.Dataset:
    """Commit what lies in a method's table as one unit, and open it."""
    run, folder = RunDirectory(place), layout.table(kind, method)
    names = [f"{folder}/{name}" for name in files.list_files(run.path(folder))]
    run.commit(f"{method}/reduce", f"{kind}-0", names, {})
    return dataset(run, kind, method)


def two_methods(place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    one, two = a_tile(30, 8), a_tile(20, 8, seed=1, first=60)
    write_tile(part(place, "part-0.parquet"), **one)
    write_tile(part(place, "part-1.parquet"), **two)
    write_tile(part(place, "part-0.parquet", "tracin"), **two)
    return one, two


def test_the_dataset(place: str) -> None:
    one, two = two_methods(place)
    found = committed(place, "contributions", "hydra")
    assert found.schema.names == [*CONTRIBUTIONS.names, "method"]
    assert committed(place, "contributions", "tracin").count_rows() == 160
    hydra = found.to_table().to_pandas()
    assert set(hydra["method"]) == {"hydra"}
    whole = pd.concat([expected(one), expected(two)]).sort_values(
        ["test_index", "train_index"], ignore_index=True
    )
    found = hydra.sort_values(["test_index", "train_index"], ignore_index=True)[CONTRIBUTIONS.names]
    pd.testing.assert_frame_equal(found, whole)
    with pytest.raises(IncompleteStage, match="hydra-pipe reduce"):
        dataset(RunDirectory(place), "contributions", "influence-cg")
    with pytest.raises(IncompleteStage, match="hydra-pipe reduce"):
        dataset(RunDirectory(place), "samples", "hydra")


def test_everyone_reads_the_directory(tmp_path: Path) -> None:
    """Also while a killed writer's leftovers are about: they lie outside the dataset."""
    one, two = two_methods(str(tmp_path))
    folder = tmp_path / "contributions"
    total = float(np.concatenate([t["contribution"].ravel() for t in (one, two, two)]).sum(dtype=float))
    glob = f"{folder}/**/*.parquet"
    counts, sums = {}, {}
    row = duckdb.sql(
        f"SELECT count(*), sum(contribution::DOUBLE) FROM read_parquet('{glob}', hive_partitioning = true)"
    )
    counts["duckdb"], sums["duckdb"] = row.fetchall()[0]
    lazy = pl.scan_parquet(folder, hive_partitioning=True)
    counts["polars"] = lazy.select(pl.len()).collect().item()
    sums["polars"] = lazy.select(pl.col("contribution").cast(pl.Float64).sum()).collect().item()
    frame = pd.read_parquet(folder)
    counts["pandas"], sums["pandas"] = len(frame), frame["contribution"].astype(float).sum()
    table = pa_dataset.dataset(folder, partitioning="hive").to_table()
    counts["pyarrow"] = table.num_rows
    sums["pyarrow"] = float(table["contribution"].to_numpy().sum(dtype=float))
    assert set(counts.values()) == {560}
    assert all(abs(value - total) < 1e-6 for value in sums.values())
    types = pl.scan_parquet(folder / "method=hydra").collect_schema()
    assert [types[name] for name in CONTRIBUTIONS.names] == [
        pl.Int32,
        pl.Int32,
        pl.Int16,
        pl.Int16,
        pl.Float32,
    ]
    query = f"SELECT DISTINCT method FROM read_parquet('{glob}', hive_partitioning = true) ORDER BY 1"
    assert [r[0] for r in duckdb.sql(query).fetchall()] == ["hydra", "tracin"]


def test_a_writer_that_fails_leaves_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception after some row groups: closing the file would make a valid, partial one."""
    real = contributions._groups

    def failing(*arguments: Any) -> Any:
        yield next(iter(real(*arguments)))
        raise KeyboardInterrupt

    monkeypatch.setattr(contributions, "_groups", failing)
    with pytest.raises(KeyboardInterrupt):
        write_tile(part(place), **a_tile(30, 8))
    assert files.list_files(place) == []


def test_while_writing_the_dataset_holds_only_finished_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill at this moment would leave: litter that a run finds, and that no reader of a directory sees."""
    write_tile(part(str(tmp_path)), **a_tile(30, 8))
    real, seen = contributions._groups, []

    def watched(*arguments: Any) -> Any:
        seen.append(files.list_files(str(tmp_path / "contributions")))
        seen.append(RunDirectory(tmp_path).litter())
        yield from real(*arguments)

    monkeypatch.setattr(contributions, "_groups", watched)
    write_tile(part(str(tmp_path), "part-1.parquet"), **a_tile(30, 8))
    inside, litter = seen
    assert inside == ["method=hydra/part-0.parquet"]
    assert len(litter) == 1
    assert "/" not in litter[0]
    assert RunDirectory(tmp_path).litter() == []


def test_a_full_disk(small_disk: Path) -> None:
    write_tile(part(str(small_disk)), **a_tile(10, 10))
    with pytest.raises(StorageFull, match="part-1"):
        write_tile(part(str(small_disk), "part-1.parquet"), **a_tile(1000, 1000))
    assert files.list_files(str(small_disk)) == ["contributions/method=hydra/part-0.parquet"]


def test_a_full_disk_without_mounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    monkeypatch.setattr(contributions.pq.ParquetWriter, "write_batch", full)
    with pytest.raises(StorageFull):
        write_tile(part(str(tmp_path)), **a_tile(10, 10))
    assert files.list_files(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_index": np.array([0, 2, 2])}, "train_index 2 is there twice"),
        ({"train_index": np.array([0, 2])}, "3, 4"),
        ({"test_label": np.array([0])}, "1 labels"),
        ({"train_label": np.array([0, 1, 40_000])}, "train_label .* 32767"),
        ({"train_index": np.array([0.5, 1, 2])}, "train_index"),
        ({"contribution": np.zeros((3, 4))}, "float64"),
        ({"train_index": [], "train_label": [], "contribution": np.zeros((0, 4), np.float32)}, "at least 1"),
    ],
)
def test_tiles_that_cannot_be(place: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        write_tile(part(place), **{**a_tile(3, 4), **changes})
    assert files.list_files(place) == []


def test_tables(place: str) -> None:
    samples = pa.table(
        {
            "shard": [0, 1],
            "train_index": [3, 4],
            "label": [-1, 2],
            "visits": [5, 6],
            "contribution": [0.5, -0.25],
            "contribution_std": [0.1, 0.2],
        }
    )
    write_table(join(place, "samples/method=hydra/part-0.parquet"), samples, SAMPLES)
    found = committed(place, "samples", "hydra").to_table(columns=SAMPLES.names)
    assert found.schema == SAMPLES
    assert found.to_pylist() == samples.select(SAMPLES.names).to_pylist()
    classes = pa.table(
        {
            "train_class": [0],
            "test_class": [1],
            "pairs": [2**40],
            "contribution": [0.5],
            "normalized": [np.nan],
        }
    )
    write_table(join(place, "interclass/method=hydra/part-0.parquet"), classes, INTERCLASS)
    assert committed(place, "interclass", "hydra").to_table()["pairs"].to_pylist() == [2**40]
    target = join(place, "samples/method=hydra/part-1.parquet")
    with pytest.raises(StoreError, match="does not fit"):
        write_table(target, samples.drop(["label"]), SAMPLES)
    with pytest.raises(StoreError, match="does not fit"):
        write_table(target, samples.set_column(2, "label", [[1, 2**20]]), SAMPLES)
    with pytest.raises(StoreError, match=r"label.*null|does not fit"):
        write_table(target, samples.set_column(2, "label", [[1, None]]), SAMPLES)
    assert not files.exists(target)
    if is_local(place):
        assert sorted(os.listdir(place)) == ["interclass", "manifests", "samples"]
