"""The record as if training had ended earlier, and the training that stands there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ...storage.trajectory import Checkpoint, Trajectory
from ...storage.trajectory_format import PER_STEP, SOMETIMES
from ..model.state import pack_buffers
from ..recursion.coefficients import stored_coefficients
from .training import Training
from .verified import VerifiedReplay


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EndedTrajectory(Trajectory):
    """A record cut off after some epochs; ``last`` stands where the final checkpoint was."""

    last: Checkpoint

    def checkpoint(self, k: int) -> Checkpoint:
        """Return checkpoint ``k`` of those before the end, and the end itself as the last one."""
        count = len(self.checkpoint_steps)
        if k in (-1, count - 1):
            return self.last
        # Not super(): this file's dataclass decorator replaces the class.
        return Trajectory.checkpoint(self, k)


def ended_at(trajectory: Trajectory, epoch: int, last: Checkpoint) -> EndedTrajectory:
    """Return the record as if training had ended after ``epoch`` epochs.

    Args:
        trajectory: The record.
        epoch: 1 to its number of epochs.
        last: Where training stood then.
    """
    stop = last.step
    rows = {name: getattr(trajectory, name) for name in (*PER_STEP, *SOMETIMES)}
    steps = {name: values[:stop] for name, values in rows.items() if values is not None}
    early = trajectory.checkpoint_steps[trajectory.checkpoint_steps < stop]
    known = trajectory.digest_step <= stop
    changes: dict[str, Any] = {
        **steps,
        "digest_step": trajectory.digest_step[known],
        "digest": trajectory.digest[known],
        "epoch_digest": trajectory.epoch_digest[:epoch],
        "checkpoint_steps": np.append(early, stop),
        "epochs": {name: values[:epoch] for name, values in trajectory.epochs.items()},
        "attrs": {**trajectory.attrs, "epochs": epoch, "epoch_ends": trajectory.epoch_ends[:epoch]},
    }
    kept = {field.name: getattr(trajectory, field.name) for field in fields(Trajectory)} | changes
    ended = EndedTrajectory(**kept, last=last)
    return replace(ended, coefficient=stored_coefficients(ended))


def standing(training: Training, step: int) -> Checkpoint:
    """Return where a training stands after ``step`` steps."""
    return Checkpoint(
        step=step,
        weights=training.weights().cpu().numpy(),
        buffers=pack_buffers(training.model),
        **training.optimizer_state().stored(),
    )


def trained_until(training: Training, trajectory: Trajectory, epoch: int) -> EndedTrajectory:
    """Bring a fresh training to the end of an epoch, from the nearest checkpoint, and return the record so far.

    Raises:
        ReplayDiverged: It does not come to the recorded weights.
    """
    stop = training.epoch_ends[epoch - 1]
    replay = VerifiedReplay(training, trajectory, np.empty(0, dtype=np.int64))
    replay.start_at(int(np.searchsorted(trajectory.checkpoint_steps, stop, side="right")) - 1)
    replay.advance(stop)
    replay.verify_epoch(epoch)
    return ended_at(trajectory, epoch, standing(training, stop))


def with_decay(trajectory: Trajectory, factor: float) -> Trajectory:
    """Return a record whose weight decay is ``factor`` times the optimiser's: for recursions, not for training."""
    changes: Mapping[str, Any] = {"weight_decay": trajectory.weight_decay * factor}
    changed = replace(trajectory, **changes)
    return replace(changed, coefficient=stored_coefficients(changed))
