"""One Zarr chunk as bytes: little-endian values, blosc (lz4, level 5, shuffle), crc32c at the end.

These are Zarr v3's own codecs, so any Zarr reader opens the stores. They are applied here instead
of by ``zarr.Array`` for three reasons: a chunk is decompressed straight into the caller's array in
parallel threads (about twice as fast), a missing chunk is an error instead of a silent fill value, and
a damaged one is reported with its place.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.blosc import Blosc  # type: ignore[import-untyped]
from zarr.codecs import BloscCodec, Crc32cCodec

_LEVEL = 5
_CRC_BYTES = 4
_BLOSC_HEADER_BYTES = 16
MAX_CHUNK_BYTES = (1 << 31) - 17
"""What blosc can take."""


def most_bytes(size: int) -> int:
    """Return the bytes that the file of a chunk of ``size`` bytes has at most: blosc adds little to what it cannot press."""
    return size + size // 64 + 4096


def compressors(itemsize: int) -> list[Any]:
    """Return the codecs after ``bytes``, as Zarr writes them into the metadata."""
    return [
        BloscCodec(cname="lz4", clevel=_LEVEL, shuffle="shuffle", typesize=itemsize),
        Crc32cCodec(),
    ]


def codecs_are_ours(codecs: Any) -> bool:
    """Return whether an array's metadata name exactly the codecs of this module.

    An allow-list of one chain: a store from elsewhere cannot choose what code runs on its bytes.
    """
    if [codec.get("name") for codec in codecs] != ["bytes", "blosc", "crc32c"]:
        return False
    return bool(codecs[0].get("configuration", {}).get("endian", "little") == "little")


def encode(values: npt.NDArray[Any]) -> list[bytes]:
    """Return the parts of the chunk file that holds ``values``, a full chunk, C-contiguous."""
    codec = Blosc(cname="lz4", clevel=_LEVEL, shuffle=Blosc.SHUFFLE, typesize=values.dtype.itemsize)
    body: bytes = codec.encode(values.reshape(-1).view(np.uint8))
    return [body, int(google_crc32c.value(body)).to_bytes(_CRC_BYTES, "little")]


def decode(data: bytes, out: npt.NDArray[Any]) -> None:
    """Decode a chunk file into ``out``, a C-contiguous array of exactly the chunk's size.

    Raises:
        ValueError: The checksum is wrong or the size is another.
    """
    if len(data) < _BLOSC_HEADER_BYTES + _CRC_BYTES:
        raise ValueError(f"{len(data)} bytes are too few for a chunk")
    stored = int.from_bytes(data[-_CRC_BYTES:], "little")
    body = np.frombuffer(data, np.uint8)[:-_CRC_BYTES]
    found = int(google_crc32c.value(body))
    if found != stored:
        raise ValueError(f"crc32c is {found:08x}, stored {stored:08x}")
    # Bytes 4 to 8 of a blosc buffer: the decompressed size. A smaller one would leave a stale tail.
    size = int.from_bytes(data[4:8], "little")
    if size != out.nbytes:
        raise ValueError(f"chunk holds {size} bytes, expected {out.nbytes}")
    Blosc().decode(body, out=out.reshape(-1).view(np.uint8))
