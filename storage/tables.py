"""Whole Parquet files as tables, or a message that names the file."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from . import files
from .errors import CorruptStore


def read_table(
    uri: str, schema: pa.Schema | None = None, *, source: Callable[[str], bytes] = files.read_bytes
) -> pa.Table:
    """Return the rows of one Parquet file.

    Args:
        uri: The file.
        schema: What it must hold; None: whatever it holds.
        source: What reads it: `RunDirectory.vouched` where it is committed.

    Raises:
        CorruptStore: It is missing or damaged, or its columns are others.
    """
    try:
        content = source(uri)
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        return table if schema is None else table.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        why = "it is missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:300]
        raise CorruptStore(
            f"{uri} cannot be read ({why}); restore the file, or remove it and run the stage again"
        ) from error
