"""The one replayed step: what a recorded step gives for the tracked members of its batch goes to a sink.

What is carried (sums of rows, of rotated rows, of products with targets, tangents, segments) is the sink's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..model.state import Kept
from ..persample.engine import PerSampleGradients, Watch
from ..recipe import Batch
from ..recursion.family import Moment
from ..recursion.rest import Rest
from ..training.training import Training
from ..training.verified import Report, Rows, VerifiedReplay
from .graphs import graphs_of


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldBatch:
    """A batch of a step that is about to be taken.

    Attributes:
        step: Which.
        batch: On the device.
        rows: (B,) which tracked row each member is, -1: none.
        kept: The buffers that its pass began with.
    """

    step: int
    batch: Batch
    rows: Rows
    kept: Kept


class Placed:
    """Where the tracked samples are in their batches, put on the device for many steps at once.

    Args:
        batches: (T, B) train indices, -1 where a batch is smaller.
        row_of: (N,) row of a sample, -1: not tracked.
        device: Where the batches are.
    """

    def __init__(
        self, batches: npt.NDArray[np.int32], row_of: npt.NDArray[np.int64], device: torch.device
    ) -> None:
        self._batches, self._row_of, self._device = batches, row_of, device
        self._first = 0
        self._ends = np.zeros(1, dtype=np.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positions (R,) of a step's tracked samples, ascending, and their rows there and on the host."""
        k = step - self._first
        if not 0 <= k < len(self._ends) - 1:
            self._place(step)
            k = 0
        start, stop = int(self._ends[k]), int(self._ends[k + 1])
        return self._positions[start:stop], self._rows[start:stop], self._on_host[start:stop]

    def _place(self, step: int) -> None:
        batches = self._batches[step : step + PLACED]
        rows = np.where(batches >= 0, self._row_of[batches], -1)
        steps, positions = np.nonzero(rows >= 0)
        self._first = step
        self._ends = np.searchsorted(steps, np.arange(len(batches) + 1))
        self._on_host = torch.from_numpy(rows[steps, positions])
        self._rows = self._on_host.to(self._device)
        self._positions = torch.from_numpy(positions).to(self._device)
        self._every = rows
        self._spread: Tensor | None = None

    def every(self, step: int, spare: int) -> Tensor:
        """Return the row of every member of a step's batch on the device, (B_t,), ``spare`` where it is not tracked."""
        if not 0 <= step - self._first < len(self._ends) - 1:
            self._place(step)
        if self._spread is None:
            rows = np.where(self._every < 0, spare, self._every)
            self._spread = torch.from_numpy(rows).to(self._device)
        return self._spread[step - self._first, : int((self._batches[step] >= 0).sum())]


PLACED = 1024
"""Steps whose indices are put on the device at once."""


class Sink(Protocol):
    """Takes the per-sample gradients of a replay, step after step.

    Attributes:
        engine: Gives the rows; its hooks are on the training's model.
    """

    engine: PerSampleGradients

    @abstractmethod
    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """Make ready for a step, at the weights it begins with.

        Args:
            step: Which.
            batch: Its batch.
            members: (R,) int64 on the host: the rows that are visited; maybe none. Those given with gradients are
                on the device.
        """

    def meet(self, step: int, moment: Callable[[], Moment], held: Sequence[HeldBatch]) -> None:
        """Look at a step that is about to be taken, before its rows come.

        Args:
            step: Its last batch.
            moment: Returns what is to be known of it.
            held: Its batches, where the sink is ``deferred``.
        """
        return

    @property
    def looks(self) -> bool:
        """Whether rows are worth nothing before ``meet``: those of several batches then come after it."""
        return False

    @property
    def deferred(self) -> bool:
        """Whether all rows must come after ``meet``, in passes of their own."""
        return False

    @property
    def rest(self) -> Rest | None:
        """What all rows together leave out of what training did; None: no law is known for the rows."""
        return None

    @abstractmethod
    def add(self, rows: Tensor, block: Tensor) -> None:
        """Take gradients (R, width) of some members ``rows`` (R,), maybe one twice; the block may be overwritten."""

    def add_factors(self, entry: int, rows: Tensor, d_R: Tensor, x_R: Tensor | None) -> None:
        """Take those of a factored entry, for all members; see ``TakeFactors``."""
        raise AssertionError(entry)

    def end_epoch(self) -> None:
        """Called when every sample has been visited once more."""
        return

    def told(self) -> dict[str, Any]:
        """Return what a manifest says of how the numbers were had."""
        return {"ways": self.engine.told()}


