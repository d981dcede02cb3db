"""Contributions and what is summed from them, as Parquet that DuckDB, Polars, pandas and Spark read.

``<kind>/method=<method>/part-*.parquet``; what counts is what manifests list. A killed writer's leftovers lie outside these
directories, at the top of the run, because a scan of a directory would stumble over them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.fs
import pyarrow.parquet as pq

from . import files, layout
from .errors import CorruptStore, IncompleteStage, StoreError
from .refused import full_disk_guard
from .rundir import RunDirectory
from .schemas import CONTRIBUTIONS, SCHEMAS, Kind
from .uri import check_uri, is_local, parent

GROUP_ROWS = 1 << 17
"""Rows a row group: what a reader must read for one test sample."""
_PANEL_BYTES = 16 << 20


def write_tile(
    uri: str,
    *,
    train_index: npt.ArrayLike,
    test_index: npt.ArrayLike,
    train_label: npt.ArrayLike,
    test_label: npt.ArrayLike,
    contribution: npt.NDArray[Any],
    schema: pa.Schema = CONTRIBUTIONS,
) -> None:
    """Write the contributions of R training samples to P test samples as one Parquet file.

    Rows are sorted by (test_index, test_label, train_index); row groups hold whole test samples, about
    `GROUP_ROWS` rows, so that the statistics let a reader skip all but one. Beside the tile itself
    about 40 MB are needed at a time.

    Args:
        uri: ``…/part-….parquet``.
        train_index: (R,), no index twice.
        test_index: (P,), -1 where a column is no single test sample; no (index, label) twice.
        train_label: (R,), -1 for none.
        test_label: (P,), -1 for none.
        contribution: (R, P) float32: the last column.
        schema: `CONTRIBUTIONS` or `CONTRIBUTIONS_SPREAD`.

    Raises:
        StoreError: Shapes disagree, an index is there twice, or a value does not fit its column.
        StorageFull: The disk is full; nothing is left under the final name.
    """
    uri = check_uri(uri)
    ids = {
        "train_index": _integers(uri, train_index, "train_index"),
        "test_index": _integers(uri, test_index, "test_index"),
        "train_label": _integers(uri, train_label, "train_label"),
        "test_label": _integers(uri, test_label, "test_label"),
    }
    rows, columns = len(ids["train_index"]), len(ids["test_index"])
    if contribution.shape != (rows, columns) or not rows or not columns:
        raise StoreError(
            f"{uri}: contributions of shape {contribution.shape} for {rows} x {columns} samples; both at least 1"
        )
    if contribution.dtype != np.float32:
        raise StoreError(f"{uri}: contributions are {contribution.dtype}, must be float32; convert them")
    if len(ids["train_label"]) != rows or len(ids["test_label"]) != columns:
        raise StoreError(
            f"{uri}: {len(ids['train_label'])} and {len(ids['test_label'])} labels for {rows} x {columns} samples"
        )
    order = {
        "train": _order(uri, "train_index", ids["train_index"]),
        "test": _order(uri, "test_index", ids["test_index"], ids["test_label"]),
    }
    train = [
        ids[name] if order["train"] is None else ids[name][order["train"]]
        for name in ("train_index", "train_label")
    ]
    with _parquet_writer(uri, schema) as writer:
        for tests, rows_slice, values in _groups(contribution, order["train"], order["test"]):
            count = len(tests)
            arrays = [
                np.tile(train[0][rows_slice], count),
                np.repeat(ids["test_index"][tests], values.shape[1]),
                np.tile(train[1][rows_slice], count),
                np.repeat(ids["test_label"][tests], values.shape[1]),
                values.reshape(-1),
            ]
            batch = pa.RecordBatch.from_arrays([pa.array(a) for a in arrays], schema=schema)
            writer.write_batch(batch, row_group_size=batch.num_rows)


def write_table(uri: str, table: pa.Table, schema: pa.Schema) -> None:
    """Write a table as one Parquet file, with the care of `write_tile`.

    Args:
        uri: ``…/part-….parquet``.
        table: Has the columns of ``schema``, in any order.
        schema: One of `SCHEMAS`.

    Raises:
        StoreError: A column is missing, holds nulls, or does not fit its type.
        StorageFull: The disk is full; nothing is left under the final name.
    """
    uri = check_uri(uri)
    try:
        fitting = table.select(schema.names).cast(schema)
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"{uri}: the table does not fit columns {', '.join(schema.names)}: {error}"
        ) from error
    for field in schema:
        if not field.nullable and fitting[field.name].null_count:
            raise StoreError(
                f"{uri}: column {field.name} holds {fitting[field.name].null_count} nulls; it must hold none"
            )
    with _parquet_writer(uri, schema) as writer:
        writer.write_table(fitting, row_group_size=GROUP_ROWS)


def dataset(run: RunDirectory, kind: Kind, method: str) -> pa_dataset.Dataset:
    """Return the rows of a method's table as a dataset with the partition column ``method``.

    It consists of the files that manifests list, each compared with what its manifest says; whoever
    reads it has the checksum of each page compared, too.

    Args:
        run: The run directory.
        kind: Which table.
        method: Whose.

    Raises:
        IncompleteStage: There are none.
        CorruptStore: A file is not what its manifest says.
    """
    top, folder = run.path(kind), layout.table(kind, method)
    schema = SCHEMAS[kind]
    entries = run.ledger.listed(folder)
    if not entries:
        raise IncompleteStage(
            f"{run.path(folder)} holds no results yet; run `hydra-pipe reduce` with the run's options"
        )
    run.ledger.trust(entries)
    filesystem: Any = None
    base = top
    if not is_local(top):
        fs, base = files.filesystem(top)
        filesystem = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs))
    return pa_dataset.dataset(
        [f"{base}/{entry.path.removeprefix(f'{kind}/')}" for entry in entries],
        schema=schema.append(pa.field("method", pa.string())),
        format=pa_dataset.ParquetFileFormat(
            default_fragment_scan_options=pa_dataset.ParquetFragmentScanOptions(
                page_checksum_verification=True
            )
        ),
        filesystem=filesystem,
        partitioning=pa_dataset.partitioning(pa.schema([("method", pa.string())]), flavor="hive"),
        partition_base_dir=base,
    )


@contextlib.contextmanager
def legible(uri: str) -> Iterator[None]:
    """Read tables of a run within; what pyarrow cannot read is named.

    Raises:
        CorruptStore: A file is damaged or not to be had.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise CorruptStore(
            f"a table of {uri} cannot be read ({why}); `hydra-pipe verify {uri}` names what is damaged"
        ) from error


