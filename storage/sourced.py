"""A Zarr store whose files are read by somebody else: what other readers of Zarr get of a run is checked, too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from .uri import join


class Sourced(WrapperStore[Store]):
    """Reads whole files through ``source``; parts of files, and everything else, as the store within does."""

    def __init__(self, store: Store, uri: str, source: Callable[[str], bytes]) -> None:
        super().__init__(store)
        self._uri, self._source = uri, source

    def _with_store(self, store: Store) -> Sourced:
        return type(self)(store, self._uri, self._source)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return what a file holds, None where it is not there."""
        if byte_range is not None:
            return await self._store.get(key, prototype, byte_range)
        try:
            data = await asyncio.to_thread(self._source, join(self._uri, key))
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return what several files hold."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)
