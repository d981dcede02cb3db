"""Making the stores of rows that stages fill, also again where their metadata were damaged."""

from __future__ import annotations

from typing import Any

from ...storage import files
from ...storage.rows import RowStore
from ...storage.uri import join


def rebuild(uri: str, **described: Any) -> RowStore:
    """Write the metadata and given columns of a store anew; its rows stay.

    They are made in a temporary store and copied over what is there.

    Args:
        uri: Address of the store.
        described: As for ``RowStore.create``.
    """
    temporary = f"{uri}{files.PARTIAL}"
    files.remove(temporary, recursive=True)
    fresh = RowStore.create(temporary, **described)
    for name in fresh.metadata_files():
        files.write_bytes(join(uri, *name.split("/")), files.read_bytes(join(temporary, *name.split("/"))))
    files.remove(temporary, recursive=True)
    return RowStore.open(uri, described["name"])