def _groups(
    contribution: npt.NDArray[Any], train_order: Any, test_order: Any
) -> Iterator[tuple[npt.NDArray[Any], slice, npt.NDArray[Any]]]:
    """Give (positions of test samples, slice of training rows, their (tests, rows) values) in file order.

    The tile is turned a panel of test samples at a time: turning it whole would double the memory,
    turning it column by column would read every cache line many times.
    """
    rows, columns = contribution.shape
    tests = np.arange(columns) if test_order is None else test_order
    per_group = max(1, GROUP_ROWS // rows)
    # A whole number of groups to a panel, so that only the file's last group is short.
    panel = max(1, _PANEL_BYTES // (4 * rows * per_group)) * per_group
    pieces = -(-rows // GROUP_ROWS) if rows > GROUP_ROWS else 1
    step = -(-rows // pieces)
    for first in range(0, columns, panel):
        chosen = tests[first : first + panel]
        part = contribution[:, first : first + panel] if test_order is None else contribution[:, chosen]
        turned = np.ascontiguousarray(part.T)
        if train_order is not None:
            turned = turned[:, train_order]
        for low in range(0, len(chosen), per_group):
            for begin in range(0, rows, step):
                span = slice(begin, min(rows, begin + step))
                yield chosen[low : low + per_group], span, turned[low : low + per_group, span]


@contextlib.contextmanager
def _parquet_writer(uri: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    with _place_for(uri) as path:
        writer = pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[field.name for field in schema if pa.types.is_integer(field.type)],
            sorting_columns=_sorting(schema),
            write_page_checksum=True,
        )
        with writer:
            yield writer


@contextlib.contextmanager
def _place_for(uri: str) -> Iterator[str]:
    """Give a local path to write a file at, that becomes ``uri`` on success."""
    if is_local(uri):
        with files.staged(uri, near=_outside_of_dataset(uri)) as path:
            yield path
        return
    # Uploaded whole: closing a half-written remote file would publish a valid-looking part of it.
    descriptor, path = tempfile.mkstemp(prefix="hydra-pipe-", suffix=files.PARTIAL)
    os.close(descriptor)
    try:
        with full_disk_guard(path):
            yield path
        with full_disk_guard(uri):
            fs, target = files.filesystem(uri)
            fs.put_file(path, target)
    finally:
        os.unlink(path)


def _outside_of_dataset(uri: str) -> str:
    folder, name = parent(uri), uri.rsplit("/", 1)[-1]
    if "=" not in folder.rsplit("/", 1)[-1]:
        return uri
    kind = parent(folder)
    return "/".join(
        [parent(kind).rstrip("/"), "-".join([kind.rsplit("/", 1)[-1], folder.rsplit("/", 1)[-1], name])]
    )


def _sorting(schema: pa.Schema) -> list[pq.SortingColumn] | None:
    if "test_index" not in schema.names:
        return None
    keys = ("test_index", "test_label", "train_index")
    return [pq.SortingColumn(schema.get_field_index(name)) for name in keys]


def _integers(uri: str, values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    kind = CONTRIBUTIONS.field(name).type.to_pandas_dtype()
    given = np.asarray(values)
    converted = given.astype(kind)
    if given.ndim != 1 or not np.array_equal(given, converted):
        limits = np.iinfo(kind)
        raise StoreError(f"{uri}: {name} must be one integer each, from {limits.min} to {limits.max}")
    return converted


def _order(
    uri: str, name: str, index: npt.NDArray[Any], label: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any] | None:
    """Return how to sort ``index``, None where it is sorted already.

    The index -1 stands for no single sample and may be there with several labels.
    """
    key = index.astype(np.int64) << 32
    if label is not None:
        key += np.where(index < 0, label.astype(np.int64), 0)
    if np.all(np.diff(key) > 0):
        return None
    order = np.argsort(key, kind="stable")
    twice = index[order][1:][np.diff(key[order]) == 0]
    if len(twice):
        raise StoreError(f"{uri}: {name} {int(twice[0])} is there twice; give each sample once")
    return order