class RowSink(Sink, Protocol):
    """Keeps hypergradients: forward mode."""

    @abstractmethod
    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return rows as a (stop - start, D) array on the host."""


class ProductSink(Sink, Protocol):
    """Keeps products with targets: adjoint mode."""

    @abstractmethod
    def contributions(self) -> npt.NDArray[np.floating]:
        """Return the contributions of the tracked samples to each target, (Q, n)."""


S_co = TypeVar("S_co", bound=Sink, covariant=True)


class Replay(VerifiedReplay, Generic[S_co]):
    """Trains as recorded and hands what the tracked samples do to a sink; see ``VerifiedReplay``.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        tracked: Train indices, (n,).
        sink: Makes the sink from the training, the record and n.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        tracked: Rows,
        sink: Callable[[Training, Trajectory, int], S_co],
    ) -> None:
        super().__init__(training, trajectory, tracked)
        self.sink = sink(training, trajectory, len(tracked))
        self._placed = Placed(training.batches, self._row_of, training.device)
        self.graphs = graphs_of(training, self.sink)
        self._waits = False
        self._group: list[HeldBatch] = []
        training.before_update = self._meet

    def step(self, step: int, batch: Batch, rows: Rows) -> Tensor:
        """Train, and hand the gradients of the tracked members to the sink."""
        training = self.training
        if training.schedule.first[step] == step:
            self._waits = self.sink.deferred or (self.sink.looks and training.schedule.parts(step) > 1)
            self._group = []
        if self._waits:
            self._group.append(HeldBatch(step=step, batch=batch, rows=rows, kept=training.state_of_layers()))
            return training.step(step, batch)
        graphs = self.graphs
        if graphs is not None and graphs.why is None and graphs.sink.spare is not None:
            *_on_device, on_host = self._placed.at(step)
            if len(on_host):
                self.sink.begin(step, batch, on_host)
                every = self._placed.every(step, graphs.sink.spare)
                return graphs.take(step, batch, every, partial(self._plainly, step, batch))
        return self._plainly(step, batch)

    def _plainly(self, step: int, batch: Batch) -> Tensor:
        training = self.training
        watch = self._watch(step, batch)
        return training.step(step, batch) if watch is None else training.step(step, batch, watch)

    def _meet(self, step: int) -> None:
        self.sink.meet(step, self.training.moment, self._group)
        for held in self._group:
            watch = self._watch(held.step, held.batch)
            if watch is not None:
                self.training.again(held.step, held.batch, watch, held.kept)
        self._group = []

    def _watch(self, step: int, batch: Batch) -> Watch | None:
        """Begin a batch; return what its step needs to hand over the rows that are tracked, if any."""
        positions, members, on_host = self._placed.at(step)
        self.sink.begin(step, batch, on_host)
        if not len(members):
            return None

        def add(start: int, block: Tensor) -> None:
            self.sink.add(members[start : start + len(block)], block)

        def add_factors(entry: int, d_R: Tensor, x_R: Tensor | None) -> None:
            self.sink.add_factors(entry, members, d_R, x_R)

        return self.sink.engine.watch(positions, add, add_factors)

    def end_epoch(self) -> None:
        """Let the sink fold what it keeps by visit."""
        self.sink.end_epoch()

    def run(self, report: Report | None = None) -> Self:
        """Replay every step; raises as ``VerifiedReplay.replay``."""
        self.replay(report)
        return self

    def numpy(self: Replay[RowSink], start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows as a (stop - start, D) array on the host (forward mode)."""
        return self.sink.numpy(start, stop)

    def contributions(self: Replay[ProductSink]) -> npt.NDArray[np.floating]:
        """Return the contributions of the tracked samples to each target, (Q, n) (adjoint mode)."""
        return self.sink.contributions()

    def told(self) -> dict[str, Any]:
        """Return what a manifest says of how the numbers were had."""
        told = self.sink.told()
        if self.graphs is not None:
            told["ways"] = {**told["ways"], **self.graphs.told()}
        return told

    def close(self) -> None:
        """Take the hooks off the model."""
        self.sink.engine.close()


def share(training: Training, step: int) -> float:
    """Return N / B_t, B_t being the divisor of the step's losses."""
    return training.n_train / training.divisor(step)
