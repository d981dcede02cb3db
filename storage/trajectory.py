"""The recorded training run, ``trajectory.zarr``: what every later stage needs to know about it.

T steps, B batch size, G parameter groups, P parameters (tensors), D their values flattened, K
checkpoints, n digests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Source, StoredArray, read_group
from .documents import taken_apart
from .errors import IncompleteStage
from .files import read_bytes
from .trajectory_format import (
    BORDERS,
    MARK,
    MOMENTS,
    NOISE,
    PER_STEP,
    SOMETIMES,
    ParameterEntry,
    parameter_entry,
)
from .trajectory_writer import TrajectoryWriter
from .uri import check_uri
from .visits import Visits, read_visits

__all__ = ["Checkpoint", "ParameterEntry", "Trajectory", "TrajectoryWriter", "Visits", "open_trajectory"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Checkpoint:
    """The model and its optimiser after a step.

    Attributes:
        step: How many steps had been taken.
        weights: (D,).
        momentum: (D,), 0 where a parameter has no momentum buffer yet; Adam: its first moment.
        has_momentum: (P,) bool.
        buffers: The model's buffers as the recorder packed them.
        second_moment: (D,) of Adam; None for others.
        count: (P,) int64, steps that Adam has taken with each parameter; None for others.
    """

    step: int
    weights: npt.NDArray[Any]
    momentum: npt.NDArray[Any]
    has_momentum: npt.NDArray[np.bool_]
    buffers: bytes
    second_moment: npt.NDArray[Any] | None = None
    count: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trajectory:
    """A recorded run in memory, without its checkpoints, which `checkpoint` reads one by one.

    Attributes:
        uri: Where it was read from. T counts batches: with accumulation several make a step of the optimiser.
        batches: (T, B) int32, training indices, padded with -1.
        learning_rate: (T, G) float64, as the optimiser used it at that step; so the next three.
        momentum: (T, G) float64.
        weight_decay: (T, G) float64.
        dampening: (T, G) float64.
        nesterov: (T, G) bool.
        coefficient: (T, G) float64, c_t of the closed form.
        loss: (T,) float64, mean over the real batch.
        digest_step: (n,) int64.
        digest: (n,) uint32, crc32 of the flat weights after that many steps (0: the initial ones).
        epoch_digest: sha256 hex, one an epoch.
        checkpoint_steps: (K,) int64, without those that are there for segments alone; see ``stands``.
        parameters: In flattening order.
        attrs: ``n_train``, ``batch_size``, ``seed``, ``dtype``, ``dimension``, ``environment``, …
        epochs: Column name -> one float64 an epoch, NaN where unknown.
        noisy: (train_index, original_label) of labels that are wrong on purpose, or None.
        beta1: (T, G) float64 of Adam, like the settings above; so the next two. None for others.
        beta2: (T, G) float64.
        eps: (T, G) float64.
        divisor: (T,) float64: the loss of a step is the sum over its batches of their samples' losses /
            divisor. None: B_t.
        updates: (T,) bool: whether the optimiser stepped after the batch. None: after each.
        clip_norm: (T,) float64, norm of the step's gradient before it was clipped, NaN where no step was
            taken. None: not clipped.
        clip_factor: (T,) float64, what it was multiplied with.
        active: (T, P) bool: which parameters had a gradient in the batch's step. None: all.
        borders: Steps of checkpoints that were kept for segments of a replay, and that nothing else looks at: what is
            computed at checkpoints does not depend on how a replay was going to be cut.
        source: What reads the files of its checkpoints and visits.
    """

    uri: str
    batches: npt.NDArray[np.int32]
    learning_rate: npt.NDArray[np.float64]
    momentum: npt.NDArray[np.float64]
    weight_decay: npt.NDArray[np.float64]
    dampening: npt.NDArray[np.float64]
    nesterov: npt.NDArray[np.bool_]
    coefficient: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]
    digest_step: npt.NDArray[np.int64]
    digest: npt.NDArray[np.uint32]
    epoch_digest: list[str]
    checkpoint_steps: npt.NDArray[np.int64]
    parameters: tuple[ParameterEntry, ...]
    attrs: dict[str, Any]
    epochs: dict[str, npt.NDArray[np.float64]]
    noisy: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None
    beta1: npt.NDArray[np.float64] | None = None
    beta2: npt.NDArray[np.float64] | None = None
    eps: npt.NDArray[np.float64] | None = None
    divisor: npt.NDArray[np.float64] | None = None
    updates: npt.NDArray[np.bool_] | None = None
    clip_norm: npt.NDArray[np.float64] | None = None
    clip_factor: npt.NDArray[np.float64] | None = None
    active: npt.NDArray[np.bool_] | None = None
    borders: tuple[int, ...] = ()
    source: Source = field(default=read_bytes, repr=False, compare=False)

    @property
    def optimizer(self) -> dict[str, Any]:
        """What took the steps: ``family`` (``sgd`` or ``adam``), ``class``, and what its settings leave open."""
        return {"family": "sgd", "class": "SGD", **self.attrs.get("optimizer", {})}

    @property
    def epoch_ends(self) -> list[int]:
        """How many batches were done at the end of each epoch."""
        ends = self.attrs.get("epoch_ends")
        if ends is not None:
            return [int(end) for end in ends]
        per_epoch = int(self.attrs["steps_per_epoch"])
        return [(epoch + 1) * per_epoch for epoch in range(int(self.attrs["epochs"]))]

    def checkpoint(self, k: int) -> Checkpoint:
        """Read checkpoint ``k`` of K; negative counts from the end.

        Raises:
            IndexError: There is no such checkpoint.
            CorruptStore: Its bytes are not what was written.
        """
        count = len(self.checkpoint_steps)
        if not -count <= k < count:
            raise IndexError(f"checkpoint {k} of {count}")
        return self._stored(int(self.checkpoint_steps[k]))

    def weights(self, first: int, stop: int) -> npt.NDArray[Any]:
        """Read the weights after ``first`` steps and after each further one before ``stop``, (stop - first, D).

        Raises:
            IndexError: After one of these steps they were not kept.
            CorruptStore: Their bytes are not what was written.
        """
        k = int(np.searchsorted(self.stands, first))
        if self.stands[k : k + stop - first] != list(range(first, stop)):
            raise IndexError(f"not all weights from step {first} to {stop - 1} were kept")
        return StoredArray.open(self.uri, "checkpoint/weights", self.source).read(k, k + stop - first)

    @property
    def stands(self) -> list[int]:
        """Steps after which all of training's state is kept, ascending: where a replay may begin and end."""
        return sorted({*self.checkpoint_steps.tolist(), *self.borders})

    def at(self, step: int) -> Checkpoint:
        """Read the state after a step, one of ``stands``.

        Raises:
            IndexError: It was not kept.
            CorruptStore: Its bytes are not what was written.
        """
        found = np.flatnonzero(self.checkpoint_steps == step)
        if len(found):
            return self.checkpoint(int(found[0]))
        if step not in self.borders:
            raise IndexError(f"the state after step {step} was not kept")
        return self._stored(step)

    def _stored(self, step: int) -> Checkpoint:
        k = int(np.searchsorted(self.stands, step))

        def row(name: str) -> npt.NDArray[Any]:
            stored = StoredArray.open(self.uri, f"checkpoint/{name}", self.source).read(k, k + 1)
            return stored.reshape(-1)

        return Checkpoint(
            step=step,
            weights=row("weights"),
            momentum=row("momentum"),
            has_momentum=row("has_momentum"),
            buffers=row("buffers").tobytes(),
            **({name: row(name) for name in MOMENTS} if self.beta1 is not None else {}),
        )

    def visits(self) -> Visits | None:
        """Read the own losses and margins of every sample at its visits; None: recorded without.

        Not held in memory with the rest: E epochs of N samples.

        Raises:
            CorruptStore: Their bytes are not what was written.
        """
        return read_visits(self.uri, self.source)


