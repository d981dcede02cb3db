"""How a sample is shown to people: as a picture or as text.

Shape letters: H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...storage.errors import RecipeError
from .labels import KEYS
from .user_code import user_code

Shown = Any
"""What ``show`` may return: an image array, text, or None."""

TEXT = 240
"""Characters of a text that are shown; the rest becomes an ellipsis."""

INPUTS = (
    "image",
    "images",
    "pixel_values",
    "text",
    "sentence",
    "input",
    "inputs",
    "x",
    "input_ids",
    "tokens",
)
"""Where an item that is a mapping has what is shown, in this order; else its first part that is no target."""

_FEATURES = 24
_SIDES = ((1, 0), (3, 0), (1, 2), (3, 2))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """A picture.

    Attributes:
        pixels: (H, W) grey or (H, W, 3) red, green, blue, uint8.
    """

    pixels: npt.NDArray[np.uint8]


class ShowingRecipe(Protocol):
    """The part of a recipe that shows its samples; see ``Recipe``."""

    @property
    def name(self) -> str:
        """Name of the recipe."""
        ...

    def show(self, item: Any) -> Shown:
        """Return an image, a text, or None."""
        ...


def look(recipe: ShowingRecipe, item: Any, what: str) -> Picture | str | None:
    """Return an item as its recipe shows it, checked.

    Args:
        recipe: The recipe.
        item: An item of one of its datasets.
        what: Which one, for messages.

    Raises:
        RecipeError: ``show`` raised, or returned what is neither an image nor a text.
    """
    with user_code(f"{recipe.name}.show() of {what} raised", always=True):
        found = recipe.show(item)
        if found is None:
            return None
        if isinstance(found, str):
            return cut(found)
        array = as_array(found)
    picture = None if array is None else _picture(array)
    if picture is None:
        told = type(found).__name__ if array is None else f"{array.dtype} of shape {array.shape}"
        if array is not None and array.dtype.kind == "f" and array.size:
            told += f" from {array.min():.3g} to {array.max():.3g}"
        raise RecipeError(
            f"{recipe.name}.show() of {what} returned {told}; return an image (H, W), (H, W, 3) or (C, H, W) of "
            "uint8 or of floats from 0 to 1, a text, or None"
        )
    return picture


def default_look(item: Any, shape: Sequence[int] | None = None) -> Shown:
    """Return what can be seen of an item without knowing more about it.

    The inputs of a pair or mapping: tensors (H, W) or of 1 or 3 channels as an image, scaled to their own
    range where they leave 0 .. 1; integers in a row and words as text; other rows as ``x0=…, x1=…``.

    Args:
        item: An item of a dataset.
        shape: (H, W) or (C, H, W) of inputs that are flattened images; None: rows are no images.
    """
    found = _input(item)
    if isinstance(found, str):
        return found
    if isinstance(found, (list, tuple)) and found and all(isinstance(part, (str, int)) for part in found):
        return " ".join(map(str, found[:TEXT]))
    array = as_array(found)
    if array is None or array.size == 0 or array.dtype.kind not in "biuf":
        return None
    if shape is not None and array.size == int(np.prod(shape)):
        array = array.reshape(tuple(shape))
    if array.ndim > 1 and array.shape[0] == 1 and array.ndim == 2:
        array = array[0]
    if array.ndim < 2:
        return _row(np.atleast_1d(array))
    return _scaled(array) if array.ndim == 2 or _is_image(array.shape) else None


def cut(text: str) -> str:
    """Return a text of at most `TEXT` characters."""
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"


def as_array(value: Any) -> npt.NDArray[Any] | None:
    """Return a tensor, array or picture (PIL's, say) as an array; None where it is none of these."""
    if isinstance(value, Tensor):
        dense = value.detach().cpu()
        return (dense.float() if dense.is_floating_point() else dense).numpy()
    if (
        isinstance(value, (int, float))
        or hasattr(value, "__array__")
        or hasattr(value, "__array_interface__")
    ):
        return np.asarray(value)
    return None


def _input(item: Any) -> Any:
    """Return the inputs of an item, through pairs and mappings."""
    for _ in range(3):
        if isinstance(item, Mapping):
            keys = [key for key in INPUTS if key in item] or [key for key in item if key not in KEYS]
            if not keys:
                return None
            item = item[keys[0]]
        elif isinstance(item, (list, tuple)) and item and not isinstance(item[0], int):
            words = len(item) != 2 and all(isinstance(part, str) for part in item)
            if words:
                return item
            item = item[0]
        else:
            return item
    return item


def _row(row: npt.NDArray[Any]) -> str:
    if row.dtype.kind in "iu":
        return " ".join(map(str, row[:TEXT].tolist()))
    parts = [f"x{k}={float(value):.4g}" for k, value in enumerate(row[:_FEATURES])]
    return ", ".join([*parts, *(["…"] if len(row) > _FEATURES else [])])


def _is_image(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and any(shape[axis] == channels for channels, axis in _SIDES)


def _scaled(array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Return an image as uint8 or floats from 0 to 1."""
    if array.dtype == np.uint8:
        return array
    low, high = array.min(), array.max()
    if array.dtype.kind in "iu" and low >= 0 and 1 < high <= 255:
        return array.astype(np.uint8)
    values = array.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    low, high = values[finite].min(), values[finite].max()
    if low < 0 or high > 1:
        values = (values - low) / (high - low if high > low else 1.0)
    return np.clip(np.nan_to_num(values), 0, 1)


def _picture(array: npt.NDArray[Any]) -> Picture | None:
    """Return an image array as a picture; None where it is no image."""
    if array.dtype.kind == "b":
        array = array.astype(np.float64)
    if array.ndim not in (2, 3) or array.size == 0 or (array.dtype != np.uint8 and array.dtype.kind != "f"):
        return None
    if array.ndim == 3:
        if array.shape[2] not in (1, 3):
            if array.shape[0] not in (1, 3):
                return None
            array = array.transpose(1, 2, 0)
        if array.shape[2] == 1:
            array = array[:, :, 0]
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < -1e-6 or array.max() > 1 + 1e-6:
            return None
        array = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    return Picture(pixels=np.ascontiguousarray(array))
