"""What a sample's own visits left in the record: ``trajectory.zarr/visits``.

A visit is the step of an epoch whose batch holds the sample, in train mode, before that step's update.
Letters: E epochs, N training samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Source, StoredArray, read_group
from .documents import taken_apart
from .errors import CorruptStore
from .files import read_bytes
from .trajectory_format import MARK

Floats = npt.NDArray[np.float32]

FORMS: Mapping[str, tuple[str, tuple[str, str]]] = {
    "loss": ("float32", ("epoch", "train_index")),
    "margin": ("float32", ("epoch", "train_index")),
    "other": ("int16", ("epoch", "train_index")),
    "probability": ("float32", ("train_index", "class")),
}
"""Array -> its type and the names of its axes."""

BY_EPOCH = ("loss", "margin", "other")

_CHUNK_BYTES = 1 << 20
_CHUNK_COLUMNS = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Visits:
    """What is known of every sample's visits.

    Attributes:
        loss: (E, N) own loss of each sample at its visit; NaN: it was not visited.
        margin: (E, N) output of the given class minus the largest other output; None where the outputs are no
            classes or the labels unknown.
        other: (E, N) int16, which class that largest other output was; -1: unknown, or above 32,767.
        probability: (N, C) mean over the visits of the softmax of the outputs; None where there are none, or
            where they would be too large.
        loss_dtype: What the losses were computed in, such as ``float32``: how exactly their mean is known.
    """

    loss: Floats
    margin: Floats | None
    other: npt.NDArray[np.int16] | None
    probability: Floats | None
    loss_dtype: str


class VisitsWriter:
    """Writes the visits of a training, epoch by epoch, a chunk at a time.

    Args:
        place: The group's address while it is written.
        epochs: E.
        samples: N.
    """

    def __init__(self, place: str, epochs: int, samples: int) -> None:
        self._place, self._shape = place, (epochs, samples)
        rows = max(1, min(epochs, _CHUNK_BYTES // (4 * samples)))
        self._chunk = (rows, min(samples, _CHUNK_COLUMNS))
        self._arrays: dict[str, StoredArray] = {}
        self._waiting: dict[str, list[npt.NDArray[Any]]] = {}

    @staticmethod
    def held_bytes(epochs: int, samples: int) -> int:
        """Return the memory that epochs take which wait for their chunk to be full."""
        return max(10 * samples, min(10 * samples * epochs, 3 * _CHUNK_BYTES))

    def write_epoch(self, epoch: int, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write an epoch of some of `BY_EPOCH`, (N,) each; always the same ones."""
        rows, epochs = self._chunk[0], self._shape[0]
        for name, row in values.items():
            dtype, dimensions = FORMS[name]
            if name not in self._arrays:
                self._arrays[name] = StoredArray.create(
                    self._place,
                    f"visits/{name}",
                    shape=self._shape,
                    dtype=dtype,
                    chunk=self._chunk,
                    dimensions=dimensions,
                    fill=-1 if dtype == "int16" else None,
                )
            waiting = self._waiting.setdefault(name, [])
            waiting.append(np.asarray(row, dtype=dtype))
            if (epoch + 1) % rows == 0 or epoch + 1 == epochs:
                self._arrays[name].write(epoch + 1 - len(waiting), np.stack(waiting))
                waiting.clear()

    def write_probability(self, probability: Floats) -> None:
        """Write the mean probabilities, (N, C)."""
        dtype, dimensions = FORMS["probability"]
        samples, classes = probability.shape
        chunk = (max(1, min(samples, (16 << 20) // (4 * classes))), classes)
        array = StoredArray.create(
            self._place,
            "visits/probability",
            shape=probability.shape,
            dtype=dtype,
            chunk=chunk,
            dimensions=dimensions,
        )
        array.write(0, np.ascontiguousarray(probability, dtype=dtype))
        self._arrays["probability"] = array

    @property
    def names(self) -> list[str]:
        """The arrays that were written."""
        return [name for name in FORMS if name in self._arrays]


def read_visits(uri: str, source: Source = read_bytes) -> Visits | None:
    """Read the visits of a trajectory; None where it was recorded without.

    Args:
        uri: Address of ``trajectory.zarr``.
        source: What reads its files.

    Raises:
        IncompleteStage: There is no trajectory.
        CorruptStore: It is damaged.
    """
    with taken_apart(f"{uri}/zarr.json"):
        mark = read_group(uri, source).get(MARK, {}).get("visits")
        if mark is None:
            return None
        names: Sequence[str] = [str(name) for name in mark["arrays"]]
        loss_dtype = str(mark["loss_dtype"])
    found = {
        name: StoredArray.open(uri, f"visits/{name}", source).read() if name in names else None
        for name in FORMS
    }
    if found["loss"] is None:
        raise CorruptStore(f"{uri}/zarr.json is damaged (visits without losses); run the stage again")
    return Visits(
        loss=found["loss"],
        margin=found["margin"],
        other=found["other"],
        probability=found["probability"],
        loss_dtype=loss_dtype,
    )
