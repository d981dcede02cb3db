"""Writing ``trajectory.zarr``: checkpoints while training runs, everything else at its end.

Letters as in `hydra_pipe.storage.trajectory`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from . import files
from .arrays import StoredArray, write_group
from .documents import plain
from .errors import StoreError
from .refused import full_disk_guard
from .trajectory_format import DIMENSIONS, MARK, MOMENTS, NOISE, PER_STEP, SOMETIMES, ParameterEntry
from .uri import check_name, check_uri, is_local
from .visits import VisitsWriter

_CHUNK_BYTES = 16 << 20
_CHECKPOINT_CHUNK_BYTES = 64 << 20
_REMOVAL_ATTEMPTS, _REMOVAL_PAUSE_SECONDS = 5, 0.05


class TrajectoryWriter:
    """Writes one trajectory; visible under its name only after `finish`.

    Locally it is built in a sibling ``*.partial`` directory and renamed. Remotely it is written in
    place, the group's attributes last: what is there counts only once the manifest is.
    As a context manager it aborts when the block fails.

    Args:
        uri: Address of ``trajectory.zarr``.
        dimension: D.
        dtype: ``float32`` or ``float64``, of weights and momentum.
        checkpoint_steps: (K,) steps after which weights are kept, ascending.
        buffer_bytes: Size of the packed model buffers, 0 for none.
        parameter_count: P.
        moments: Whether checkpoints hold Adam's second moment and step counts.
    """

    def __init__(
        self,
        uri: str,
        *,
        dimension: int,
        dtype: str,
        checkpoint_steps: Sequence[int],
        buffer_bytes: int,
        parameter_count: int,
        moments: bool = False,
    ) -> None:
        self.uri = check_uri(uri)
        self._steps = [int(step) for step in checkpoint_steps]
        self._notes = {"dimension": int(dimension), "dtype": str(np.dtype(dtype))}
        self._written: set[int] = set()
        self._finished = False
        if is_local(self.uri):
            self._place = files.partial_name(self.uri)
        else:
            files.remove(self.uri, recursive=True)
            self._place = self.uri
        widths = {
            "weights": (dimension, dtype),
            "momentum": (dimension, dtype),
            "has_momentum": (parameter_count, "bool"),
            "buffers": (buffer_bytes, "uint8"),
        }
        if moments:
            widths |= {"second_moment": (dimension, dtype), "count": (parameter_count, str(MOMENTS["count"]))}
        try:
            self._arrays = {name: self._checkpoint_array(name, *kind) for name, kind in widths.items()}
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abort()

    def write_checkpoint(
        self,
        k: int,
        step: int,
        weights: npt.NDArray[Any],
        momentum: npt.NDArray[Any],
        has_momentum: npt.NDArray[np.bool_],
        buffers: bytes,
        second_moment: npt.NDArray[Any] | None = None,
        count: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Write checkpoint ``k`` of K.

        Args:
            k: Its index.
            step: Its step, as announced.
            weights: (D,).
            momentum: (D,).
            has_momentum: (P,) bool.
            buffers: The packed model buffers.
            second_moment: (D,), where the writer was made for moments; so the next.
            count: (P,) int64.

        Raises:
            StoreError: Not what was announced.
            StorageFull: The disk is full.
        """
        if not 0 <= k < len(self._steps) or self._steps[k] != step:
            raise StoreError(
                f"{self.uri}: checkpoint {k} at step {step} was not announced; steps are {self._steps}"
            )
        rows = {
            "weights": weights,
            "momentum": momentum,
            "has_momentum": np.asarray(has_momentum, dtype=bool),
            "buffers": np.frombuffer(buffers, np.uint8),
        }
        if second_moment is not None and count is not None:
            rows |= {"second_moment": second_moment, "count": count}
        if rows.keys() != self._arrays.keys():
            raise StoreError(
                f"{self.uri}: a checkpoint of {sorted(rows)}; announced were {sorted(self._arrays)}"
            )
        for name, row in rows.items():
            self._arrays[name].write(k, row[None])
        self._written.add(k)

    def visits(self, epochs: int, samples: int) -> VisitsWriter:
        """Return what writes the visits of E epochs of N samples into the trajectory."""
        return VisitsWriter(self._place, epochs, samples)

    def finish(
        self,
        *,
        batches: npt.NDArray[Any],
        learning_rate: npt.NDArray[Any],
        momentum: npt.NDArray[Any],
        weight_decay: npt.NDArray[Any],
        dampening: npt.NDArray[Any],
        nesterov: npt.NDArray[Any],
        coefficient: npt.NDArray[Any],
        loss: npt.NDArray[Any],
        digest_step: npt.NDArray[Any],
        digest: npt.NDArray[Any],
        epoch_digest: Sequence[str],
        parameters: Sequence[ParameterEntry],
        epochs: Mapping[str, npt.NDArray[Any]],
        attrs: Mapping[str, Any],
        noisy: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
        visits: Mapping[str, Any] | None = None,
        sometimes: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        """Write everything else and give the trajectory its name; see `Trajectory` for the arguments.

        ``sometimes`` holds the arrays of `trajectory_format.SOMETIMES` that say something.
        ``visits`` is what is to be noted of those that were written: ``arrays`` and ``loss_dtype``.

        Raises:
            StoreError: A checkpoint was not written, or the arrays disagree about T.
            StorageFull: The disk is full; nothing is left under the final name.
        """
        missing = [step for k, step in enumerate(self._steps) if k not in self._written]
        if missing:
            raise StoreError(
                f"{self.uri}: the checkpoints of steps {missing} were not written; write them first"
            )
        per_step = {
            "batches": batches,
            "learning_rate": learning_rate,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "dampening": dampening,
            "nesterov": nesterov,
            "coefficient": coefficient,
            "loss": loss,
        }
        more = dict(sometimes or {})
        lengths = {name: len(values) for name, values in (per_step | more).items()}
        if len(set(lengths.values())) > 1:
            raise StoreError(f"{self.uri}: arrays of different numbers of steps: {lengths}")
        reserved = {MARK, "parameters", "epoch_digest"} & set(attrs)
        if reserved:
            raise StoreError(f"{self.uri}: the attributes {sorted(reserved)} are reserved; use other names")
        for name, values in per_step.items():
            self._put(name, values, PER_STEP[name])
        for name, values in more.items():
            self._put(name, values, SOMETIMES[name])
        self._put("digest_step", digest_step, "int64")
        self._put("digest", digest, "uint32")
        self._put("checkpoint/step", np.array(self._steps), "int64")
        for name, values in epochs.items():
            self._put(f"epochs/{check_name(name, 'epoch column')}", values, "float64", ("epoch",))
        if noisy is not None:
            for path, values in zip(NOISE, noisy, strict=True):
                self._put(path, values, "int64")
        mark: dict[str, Any] = {"format": 1, "epochs": list(epochs), "noisy": noisy is not None}
        if more:
            mark["sometimes"] = [name for name in SOMETIMES if name in more]
        if visits is not None:
            mark["visits"] = plain(visits)
        described = {
            **self._notes,
            **plain(attrs),
            "parameters": plain([asdict(entry) for entry in parameters]),
            "epoch_digest": list(epoch_digest),
        }
        write_group(self._place, {**described, MARK: mark})
        self._give_name()

    def abort(self) -> None:
        """Remove what was written; after `finish` nothing happens. Never raises over what it is called for."""
        # After an interrupt a thread of zarr's may still be writing there: try again, and at worst leave
        # litter, which the next start removes.
        for _ in range(0 if self._finished else _REMOVAL_ATTEMPTS):
            try:
                files.remove(self._place, recursive=True)
            except OSError:
                time.sleep(_REMOVAL_PAUSE_SECONDS)
            else:
                return

    def _checkpoint_array(self, name: str, width: int, dtype: str) -> StoredArray:
        # One row a chunk, split where a row is very wide: checkpoints are written and read one by one.
        columns = max(1, min(width, _CHECKPOINT_CHUNK_BYTES // np.dtype(dtype).itemsize))
        shape = (len(self._steps), width)
        path = f"checkpoint/{name}"
        return StoredArray.create(
            self._place, path, shape=shape, dtype=dtype, chunk=(1, columns), dimensions=DIMENSIONS[path]
        )

    def _put(
        self, name: str, values: npt.NDArray[Any], dtype: str, dimensions: tuple[str, ...] | None = None
    ) -> None:
        data = np.ascontiguousarray(values, dtype=dtype)
        row_bytes = max(1, data[:1].nbytes)
        rows = max(1, min(len(data), _CHUNK_BYTES // row_bytes))
        chunk = (rows, *(max(1, n) for n in data.shape[1:]))
        names = dimensions or DIMENSIONS[name]
        StoredArray.create(
            self._place, name, shape=data.shape, dtype=dtype, chunk=chunk, dimensions=names
        ).write(0, data)

    def _give_name(self) -> None:
        if is_local(self.uri):
            with full_disk_guard(self.uri):
                # What an interrupted run left there; a directory cannot be renamed over another.
                old = files.partial_name(self.uri)
                if os.path.lexists(self.uri):
                    os.rename(self.uri, old)
                os.rename(self._place, self.uri)
                files.remove(old, recursive=True)
        self._finished = True
