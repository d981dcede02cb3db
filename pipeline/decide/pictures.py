"""Pictures of samples: shrunk, as PNG files and data URIs, and as half blocks for a terminal."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ...workers.data.show import Picture

Pixels = npt.NDArray[np.uint8]


def png(pixels: Pixels) -> bytes:
    """Return an image, (H, W) grey or (H, W, 3), as a PNG file."""
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # filter 0 before each row
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def data_uri(pixels: Pixels) -> str:
    """Return an image as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")


def shrunk(pixels: Pixels, side: int) -> Pixels:
    """Return an image of at most ``side`` pixels a side: blocks averaged, none where it is small enough."""
    height, width = pixels.shape[:2]
    if max(height, width) <= side:
        return pixels
    scale = side / max(height, width)
    for axis, size in ((0, height), (1, width)):
        edges = np.linspace(0, size, max(1, round(size * scale)) + 1).astype(int)
        sums = np.add.reduceat(pixels.astype(np.float64), edges[:-1], axis=axis)
        counts = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(pixels.ndim)])
        pixels = np.rint(sums / counts).astype(np.uint8)
    return pixels


def half_blocks(picture: Picture, side: int = 28) -> list[str]:
    """Return a picture as lines for a terminal of 24 bit colours, two pixels a character."""
    pixels = shrunk(picture.pixels, side)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = [
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return lines
