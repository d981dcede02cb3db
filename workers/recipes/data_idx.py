"""MNIST's file format (IDX), plain or gzipped: https://yann.lecun.com/exdb/mnist describes it."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...storage.errors import RecipeError
from .data_images import LabelledImages

_UBYTE = 0x08
_SIDE = 28
_MOST_SAMPLES = 1_000_000  # bounds what a damaged header can make us read
_STEMS = {True: "train", False: "t10k"}
_KINDS = ("images-idx3", "labels-idx1")
FILES = tuple(f"{stem}-{kind}-ubyte" for stem in _STEMS.values() for kind in _KINDS)
"""The four files by their plain names; ``train-images.idx3-ubyte`` and a final ``.gz`` are found too."""


def missing_files(directory: Path) -> list[str]:
    """Return which of the four files ``directory`` lacks, by their plain names; [] when complete."""
    return [name for name in FILES if _find(directory, name) is None]


def read_images(directory: Path, *, train: bool, classes: int = 10) -> LabelledImages:
    """Return the training or the test file's images, uint8 of shape (n, 1, 28, 28), in file order.

    Raises:
        RecipeError: A file is absent or damaged, images and labels differ in number, or a label is
            not below ``classes``.
    """
    images_path = _required(directory, f"{_STEMS[train]}-{_KINDS[0]}-ubyte")
    labels_path = _required(directory, f"{_STEMS[train]}-{_KINDS[1]}-ubyte")
    images = _read(images_path, axes=3)
    labels = _read(labels_path, axes=1)
    if images.shape[1:] != (_SIDE, _SIDE):
        raise RecipeError(
            f"{images_path} holds images of {images.shape[1]} x {images.shape[2]} pixels, but 28 x 28 are "
            "expected: put the original file there"
        )
    if len(images) != len(labels):
        raise RecipeError(
            f"{images_path} holds {len(images)} images, but {labels_path} {len(labels)} labels: "
            "put two files of one data set there"
        )
    if len(labels) and int(labels.max()) >= classes:
        raise RecipeError(
            f"{labels_path} holds the label {int(labels.max())}, but labels run from 0 to {classes - 1}: "
            "put the original file there"
        )
    return LabelledImages(
        images=images[:, None],
        labels=labels.astype(np.int64),
        source_index=np.arange(len(labels), dtype=np.int64),
    )


def _find(directory: Path, name: str) -> Path | None:
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            if (directory / (spelling + suffix)).is_file():
                return directory / (spelling + suffix)
    return None


def _required(directory: Path, name: str) -> Path:
    path = _find(directory, name)
    if path is None:
        raise RecipeError(f"{directory} has no {name} or {name}.gz: put the file there")
    return path


def _read(path: Path, *, axes: int) -> npt.NDArray[np.uint8]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return _parse(path, stream, axes)
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"{path} cannot be read ({error}): download it again") from error


def _parse(path: Path, stream: io.BufferedIOBase, axes: int) -> npt.NDArray[np.uint8]:
    header = stream.read(4 + 4 * axes)
    if len(header) < 4 + 4 * axes or header[:4] != bytes((0, 0, _UBYTE, axes)):
        raise RecipeError(
            f"{path} starts with {header[:4].hex() or 'nothing'}, but an IDX file of bytes with {axes} axes "
            f"starts with 0000080{axes}: download it again"
        )
    shape = struct.unpack(f">{axes}I", header[4:])
    if shape[0] > _MOST_SAMPLES or any(side > 4 * _SIDE for side in shape[1:]):
        raise RecipeError(
            f"{path} claims the shape {shape}, but at most {_MOST_SAMPLES} images of 28 x 28 are expected: "
            "download it again"
        )
    expected = math.prod(shape)
    content = stream.read(expected + 1)
    if len(content) != expected:
        found = f"only {len(content)}" if len(content) < expected else "more than"
        raise RecipeError(
            f"{path} holds {found} of the {expected} bytes its header claims: download it again"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
