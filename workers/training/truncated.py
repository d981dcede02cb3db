"""The record as if training had ended earlier, and the training that stands there."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ...storage.trajectory import Checkpoint, Trajectory, TrajectoryWriter
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
        "borders": tuple(step for step in trajectory.borders if step < stop),
        "epochs": {name: values[:epoch] for name, values in trajectory.epochs.items()},
        "attrs": {**trajectory.attrs, "epochs": epoch, "epoch_ends": trajectory.epoch_ends[:epoch]},
    }
    kept = {field.name: getattr(trajectory, field.name) for field in fields(Trajectory)} | changes
    ended = EndedTrajectory(**kept, last=last)
    return replace(ended, coefficient=stored_coefficients(ended))


def ended_at_checkpoint(trajectory: Trajectory, k: int) -> EndedTrajectory:
    """Return the record as if training had ended at its checkpoint ``k``, in the middle of an epoch or at its end."""
    last = trajectory.checkpoint(k)
    whole = [end for end in trajectory.epoch_ends if end <= last.step]
    ended = ended_at(trajectory, len(whole), last)
    if last.step not in ended.digest_step:
        crc = np.uint32(zlib.crc32(np.ascontiguousarray(last.weights).tobytes()))
        ended = replace(
            ended,
            digest_step=np.append(ended.digest_step, last.step),
            digest=np.append(ended.digest, crc),
        )
    if whole and whole[-1] == last.step:
        return ended
    # An epoch that was begun: as ``Training.state_digest``, and no losses at its end.
    state = hashlib.sha256(np.ascontiguousarray(last.weights).tobytes() + last.buffers).hexdigest()
    ends = [*whole, last.step]
    return replace(
        ended,
        epoch_digest=[*ended.epoch_digest, state],
        epochs={name: np.append(values, np.nan) for name, values in ended.epochs.items()},
        attrs={**ended.attrs, "epochs": len(ends), "epoch_ends": ends},
    )


def write_ended(ended: EndedTrajectory, uri: str) -> None:
    """Write a record that was cut off as one of its own, without visits."""
    with TrajectoryWriter(
        uri,
        dimension=len(ended.last.weights),
        dtype=str(ended.last.weights.dtype),
        checkpoint_steps=ended.checkpoint_steps.tolist(),
        buffer_bytes=len(ended.last.buffers),
        parameter_count=len(ended.parameters),
        moments=ended.last.second_moment is not None,
    ) as writer:
        for k in range(len(ended.checkpoint_steps)):
            kept = ended.checkpoint(k)
            writer.write_checkpoint(k, **{one.name: getattr(kept, one.name) for one in fields(Checkpoint)})
        rows = (
            "batches",
            "coefficient",
            "loss",
            "learning_rate",
            "momentum",
            "weight_decay",
            "dampening",
            "nesterov",
        )
        own = (*rows, "digest_step", "digest", "epoch_digest", "parameters", "epochs", "noisy")
        sometimes = {name: getattr(ended, name) for name in SOMETIMES}
        attrs = {name: value for name, value in ended.attrs.items() if name not in ("dimension", "dtype")}
        writer.finish(
            **{name: getattr(ended, name) for name in own},
            sometimes={name: value for name, value in sometimes.items() if value is not None},
            attrs=attrs,
        )


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
