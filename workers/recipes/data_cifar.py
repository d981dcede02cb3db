"""CIFAR-10's "python version" files: pickles, read as data.

A pickle is a program; loading a foreign one with ``pickle.load`` lets it run anything. The reader
here permits only what the published files need: dictionaries, lists, tuples, bytes, strings,
numbers, and arrays of bytes. Of the functions a pickled array names, none is called: stand-ins note
their arguments, and the array is built from the noted bytes once shape and type are checked.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...storage.errors import RecipeError
from .data_images import LabelledImages

TRAIN_FILES = tuple(f"data_batch_{k}" for k in range(1, 6))
TEST_FILE = "test_batch"
FILES = (*TRAIN_FILES, TEST_FILE)
FOLDER = "cifar-10-batches-py"
_SHAPE = (3, 32, 32)
_MOST_BYTES = 1 << 28  # a published file has 31 MB


class _DType:
    """Stands for ``numpy.dtype``: notes the name, ignores the rest of its state."""

    def __init__(self, name: Any = None, *_flags: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and the like: only single bytes are accepted, which have none."""


class _Array:
    """Stands for a pickled array: notes its shape, type, order and bytes."""

    def __init__(self, state: tuple[Any, ...] = ()) -> None:
        self.state = state

    def __setstate__(self, state: Any) -> None:
        """Take ``(version, shape, dtype, fortran, bytes)``, as ``ndarray.__reduce__`` writes it."""
        self.state = tuple(state)[1:]

    def build(self) -> npt.NDArray[np.uint8]:
        """Return the array; ValueError if the notes do not describe an array of bytes."""
        shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _DType) or dtype.name not in ("u1", "|u1", "uint8"):
            raise ValueError("an array that is not of bytes (uint8)")
        if not isinstance(raw, (bytes, bytearray)) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array whose content is not plain bytes")
        if len(raw) != math.prod(shape):
            raise ValueError(f"an array of {len(raw)} bytes for the shape {tuple(shape)}")
        return np.frombuffer(bytes(raw), dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_arguments: Any) -> _Array:
    """Stand for ``numpy.core.multiarray._reconstruct``: an array whose state follows."""
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """Stand for ``numpy.core.numeric._frombuffer``, which protocol 5 uses."""
    return _Array((shape, dtype, order == "F", raw))


def _latin1(text: Any, encoding: Any = None) -> bytes:
    """Stand for ``_codecs.encode``, which Python 3 uses for bytes in protocols 0 to 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in another encoding than latin1")
    return text.encode("latin1")


_PERMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _DataUnpickler(pickle.Unpickler):
    """Unpickler that knows no class or function but the stand-ins above."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for ``module.name``; UnpicklingError for anything else."""
        if (module, name) not in _PERMITTED:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, and only bytes, lists and arrays are allowed"
            )
        return _PERMITTED[module, name]


def locate(directory: Path) -> Path:
    """Return the folder of the batches: ``directory`` or ``cifar-10-batches-py`` inside it."""
    return directory / FOLDER if (directory / FOLDER).is_dir() else directory


def missing_files(directory: Path) -> list[str]:
    """Return which of the six files ``directory`` (or the usual folder inside it) lacks."""
    folder = locate(directory)
    return [name for name in FILES if not (folder / name).is_file()]


def read_images(directory: Path, *, train: bool, classes: int = 10) -> LabelledImages:
    """Return the training or test images, uint8 of shape (n, 3, 32, 32), in file order.

    Raises:
        RecipeError: A file is damaged, or holds anything but the expected data.
    """
    folder = locate(directory)
    parts = [_read(folder / name, classes) for name in (TRAIN_FILES if train else (TEST_FILE,))]
    labels = np.concatenate([part[1] for part in parts])
    return LabelledImages(
        images=np.concatenate([part[0] for part in parts]),
        labels=labels,
        source_index=np.arange(len(labels), dtype=np.int64),
    )


def _read(path: Path, classes: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        # Python 2 wrote the published files: its strings are bytes.
        content = _DataUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = _checked(content, classes)
    except Exception as error:  # a hostile pickle can raise anything from the opcodes it holds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(
            f"{path} is not a CIFAR-10 batch ({reason}): unpack the original cifar-10-python.tar.gz again"
        ) from error
    return pixels.reshape(-1, *_SHAPE), labels


def _checked(content: Any, classes: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    if not isinstance(content, dict):
        raise TypeError("no dictionary inside")
    fields = {
        key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()
    }
    data, labels = fields.get("data"), fields.get("labels")
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise TypeError("no array 'data' or no list 'labels' inside")
    pixels = data.build()
    if pixels.shape != (len(labels), math.prod(_SHAPE)):
        raise ValueError(f"data of shape {pixels.shape} for {len(labels)} labels of 3,072 bytes each")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ValueError(f"a label that is not a whole number from 0 to {classes - 1}")
    return pixels, np.asarray(labels, dtype=np.int64)
