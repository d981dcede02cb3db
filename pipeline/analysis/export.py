"""Write the contributions of a run as one CSV or Parquet file, with bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ...storage.errors import CorruptStore, InputError, StoreError
from ...storage.files import staged
from ...storage.place import run_around

if TYPE_CHECKING:
    from ..reading.reader import Reader

BATCH_ROWS = 131_072
"""Rows held at a time, and rows of a Parquet row group."""


class _Writer(Protocol):
    def write_batch(self, batch: pa.RecordBatch) -> None: ...
    def close(self) -> None: ...


def export(
    run: Reader,
    target: str | os.PathLike[str],
    *,
    method: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write all contributions of a method to one local file, sorted as in the run.

    The file appears under its name once it is complete: a sibling is written, flushed to disk and
    renamed.

    Args:
        run: The run to read.
        target: Path of the file; ``.csv`` or ``.parquet`` says what is written.
        method: The estimator; the run's default when None.
        overwrite: Replace a file that is there.
        progress: Called with the number of rows written so far.

    Returns:
        ``path``, ``format``, ``method``, ``rows``, ``bytes``, ``columns``.

    Raises:
        InputError: The file's kind is unknown, its directory is missing, or it exists.
        IncompleteStage: The method is not complete.
        StorageFull: The disk is full; nothing is left behind.
    """
    path, kind = check_target(target, overwrite=overwrite)
    method = run.method(method)
    dataset = run.contributions(method)
    columns = [name for name in dataset.schema.names if name != "method"]
    schema = pa.schema([dataset.schema.field(name) for name in columns])
    rows = 0
    try:
        with staged(os.path.abspath(path), sync=True) as partial:
            writer = _writer(Path(partial), kind, schema)
            try:
                # Little readahead: a slow disk must not make the queue of read batches grow.
                batches = dataset.to_batches(
                    columns=columns, batch_size=BATCH_ROWS, batch_readahead=4, fragment_readahead=1
                )
                for batch in batches:
                    writer.write_batch(batch)
                    rows += batch.num_rows
                    if progress is not None:
                        progress(rows)
            finally:
                writer.close()
            expected = expected_rows(run, method)
            if expected is not None and rows != expected:
                raise CorruptStore(
                    f"{run.uri}: {rows:,} contributions of method {method}, run.json says {expected:,}; "
                    f"see `hydra-pipe verify {run.uri}`"
                )
            size = os.path.getsize(partial)
            if path.exists() and not overwrite:
                raise InputError(f"{path} appeared while it was being written; replace it with --overwrite")
    except StoreError as error:
        # The guard speaks of a run's --out; here it is --to that can be changed.
        raise type(error)(str(error).replace("with --out", "with --to")) from error
    return {
        "path": str(path),
        "format": kind,
        "method": method,
        "rows": rows,
        "bytes": size,
        "columns": columns,
    }


def check_target(target: str | os.PathLike[str], *, overwrite: bool) -> tuple[Path, str]:
    """Return the path of a file to be written and its kind, ``csv`` or ``parquet``.

    Raises:
        InputError: The file's kind is unknown, its directory is missing, it lies inside a run, or it exists.
    """
    path = Path(os.path.expanduser(target))
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("csv", "parquet"):
        raise InputError(f"cannot export to {path}: the file name must end in .csv or .parquet")
    if "://" in os.fspath(target):
        raise InputError(
            f"cannot export to {target}: export writes to a local path; copy the file from there"
        )
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"directory {path.parent} does not exist"
        raise InputError(f"cannot export to {path}: {what}; name a file in a directory that exists")
    if (inside := run_around(path)) is not None:
        raise InputError(
            f"cannot export to {path}: it lies inside the run {inside}, which holds its own files alone; "
            "name a file outside of it"
        )
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or replace it with --overwrite")
    return path, kind


def write_rows(tables: Sequence[pa.Table], target: str | os.PathLike[str], *, overwrite: bool) -> str:
    """Write tables of one schema below each other as one local file, whole or not at all; return its path.

    Raises:
        InputError: See `check_target`.
        StorageFull: The disk is full; nothing is left behind.
    """
    path, kind = check_target(target, overwrite=overwrite)
    with staged(os.path.abspath(path), sync=True) as partial:
        writer = _writer(Path(partial), kind, tables[0].schema)
        try:
            for table in tables:
                for batch in table.to_batches():
                    writer.write_batch(batch)
        finally:
            writer.close()
    return str(path)


def _writer(path: Path, kind: str, schema: pa.Schema) -> _Writer:
    if kind == "csv":
        writer: _Writer = pa_csv.CSVWriter(path, schema)
        return writer
    dictionaries = [field.name for field in schema if pa.types.is_integer(field.type)]
    parquet: _Writer = pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=dictionaries
    )
    return parquet


def expected_rows(run: Reader, method: str) -> int | None:
    """Return how many contributions a complete method of the run has; None where it does not say."""
    tracked, targets = run.info.get("n_tracked"), run.noted.target_count(method)
    return tracked * targets if isinstance(tracked, int) and targets is not None else None
