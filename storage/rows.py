"""Vectors by row: hypergradients and test gradients, one (n, D) array with a few columns beside it.

A column has a number a row, or several.

n rows (samples), D columns (parameters). Zarr v3, chunks of whole rows of about 16 MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from . import files, precision
from .arrays import Source, StoredArray, read_group, write_group
from .documents import plain, taken_apart
from .errors import CorruptStore, IncompleteStage, StoreError
from .precision import PRECISIONS
from .uri import check_name, check_uri, join

MARK = "hydra_pipe_rows"
_WIDE_ROW_BYTES = 64 << 20
_COLUMN_CHUNK_ROWS = 1 << 20
SCALE = "scale"
"""Column of a store of float16: what each row was divided by."""


def chunk_rows_for(
    columns: int, itemsize: int, rows: int, parts: int = 1, target_bytes: int = 16 << 20
) -> int:
    """Return how many rows a chunk should hold.

    Args:
        columns: D.
        itemsize: Bytes a value.
        rows: n.
        parts: Into how many shards the rows are cut; each gets at least 4 chunks where rows allow.
        target_bytes: A chunk's largest size.

    Returns:
        ``min(target_bytes // (columns * itemsize), ceil(rows / (4 * parts)))``, at least 1.
    """
    return max(1, min(target_bytes // max(1, columns * itemsize), math.ceil(rows / (4 * max(1, parts)))))


class RowStore:
    """An (n, D) array written in blocks of rows and read in any range.

    Metadata is created once, before any worker starts; then each worker writes its own chunks.

    Attributes:
        uri: Address of the Zarr group.
        name: Name of the array in it, such as ``hypergradient``.
        rows: n.
        columns: D.
        dtype: ``float32`` or ``float64``, of what is written and read.
        precision: What is kept of it where that is less, see `hydra_pipe.storage.precision`; None: all.
        chunk_rows: Rows a chunk.
        attrs: What the creator noted, JSON-able.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        data: StoredArray,
        described: dict[str, Any],
        source: Source = files.read_bytes,
    ) -> None:
        self.uri, self.name, self._data, self._source = uri, name, data, source
        self.rows, self.columns = data.shape
        mark = described.pop(MARK)
        self.precision: str | None = mark.get("precision")
        self.dtype = "float32" if self.precision else str(data.dtype)
        self.chunk_rows = data.chunk[0]
        # Column name -> whether its values were given in full at creation (else: written by block).
        self._given: dict[str, bool] = dict(mark["columns"])
        self.attrs, self._column_arrays = described, dict[str, StoredArray]()

    def __repr__(self) -> str:
        return f"RowStore({self.uri!r}, {self.name!r}, {self.rows} x {self.columns} {self.precision or self.dtype})"

    @classmethod
    def create(
        cls,
        uri: str,
        *,
        name: str,
        rows: int,
        columns: int,
        dtype: str,
        chunk_rows: int,
        dimensions: tuple[str, str],
        row_columns: Mapping[str, npt.NDArray[Any]],
        attrs: Mapping[str, Any],
        precision: str | None = None,
    ) -> RowStore:
        """Create a store, or open the one that is there with the same metadata.

        Args:
            uri: Address of the group; ``…/method=hydra.zarr``.
            name: Name of the (n, D) array.
            rows: n, at least 1.
            columns: D, at least 1.
            dtype: ``float32`` or ``float64``.
            chunk_rows: Rows a chunk; see `chunk_rows_for`.
            dimensions: Names of the two axes. A column of the first one's name labels the rows; a store
                that is there keeps its own, also none.
            row_columns: One value a row each, shape (n,), or several, (n, K). A column whose values are all the same is
                taken as a placeholder: it costs no file, and blocks of it, aligned like rows, can be
                filled by `write_column`. Any other column is stored at once.
            attrs: JSON-able notes.
            precision: ``bfloat16`` or ``float16``: keep fewer bits of float32; None: all.

        Raises:
            StoreError: A store with other metadata is there, or an argument is impossible.
            StorageFull: The disk is full.
        """
        uri = check_uri(uri)
        given = {key: np.asarray(value) for key, value in row_columns.items()}
        if precision == "float16":
            given[SCALE] = np.ones(rows, dtype=np.float32)
        notes = plain(attrs)
        wanted = {
            "rows": rows,
            "columns": columns,
            "dtype": dtype,
            "precision": precision,
            "chunk_rows": chunk_rows,
        }
        _check_arguments(uri, name, wanted, given, notes)
        try:
            store = cls.open(uri, name)
        except IncompleteStage:
            pass
        else:
            store._refuse_other(wanted, given, notes)
            return store
        row_bytes = columns * np.dtype(dtype).itemsize
        pieces = math.ceil(row_bytes / _WIDE_ROW_BYTES)
        chunk = (chunk_rows, math.ceil(columns / pieces))
        kept = "float16" if precision == "float16" else dtype
        StoredArray.create(uri, name, shape=(rows, columns), dtype=kept, chunk=chunk, dimensions=dimensions)
        for key, values in given.items():
            uniform = _is_uniform(values)
            array = StoredArray.create(
                uri,
                key,
                shape=values.shape,
                dtype=values.dtype,
                chunk=(chunk_rows if uniform else min(rows, _COLUMN_CHUNK_ROWS), *values.shape[1:]),
                dimensions=(dimensions[0], f"{key}_column")[: values.ndim],
                fill=values.flat[0] if uniform else None,
            )
            if not uniform:
                array.write(0, values)
        # The mark comes last: without it the store counts as not created.
        described = {key: not _is_uniform(values) for key, values in given.items()}
        mark = {"format": 1, "array": name, "columns": described}
        write_group(uri, {**notes, MARK: mark if precision is None else {**mark, "precision": precision}})
        return cls.open(uri, name)

    @classmethod
    def open(cls, uri: str, name: str, source: Source = files.read_bytes) -> RowStore:
        """Open a store.

        Args:
            uri: Address of the group.
            name: Name of the array.
            source: What reads its files: `RunDirectory.vouched` where the store is committed.

        Raises:
            IncompleteStage: It is not there, or its creation was interrupted.
            CorruptStore: Its metadata cannot be read.
        """
        described = read_group(uri := check_uri(uri), source)
        if MARK not in described:
            raise IncompleteStage(f"{uri} was not created to its end; run the stage that writes it again")
        data = StoredArray.open(uri, name, source)
        with taken_apart(f"{uri}/zarr.json"):
            return cls._described(uri, name, data, described, source)

    @classmethod
    def _described(
        cls, uri: str, name: str, data: StoredArray, described: dict[str, Any], source: Source
    ) -> RowStore:
        if len(data.shape) != 2 or not isinstance(described[MARK], dict) or "columns" not in described[MARK]:
            raise CorruptStore(
                f"{uri}: {name} is no (rows, columns) store; run the stage that writes it again"
            )
        kept = described[MARK].get("precision")
        if kept is not None and (
            kept not in PRECISIONS or data.dtype != ("float16" if kept == "float16" else "float32")
        ):
            raise CorruptStore(
                f"{uri}: {name} is {data.dtype} and said to hold {kept!r:.20}; run the stage that writes it again"
            )
        return cls(uri, name, data, described, source)

    @property
    def array(self) -> zarr.Array[Any]:
        """The (n, D) Zarr array as it is stored, read-only: of float16 without the column ``scale``.

        What was never written reads as NaN there.
        """
        return self._data.array

    def read(self, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return rows ``start`` to ``stop``, shape (stop - start, D); fastest along chunk borders.

        Args:
            start: First row.
            stop: One past the last row.
            out: Optional C-contiguous target of that shape and dtype, to save the allocation.

        Raises:
            IncompleteStage: Rows were never written.
            CorruptStore: A checksum is wrong.
            StoreError: The range is outside the store.
        """
        if self.precision != "float16":
            return self._data.read(start, stop, out)
        scale = self._column(SCALE).read(start, stop)
        return precision.from_float16(self._data.read(start, stop), scale, out)

    def write(self, start: int, block: npt.NDArray[Any]) -> None:
        """Write whole chunks of rows; ``start`` and the end are multiples of ``chunk_rows`` (or n).

        Args:
            start: First row.
            block: Shape (rows, D), of the store's dtype.

        Raises:
            StoreError: Not aligned, or of another shape or dtype; the message states both. Or a value beyond bfloat16's largest.
            StorageFull: The disk is full.
        """
        if self.precision is None:
            self._data.write(start, block)
            return
        if str(block.dtype) != self.dtype:
            raise StoreError(
                f"{self.uri}/{self.name}: the block is {block.dtype}, rows are {self.dtype}; convert it"
            )
        largest = float(np.abs(block).max(initial=0.0))
        if largest > precision.LARGEST:
            raise StoreError(
                f"{self.uri}/{self.name}: rows {start}..{start + len(block)} hold {largest:.4e}, rounded to {self.precision} at "
                f"most {precision.LARGEST:.4e} can be kept; keep them as float32"
            )
        if self.precision == "float16":
            values, scale = precision.to_float16(block)
            self._data.write(start, values)
            self._column(SCALE).write(start, scale)
        else:
            self._data.write(start, precision.to_bfloat16(block))

    def as_kept(self, block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return rows as they are read back once they are written."""
        if self.precision is None:
            return block
        if self.precision == "float16":
            return precision.from_float16(*precision.to_float16(block))
        return precision.to_bfloat16(block)

    def column_names(self) -> list[str]:
        """Return the names of the per-row columns."""
        return list(self._given)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a per-row column, shape (n,) or (n, K).

        Raises:
            StoreError: There is no such column.
            CorruptStore: A checksum is wrong.
        """
        return self._column(name).read(may_lack=not self._given[name])

    def write_column(self, name: str, values: npt.NDArray[Any], start: int = 0) -> None:
        """Fill a column from row ``start`` on, in whole chunks as `write` does.

        Args:
            name: A column that was created as a placeholder (or any, when written whole).
            values: Shape (rows,) or (rows, K); converted to the column's type where no value changes.
            start: First row.

        Raises:
            StoreError: No such column, not aligned, or values that the type cannot hold.
        """
        array = self._column(name)
        given = np.asarray(values)
        converted = given.astype(array.dtype)
        if (
            not np.array_equal(converted, given, equal_nan=given.dtype.kind == "f")
            and array.dtype.kind != "f"
        ):
            raise StoreError(
                f"{self.uri}: column {name} is {array.dtype} and cannot hold these {given.dtype} values"
            )
        array.write(start, converted)

    def files(self, start: int, stop: int) -> list[str]:
        """Return the files, relative to the store, that `write` fills with rows ``start`` to ``stop``."""
        found = self._data.chunk_files(start, stop)
        return found + self.column_files(SCALE, start, stop) if self.precision == "float16" else found

    def column_files(self, name: str, start: int, stop: int) -> list[str]:
        """Return the chunk files of a column filled by block that hold rows ``start`` to ``stop``."""
        return self._column(name).chunk_files(start, stop)

    def metadata_files(self) -> list[str]:
        """Return every other file there is: metadata, and the columns as far as they are filled."""
        found = ["zarr.json", f"{self.name}/zarr.json"]
        for name, given in self._given.items():
            found.append(f"{name}/zarr.json")
            chunks = self._column(name).chunk_files(0, self.rows)
            found += [path for path in chunks if given or files.exists(join(self.uri, path))]
        return found

    def _column(self, name: str) -> StoredArray:
        if name not in self._given:
            known = ", ".join(self._given) or "none"
            raise StoreError(f"{self.uri} has no column {name!r}; it has {known}")
        if name not in self._column_arrays:
            self._column_arrays[name] = StoredArray.open(self.uri, name, self._source)
        return self._column_arrays[name]

    def _refuse_other(
        self, wanted: Mapping[str, Any], given: Mapping[str, npt.NDArray[Any]], attrs: Mapping[str, Any]
    ) -> None:
        differs = [
            f"{key} is {getattr(self, key)}, not {value}"
            for key, value in wanted.items()
            if getattr(self, key) != value
        ]
        if set(given) != set(self._given):
            differs.append(f"columns are {', '.join(self._given)}, not {', '.join(given)}")
        elif self.rows == wanted["rows"]:
            differs += [
                f"column {key} holds other values" for key in given if not self._same_column(key, given[key])
            ]
        for key in sorted({*attrs, *self.attrs}):
            if self.attrs.get(key) != attrs.get(key):
                differs.append(f"{key} is {self.attrs.get(key)!r}, not {attrs.get(key)!r}")
        if differs:
            raise StoreError(
                f"{self.uri} differs from what is asked for: {'; '.join(differs)}; use --overwrite or another --out"
            )

    def _same_column(self, name: str, values: npt.NDArray[Any]) -> bool:
        array = self._column(name)
        if (array.dtype, array.shape) != (values.dtype, values.shape):
            return False
        if self._given[name] == _is_uniform(values):
            return False
        stored = np.full(1, array.fill, array.dtype) if not self._given[name] else array.read()
        expected = values.flat[:1] if not self._given[name] else values
        return bool(np.array_equal(stored, expected, equal_nan=values.dtype.kind == "f"))


def _is_uniform(values: npt.NDArray[Any]) -> bool:
    first = values.flat[0]
    return bool(
        np.all(np.isnan(values)) if values.dtype.kind == "f" and np.isnan(first) else np.all(values == first)
    )


def _check_arguments(
    uri: str, name: str, wanted: Mapping[str, Any], given: Mapping[str, npt.NDArray[Any]], attrs: Any
) -> None:
    for key in ("rows", "columns", "chunk_rows"):
        if wanted[key] < 1:
            raise StoreError(f"{uri}: {key} is {wanted[key]}; it must be at least 1")
    if wanted["dtype"] not in ("float32", "float64"):
        raise StoreError(f"{uri}: dtype {wanted['dtype']!r} is not supported; use float32 or float64")
    kept = wanted["precision"]
    if kept is not None and (kept not in PRECISIONS or wanted["dtype"] != "float32"):
        raise StoreError(
            f"{uri}: {kept!r} of {wanted['dtype']} is not supported; use {' or '.join(PRECISIONS)} of float32"
        )
    if MARK in attrs:
        raise StoreError(f"{uri}: the attribute {MARK} is reserved; use another name")
    for key in (name, *given):
        check_name(key, "array")
    for key, values in given.items():
        if values.shape[:1] != (wanted["rows"],) or not values.size > 0 or values.ndim > 2:
            raise StoreError(f"{uri}: column {key} has shape {values.shape}, the store {wanted['rows']} rows")
        if values.dtype.kind not in "biuf" or key == name:
            raise StoreError(
                f"{uri}: column {key} ({values.dtype}) must hold numbers and not be named {name!r}"
            )
