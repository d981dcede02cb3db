"""Arrays of a Zarr v3 group, read and written in spans of the first axis.

Metadata are made by zarr, but written and read here (through zarr that costs 3 ms an array, and a run
has hundreds); chunk data go through `hydra_pipe.storage.chunks`. Whole chunks are written, by one writer each: a
chunk written by two would silently lose rows.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from . import chunks, files
from .documents import parse, taken_apart
from .errors import CorruptStore, DoesNotFit, IncompleteStage, StoreError
from .refused import full_disk_guard
from .sourced import Sourced
from .threads import in_threads
from .uri import is_local, join

T = TypeVar("T")
Slices = tuple[slice, ...]
Source = Callable[[str], bytes]
"""Gives the contents of the file at an address; how a run is read by its manifests, see `hydra_pipe.storage.ledger`."""
_MOST_BYTES = 1 << 60
_MOST_CHUNKS = 1 << 28
_TYPES = frozenset(
    {
        "bool",
        "float16",
        "float32",
        "float64",
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    }
)
_KEYS = {"name": "default", "configuration": {"separator": "/"}}
_LOCAL_THREADS = 8
_REMOTE_THREADS = 16  # these mostly wait


def open_store(uri: str, *, read_only: bool) -> LocalStore | FsspecStore:
    """Return the Zarr store at a checked address."""
    if is_local(uri):
        return LocalStore(uri, read_only=read_only)
    files.filesystem(uri)  # for its message where a package is missing
    return FsspecStore.from_url(uri, read_only=read_only)


def write_group(uri: str, attrs: dict[str, Any]) -> None:
    """Create the group at ``uri`` if it is not there, and set all its attributes at once."""
    with full_disk_guard(uri):
        group = zarr.open_group(open_store(uri, read_only=False), mode="a", zarr_format=3)
        group.attrs.put(attrs)


def read_group(uri: str, source: Source = files.read_bytes) -> dict[str, Any]:
    """Return the attributes of the group at ``uri``, whose file ``source`` reads.

    Raises:
        IncompleteStage: There is no group.
        CorruptStore: Its metadata cannot be read.
    """
    try:
        data = source(join(uri, "zarr.json"))
    except FileNotFoundError:
        raise IncompleteStage(
            f"{uri} is not there; run the stage that writes it (`hydra-pipe status` shows which)"
        ) from None
    metadata = parse(data, f"{uri}/zarr.json")
    with taken_apart(f"{uri}/zarr.json"):
        if (metadata["zarr_format"], metadata["node_type"]) != (3, "group"):
            raise ValueError("no group of Zarr format 3")
        return dict(metadata.get("attributes", {}))


class StoredArray:
    """One array of a group.

    Attributes:
        uri: The group's address.
        name: Path inside the group, such as ``checkpoint/weights``.
        shape: Its shape; the first axis is the one that spans run along.
        dtype: Its type.
        chunk: Shape of a chunk.
        fill: What was never written reads as.
    """

    def __init__(
        self, uri: str, name: str, metadata: Mapping[str, Any], source: Source = files.read_bytes
    ) -> None:
        self.uri, self.name, self._source = uri, name, source
        self.shape: tuple[int, ...] = _lengths(metadata["shape"])
        self.chunk: tuple[int, ...] = _lengths(
            metadata["chunk_grid"]["configuration"]["chunk_shape"], least=1
        )
        if metadata["data_type"] not in _TYPES:
            raise ValueError(f"type of values {metadata['data_type']!r:.40}")
        self.dtype: np.dtype[Any] = np.dtype(metadata["data_type"])
        self.fill: Any = self.dtype.type(float(metadata["fill_value"]))
        self._grid = tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))
        sizes = [math.prod(self.shape) * self.dtype.itemsize, math.prod(self.chunk) * self.dtype.itemsize]
        if (
            sizes[0] > _MOST_BYTES
            or sizes[1] > chunks.MAX_CHUNK_BYTES
            or math.prod(self._grid) > _MOST_CHUNKS
        ):
            raise ValueError(f"shape {list(self.shape)} in chunks of {list(self.chunk)}")

    @cached_property
    def array(self) -> zarr.Array[Any]:
        """The array for other readers of Zarr, read-only; they read through ``source``, too."""
        found: zarr.Array[Any] = zarr.open_array(
            Sourced(open_store(self.uri, read_only=True), self.uri, self._source), path=self.name, mode="r"
        )
        return found

    @classmethod
    def create(
        cls,
        uri: str,
        name: str,
        *,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        chunk: tuple[int, ...],
        dimensions: tuple[str, ...],
        fill: Any = None,
    ) -> StoredArray:
        """Create an array (and the groups above it), replacing an older one.

        Args:
            uri: The group's address.
            name: Path inside the group.
            shape: Shape.
            dtype: bool, integer or float type.
            chunk: Shape of a chunk; at most 2 GiB.
            dimensions: Name of each axis, for readers that label axes (xarray). Within a group a name has
                one length, and only a 1-D array may be named as its axis: it then labels that axis.
            fill: Value of what was never written; NaN for floats, else 0.

        Raises:
            StorageFull: The disk is full.
            StoreError: A chunk would be larger than its codec can take.
        """
        kind = np.dtype(dtype)
        if (size := math.prod(chunk) * kind.itemsize) > chunks.MAX_CHUNK_BYTES:
            raise StoreError(
                f"{uri}: a chunk of {name} has {size} bytes, at most {chunks.MAX_CHUNK_BYTES}; use fewer rows"
            )
        if fill is None:
            fill = np.nan if kind.kind == "f" else kind.type(0)
        array, group = _documents(shape, kind, chunk, dimensions, fill)
        with full_disk_guard(uri):
            files.remove(join(uri, name), recursive=True)
            parts = name.split("/")
            for k in range(len(parts)):
                above = join(uri, *parts[:k], "zarr.json")
                if not files.exists(above):
                    files.write_parts(above, [group], sync=False)
            files.write_parts(join(uri, name, "zarr.json"), [array], sync=False)
        return cls.open(uri, name)

    @classmethod
    def open(cls, uri: str, name: str, source: Source = files.read_bytes) -> StoredArray:
        """Open an array, whose files ``source`` reads.

        Raises:
            IncompleteStage: It is not there.
            CorruptStore: Its metadata cannot be read or name codecs that are not ours.
        """
        try:
            data = source(join(uri, name, "zarr.json"))
        except FileNotFoundError:
            raise IncompleteStage(f"{uri} has no array {name}; run the stage that writes it again") from None
        metadata = parse(data, f"{uri}/{name}/zarr.json")
        with taken_apart(f"{uri}/{name}/zarr.json"):
            if (metadata["zarr_format"], metadata["node_type"]) != (3, "array"):
                raise ValueError("no array of Zarr format 3")
            if metadata["chunk_grid"]["name"] != "regular":
                raise ValueError(f"chunk grid {metadata['chunk_grid']['name']!r}")
            ours = chunks.codecs_are_ours(metadata["codecs"]) and metadata["chunk_key_encoding"] == _KEYS
            found = cls(uri, name, metadata, source)
        if not ours:
            raise CorruptStore(
                f"{uri}/{name} uses codecs other than bytes, blosc, crc32c: it is damaged or not from hydra-pipe; run the stage again"
            )
        return found

    def read(
        self,
        start: int = 0,
        stop: int | None = None,
        out: npt.NDArray[Any] | None = None,
        *,
        may_lack: bool = False,
    ) -> npt.NDArray[Any]:
        """Return rows ``start`` to ``stop``; any range, aligned with chunks or not.

        Args:
            start: First row.
            stop: One past the last row (None: to the end).
            out: Where to put them; C-contiguous, of the right shape and type.
            may_lack: Give the fill value for chunks never written, instead of refusing.

        Raises:
            IncompleteStage: A chunk was never written.
            CorruptStore: A chunk's bytes are not what was written.
            StoreError: The range is outside the array.
        """
        stop = self.shape[0] if stop is None else stop
        self._check_range(start, stop)
        shape = (stop - start, *self.shape[1:])
        if out is None:
            out = self._empty(shape)
        elif out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise StoreError(
                f"out is {out.dtype}{out.shape}, rows {start}..{stop} of {self.uri}/{self.name} are {self.dtype}{shape}"
            )
        target = out

        def fetch(task: tuple[str, Slices, Slices]) -> None:
            key, inside, outside = task
            try:
                data = self._source(join(self.uri, key))
                if len(data) > chunks.most_bytes(self._chunk_bytes):
                    raise CorruptStore(
                        f"{self.uri}: {key} has {len(data):,} bytes, more than a chunk; run the stage again"
                    )
            except FileNotFoundError as error:
                if may_lack:
                    target[outside] = self.fill
                    return
                raise IncompleteStage(
                    f"{self.uri}: {key} (of rows {start}..{stop} of {self.name}) was never written; "
                    "run the stage again"
                ) from error
            place = target[outside]
            # The usual case needs no copy: the whole chunk lands in one piece of the target.
            whole = place.shape == self.chunk and place.flags.c_contiguous
            buffer = place if whole else np.empty(self.chunk, self.dtype)
            try:
                chunks.decode(data, buffer)
            except (ValueError, RuntimeError) as error:
                first = start + (outside[0].start or 0)
                raise CorruptStore(
                    f"{self.uri}: {key} (rows {first}..{start + outside[0].stop} of {self.name}) is damaged: {error}; "
                    "restore the file, or drop the unit and run again"
                ) from error
            if not whole:
                place[...] = buffer[inside]

        run_all(fetch, self._tasks(start, stop), self.uri)
        return out

    def write(self, start: int, block: npt.NDArray[Any]) -> None:
        """Write whole chunks of rows from ``start`` on.

        Raises:
            StoreError: The block has another width or type, or does not begin and end at chunk borders.
            StorageFull: The disk is full; chunks already written stay whole.
        """
        stop = start + block.shape[0] if block.ndim else start
        if block.shape[1:] != self.shape[1:] or block.ndim != len(self.shape):
            raise StoreError(
                f"{self.uri}/{self.name}: a block of shape {block.shape} does not fit rows of {self.shape}"
            )
        if block.dtype != self.dtype:
            raise StoreError(
                f"{self.uri}/{self.name}: the block is {block.dtype}, the array {self.dtype}; convert it"
            )
        self._check_range(start, stop)
        rows = self.chunk[0]
        if start % rows or (stop % rows and stop != self.shape[0]):
            raise StoreError(
                f"{self.uri}/{self.name}: rows {start}..{stop} are not aligned with chunks of {rows} rows "
                f"(of {self.shape[0]}); start and stop must be multiples of {rows}"
            )

        def put(task: tuple[str, Slices, Slices]) -> None:
            key, inside, outside = task
            values = block[outside]
            if values.shape != self.chunk:  # Zarr stores chunks at the edge in full size
                padded = np.full(self.chunk, self.fill, self.dtype)
                padded[inside] = values
                values = padded
            parts = chunks.encode(np.ascontiguousarray(values))
            files.write_parts(join(self.uri, key), parts, sync=False)

        run_all(put, self._tasks(start, stop), self.uri)

    def chunk_files(self, start: int, stop: int) -> list[str]:
        """Return the paths, relative to the group, of the chunks that hold rows ``start`` to ``stop``."""
        self._check_range(start, stop)
        return [key for key, _, _ in self._tasks(start, stop)]

    @property
    def _chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    def _empty(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        try:
            return np.empty(shape, self.dtype)
        except (MemoryError, ValueError) as error:
            raise DoesNotFit(
                f"{self.uri}/{self.name}: {math.prod(shape) * self.dtype.itemsize:,} bytes are to be read at once and "
                "are not to be had; use a machine with more memory, or check the store with hydra-pipe verify"
            ) from error

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.shape[0]:
            raise StoreError(
                f"rows {start}..{stop} are outside {self.uri}/{self.name}, which has {self.shape[0]} rows"
            )

    def _tasks(self, start: int, stop: int) -> Iterator[tuple[str, Slices, Slices]]:
        """Give (file, its part inside the chunk, its part of the span) for each chunk of a span."""
        if start == stop:
            return
        first = range(start // self.chunk[0], math.ceil(stop / self.chunk[0]))
        for index in itertools.product(first, *(range(count) for count in self._grid[1:])):
            inside, outside = [], []
            for axis, (i, size) in enumerate(zip(index, self.chunk, strict=True)):
                low, high = (start, stop) if axis == 0 else (0, self.shape[axis])
                begin, end = max(i * size, low), min((i + 1) * size, high)
                inside.append(slice(begin - i * size, end - i * size))
                outside.append(slice(begin - low, end - low))
            key = "/".join((self.name, "c", *map(str, index)))
            yield key, tuple(inside), tuple(outside)


@functools.lru_cache(maxsize=1024)
def _documents(
    shape: tuple[int, ...],
    kind: np.dtype[Any],
    chunk: tuple[int, ...],
    dimensions: tuple[str, ...],
    fill: Any,
) -> tuple[bytes, bytes]:
    """Return zarr's own metadata of an array and of a group: 3 ms, and many arrays are alike."""
    made: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(made),
        name="array",
        shape=shape,
        dtype=kind,
        chunks=chunk,
        compressors=chunks.compressors(kind.itemsize),
        fill_value=fill,
        dimension_names=dimensions,
        zarr_format=3,
    )
    return made["array/zarr.json"].to_bytes(), made["zarr.json"].to_bytes()


def run_all(function: Callable[[T], None], items: Iterable[T], uri: str) -> None:
    """Call ``function`` on every item in threads; the first error ends it and is raised."""
    work = list(items)
    limit = min(_LOCAL_THREADS, _cores()) if is_local(uri) else _REMOTE_THREADS
    failed = threading.Event()

    def unless_failed(item: T) -> None:
        if failed.is_set():
            return
        try:
            function(item)
        except BaseException:
            failed.set()
            raise

    in_threads(unless_failed, work, limit)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lengths(values: Any, least: int = 0) -> tuple[int, ...]:
    found = tuple(values)
    if any(type(value) is not int for value in found):
        raise ValueError(f"shape {list(found)!r:.60}")
    if any(value < least for value in found) or len(found) == 0:
        raise ValueError(f"shape {list(found)}")
    return found
