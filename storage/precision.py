"""Rows kept with fewer bits than float32: bfloat16 and float16, in forms that any Zarr reader opens.

``bfloat16`` has no data type of its own in Zarr: values are float32 whose last 16 bits are zero, rounded to even. Blosc sorts
bytes by their place in a number, so that the zeros cost about 1% and a file is as large as one of 16 bits a number.

``float16`` reaches from 6e-8 to 65,504 alone, and rows are smaller: each is divided by a power of two of its own, so that
its largest number lies from 2^14 to 2^15. Nothing overflows; what is smaller than 2^-29 of the largest loses bits.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Precision = Literal["bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Largest relative error of a rounded number."""

LARGEST = float(np.uint32(0x7F7F0000).view(np.float32))
"""The largest number of bfloat16, 3.39e38: 0.4% below float32's. A larger one might be rounded to infinity."""

NUMBER_BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.02, "float16": 2.0}
"""Bytes of a number in a file that blosc cannot press."""

_TOP = 15
_LEAST_EXPONENT = -126


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return float32 values rounded to the nearest that bfloat16 has; one beyond its largest becomes infinite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded &= 0xFFFF0000
    return rounded.view(np.float32)


def to_float16(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Return rows (R, D) divided by a scale each, and the scales (R,): powers of two, 1 for a row of zeros."""
    largest = np.maximum(values.max(1), -values.min(1))
    exponent = np.maximum(np.frexp(largest)[1] - _TOP, _LEAST_EXPONENT)
    exponent[largest == 0] = 0
    scale = np.ldexp(np.float32(1), exponent).astype(np.float32)
    return (values / scale[:, None]).astype(np.float16), scale


def from_float16(
    values: npt.NDArray[Any], scale: npt.NDArray[np.float32], out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Return rows as they were, in ``out`` where it is given."""
    found: npt.NDArray[np.float32] = np.multiply(values, scale[:, None], out=out, dtype=np.float32)
    return found
