"""The replay loop: the recorded training run again, checked against the record as it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.errors import ReplayDiverged
from ...storage.trajectory import Checkpoint, Trajectory
from ..determinism import fingerprint, fingerprint_differences
from ..model.state import pack_buffers
from ..recipe import Batch
from .optimizer_state import OptimizerState
from .training import Training

Report = Callable[[int, int], None]
Rows = npt.NDArray[np.int64]


_checked = {"digests": 0}


def digests_checked() -> int:
    """Return how many digests of weights this process has compared with a record's so far."""
    return _checked["digests"]


class VerifiedReplay:
    """Runs every recorded step; what is collected on the way is the subclass's business.

    Losses that are no numbers end a replay. On a CPU each is looked at after its step (``at_once``); on an
    accelerator that would make the host wait at every step, so they are looked at where it waits anyway:
    before weights are compared, at the end of an epoch and of an ``advance``.

    Args:
        training: A fresh ``Training`` of the recipe that was recorded.
        trajectory: The record.
        tracked: Global train indices, distinct; a sample's place in it is its row.

    Raises:
        ReplayDiverged: The batch order or the initial weights are not the recorded ones.
    """

    def __init__(self, training: Training, trajectory: Trajectory, tracked: Rows) -> None:
        self.training, self.trajectory, self.tracked = training, trajectory, tracked
        if training.family.name != trajectory.optimizer["family"]:
            raise ReplayDiverged(
                self._message(
                    f"the optimizer is {type(training.optimizer).__name__}, recorded {trajectory.optimizer['class']}",
                    0,
                )
            )
        self._settings = {name: getattr(trajectory, name) for name in training.family.settings}
        if trajectory.divisor is not None:
            training.divisors = trajectory.divisor
        self._digests = dict(zip(trajectory.digest_step.tolist(), trajectory.digest.tolist(), strict=True))
        self._row_of = np.full(training.n_train, -1, dtype=np.int64)
        self._row_of[tracked] = np.arange(len(tracked))
        self.at_once = training.device.type == "cpu"
        self.done = 0
        self._losses: list[tuple[int, Tensor, Tensor]] = []  # step, batch loss, own losses: not yet looked at
        if not np.array_equal(training.batches, trajectory.batches):
            raise ReplayDiverged(self._message("the batch order differs from the record", 0))
        self.verify(0)

    def replay(self, report: Report | None = None) -> None:
        """Replay every step.

        Raises:
            ReplayDiverged: Weights differ from the record: names the step, both digests and what
                differs between the two environments.
            NonFiniteLoss: A batch loss is NaN or infinite.
        """
        self.advance(self.training.steps, report)

    def advance(self, stop: int, report: Report | None = None) -> None:
        """Replay from where this stands until ``stop`` steps are done; raises as ``replay``."""
        training = self.training
        for step, batch in enumerate(training.loader(self.done, stop), start=self.done):
            training.apply_settings(self._settings, step)
            try:
                loss = self.step(step, batch, self.rows(step))
            except Exception:
                if self._losses:  # one that is no number is the reason, and not what came of it
                    self._check_losses()
                raise
            self._losses.append((step, loss, training.own_losses))
            self.done = step + 1
            ends = self.done in training.epoch_ends
            if self.at_once or ends or self.done in self._digests or self.done == stop:
                self._check_losses()
            if self.done in self._digests:
                self.verify(self.done)
            if ends:
                self.end_epoch()
            if report:
                report(self.done, training.steps)
        if self.done == training.steps:
            self.verify_epoch(training.epochs)

    def start_at(self, k: int) -> None:
        """Stand at checkpoint ``k`` of the record instead of at the initial weights."""
        self.stand(self.trajectory.checkpoint(k))

    def segment(self, first: int, stop: int, report: Report | None = None) -> None:
        """Replay the steps from ``first`` to ``stop`` alone, two of the steps whose state the record kept.

        What the segments of a training come to is that of one replay because each ends where the next begins.

        Args:
            first: First step.
            stop: One past the last.
            report: Told of (steps done of these, how many there are).

        Raises:
            ReplayDiverged: As ``replay``; or the state at the end is not the one that was kept.
            NonFiniteLoss: A batch loss is NaN or infinite.
        """

        def told(done: int, _steps: int) -> None:
            if report:
                report(done - first, stop - first)

        if first:
            self.stand(self.trajectory.at(first))
        self.advance(stop, told)
        if stop < self.training.steps:
            self.verify_state(self.trajectory.at(stop))

    def stand(self, kept: Checkpoint) -> None:
        """Stand at a state of the record."""
        self.training.load_weights(kept.weights, kept.buffers)
        self.training.load_optimizer(OptimizerState.of(kept))
        self.done = kept.step

    def train_as(self, trajectory: Trajectory) -> None:
        """Train with another record's settings; what is collected keeps those this was made with."""
        self._settings = {name: getattr(trajectory, name) for name in self._settings}

    def rows(self, step: int) -> Rows:
        """Return the row of every member of a step's batch, -1 where it is not tracked, (B_t,)."""
        members = self.training.batches[step]
        rows: Rows = self._row_of[members[members >= 0]]
        return rows

    def step(self, step: int, batch: Batch, rows: Rows) -> Tensor:
        """Take one training step, and from it what is to be collected; return the batch loss, a scalar."""
        return self.training.step(step, batch)

    def end_epoch(self) -> None:
        """Called after the last step of every epoch."""

    def _check_losses(self) -> None:
        """Raise NonFiniteLoss for the first loss since the last look that is NaN or infinite."""
        waiting, self._losses = self._losses, []
        if bool(torch.isfinite(torch.stack([loss for _step, loss, _own in waiting])).all()):
            return
        for step, loss, own in waiting:
            self.training.check_finite(step, float(loss), own)

    def verify(self, step: int) -> None:
        """Compare the weights with the digest recorded after ``step`` steps."""
        expected = self._digests[step]
        found = self.training.weight_checksum()
        _checked["digests"] += 1
        if found != expected:
            raise ReplayDiverged(
                self._message(
                    f"weights after {step} steps have crc32 {found:08x}, recorded {expected:08x}", step
                )
            )

    def verify_state(self, kept: Checkpoint) -> None:
        """Compare weights, the optimiser's state and buffers with a state of the record, to the last bit."""
        state = self.training.optimizer_state().stored()
        found = {"weights": self.training.weights().cpu().numpy(), **state}
        other = [name for name, value in found.items() if not same_bytes(value, getattr(kept, name))]
        if pack_buffers(self.training.model) != kept.buffers:
            other.append("buffers")
        _checked["digests"] += 1
        if other:
            raise ReplayDiverged(
                self._message(
                    f"{' and '.join(other)} after {kept.step} steps are not those of the checkpoint, with which the next "
                    "segment begins",
                    kept.step,
                )
            )

    def verify_epoch(self, epoch: int) -> None:
        """Compare weights and buffers with the digest recorded after ``epoch`` epochs."""
        expected = self.trajectory.epoch_digest[epoch - 1]
        found = self.training.state_digest()
        _checked["digests"] += 1
        if found != expected:
            raise ReplayDiverged(
                self._message(
                    f"weights and buffers after epoch {epoch} have sha256 {found[:16]}…, "
                    f"recorded {expected[:16]}…",
                    self.training.epoch_ends[epoch - 1],
                )
            )

    def _message(self, what: str, step: int) -> str:
        here = fingerprint(self.training.device)
        recorded = self.trajectory.attrs.get("environment", {})
        return f"replay diverged at step {step}: {what}; {fingerprint_differences(recorded, here)}"


def same_bytes(value: npt.NDArray[Any], kept: npt.NDArray[Any]) -> bool:
    """Whether two arrays are of one type and hold the same bits."""
    return value.dtype == kept.dtype and value.tobytes() == kept.tobytes()
