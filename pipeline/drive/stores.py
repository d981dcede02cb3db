"""The stores of rows that stages fill: described as values, made before any worker starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from ...storage import files
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...storage.uri import join
from ...workers.model.row_map import RowMap


def row_notes(row_map: RowMap | None, precision: str | None = None) -> dict[str, object]:
    """Return what a store says of rows that are not the flat vector of the run's dtype: enough to read them by hand."""
    kept: dict[str, object] = {} if row_map is None else {"row_map": row_map.told()}
    return kept if precision is None else {**kept, "store_dtype": precision}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoreOf:
    """A store of rows inside a run; fields but ``base`` as for ``RowStore.create``.

    Attributes:
        base: Where it lies in the run.
    """

    base: str
    name: str
    rows: int
    columns: int
    dtype: str
    chunk_rows: int
    dimensions: tuple[str, str]
    row_columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None

    def create(self, directory: RunDirectory) -> RowStore:
        """Make it."""
        return self._make(directory.path(self.base))

    def open(self, directory: RunDirectory) -> RowStore:
        """Open it."""
        return RowStore.open(directory.path(self.base), self.name)

    def rebuild(self, directory: RunDirectory) -> RowStore:
        """Write its metadata and given columns anew; its rows stay.

        They are made in a temporary store and copied over what is there.
        """
        uri = directory.path(self.base)
        temporary = f"{uri}{files.PARTIAL}"
        files.remove(temporary, recursive=True)
        for name in self._make(temporary).metadata_files():
            parts = name.split("/")
            files.write_bytes(join(uri, *parts), files.read_bytes(join(temporary, *parts)))
        files.remove(temporary, recursive=True)
        return self.open(directory)

    def _make(self, uri: str) -> RowStore:
        return RowStore.create(
            uri,
            name=self.name,
            rows=self.rows,
            columns=self.columns,
            dtype=self.dtype,
            chunk_rows=self.chunk_rows,
            dimensions=self.dimensions,
            row_columns=dict(self.row_columns),
            attrs=dict(self.attrs),
            precision=self.precision,
        )