def open_trajectory(uri: str, source: Source = read_bytes) -> Trajectory:
    """Read a trajectory.

    Args:
        uri: Address of ``trajectory.zarr``.
        source: What reads its files: `RunDirectory.vouched` where it is that of a run.

    Raises:
        IncompleteStage: It is not there, or was not finished.
        CorruptStore: It is damaged.
    """
    uri = check_uri(uri)
    attrs = read_group(uri, source)
    if MARK not in attrs:
        raise IncompleteStage(f"{uri} was not recorded to its end; run `hydra-pipe record` again")
    mark = attrs.pop(MARK)
    with taken_apart(f"{uri}/zarr.json"):
        parameters = tuple(parameter_entry(entry) for entry in attrs.pop("parameters"))
        columns, epoch_digest, noisy = list(mark["epochs"]), list(attrs.pop("epoch_digest")), mark["noisy"]
        sometimes = [name for name in SOMETIMES if name in mark.get("sometimes", ())]
        borders = tuple(int(step) for step in attrs.pop(BORDERS, ()))

    def read(name: str) -> Any:
        return StoredArray.open(uri, name, source).read()

    steps = read("checkpoint/step")
    return Trajectory(
        uri=uri,
        source=source,
        borders=borders,
        **{name: read(name) for name in (*PER_STEP, *sometimes)},
        digest_step=read("digest_step"),
        digest=read("digest"),
        epoch_digest=epoch_digest,
        checkpoint_steps=steps[~np.isin(steps, borders)],
        parameters=parameters,
        attrs=attrs,
        epochs={name: read(f"epochs/{name}") for name in columns},
        noisy=(read(NOISE[0]), read(NOISE[1])) if noisy else None,
    )
