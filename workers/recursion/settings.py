"""What the optimiser used at every step of a record, arranged for the recursions.

U steps of the optimiser, T batches (more than U where several make a step), G parameter groups, L lanes, P
parameters. A lane is a parameter group as far as its parameters were stepped together: one whose first
gradient comes late, or that was left out of some steps, has a lane of its own. Without such parameters the
lanes are the groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...storage.trajectory import ParameterEntry, Trajectory

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Settings:
    """What the optimiser used at every step: arrays of shape (U, L).

    Attributes:
        learning_rate: So; and the next four (the momentum, dampening and nesterov of SGD alone).
        family: ``sgd`` or ``adam``.
        beta1: Of Adam; so the next two. None for others.
        beta2: So.
        eps: So.
        count: Steps that Adam had taken with the lane's parameters, this one included.
        decoupled: (L,) whether the decay leaves the gradient alone (AdamW).
        active: Whether the lane's parameters were stepped; None: all, always.
        clip_factor: (U,) what the gradient was multiplied with; None: not clipped.
        update_of: (T,) which step each batch belongs to; None: batch t is step t.
        begun: (L,) whether the lane's parameters had momentum before SGD's first step; None: none had.
        lane_of: (P,) the lane of each parameter, -1: not optimised; None: its group.
    """

    learning_rate: Float
    momentum: Float
    weight_decay: Float
    dampening: Float
    nesterov: Bool
    family: str = "sgd"
    beta1: Float | None = None
    beta2: Float | None = None
    eps: Float | None = None
    count: Integers | None = None
    decoupled: Bool | None = None
    active: Bool | None = None
    clip_factor: Float | None = None
    update_of: Integers | None = None
    begun: Bool | None = None
    lane_of: Integers | None = None

    def updates_before(self, steps: Integers) -> Integers:
        """Return how many steps of the optimiser were done after so many batches, at borders between steps."""
        if self.update_of is None:
            return steps
        return np.append(self.update_of, len(self.learning_rate))[steps]

    def update(self, step: int) -> int:
        """Return which step of the optimiser the batch ``step`` belongs to."""
        return step if self.update_of is None else int(self.update_of[step])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recorded:
    """The part of a ``Trajectory`` that says what the optimiser did; see there."""

    parameters: Sequence[ParameterEntry]
    batches: npt.NDArray[np.int32]
    optimizer: Mapping[str, Any]
    learning_rate: Float
    momentum: Float
    weight_decay: Float
    dampening: Float
    nesterov: Bool
    beta1: Float | None = None
    beta2: Float | None = None
    eps: Float | None = None
    updates: Bool | None = None
    active: Bool | None = None
    clip_norm: Float | None = None
    clip_factor: Float | None = None
    divisor: Float | None = None


def recorded_settings(trajectory: Trajectory | Recorded) -> Settings:
    """Return the optimiser settings of a record."""
    steps = len(trajectory.batches)
    ends = np.arange(steps) if trajectory.updates is None else np.flatnonzero(trajectory.updates)
    update_of = None if trajectory.updates is None else np.searchsorted(ends, np.arange(steps))
    noted = trajectory.optimizer
    before = np.asarray(noted.get("count", np.zeros(len(trajectory.parameters))), dtype=np.int64)
    begun = np.asarray(noted.get("begun", np.zeros(len(trajectory.parameters))), dtype=bool)
    group_of, lane_of, active = _lanes(trajectory, ends, before, begun)

    def of(name: str) -> npt.NDArray[np.float64] | None:
        values = getattr(trajectory, name)
        return None if values is None else values[ends][:, group_of]

    count = None
    if trajectory.beta1 is not None:
        taken = np.ones((len(ends), len(group_of)), dtype=bool) if active is None else active
        first = np.zeros(len(group_of), dtype=np.int64)
        for p, lane in enumerate(lane_of):
            if lane >= 0:
                first[lane] = before[p]
        count = first + np.cumsum(taken, axis=0)
    began = np.zeros(len(group_of), dtype=bool)
    began[lane_of[lane_of >= 0]] = begun[lane_of >= 0]
    decoupled = noted.get("decoupled")
    clip = None if trajectory.clip_factor is None else trajectory.clip_factor[ends]
    same = active is None and np.array_equal(group_of, np.arange(trajectory.learning_rate.shape[1]))
    kept = {name: of(name) for name in ("learning_rate", "momentum", "weight_decay", "dampening", "nesterov")}
    return Settings(
        **kept,  # type: ignore[arg-type]
        family=str(noted["family"]),
        beta1=of("beta1"),
        beta2=of("beta2"),
        eps=of("eps"),
        count=count,
        decoupled=None if decoupled is None else np.asarray(decoupled, dtype=bool)[group_of],
        active=active,
        clip_factor=clip,
        update_of=update_of,
        begun=began if began.any() else None,
        lane_of=None if same else lane_of,
    )


def _lanes(
    trajectory: Trajectory | Recorded, ends: Integers, before: Integers, begun: Bool
) -> tuple[Integers, Integers, Bool | None]:
    """Return the group of each lane (L,), the lane of each parameter (P,), and which were stepped (U, L)."""
    groups = np.array([entry.group for entry in trajectory.parameters], dtype=np.int64)
    count = trajectory.learning_rate.shape[1]
    alike = len({*zip(before[groups >= 0].tolist(), begun[groups >= 0].tolist(), strict=True)}) <= 1
    if trajectory.active is None and alike:
        return np.arange(count), groups, None
    taken = np.ones((len(ends), len(groups)), dtype=bool)
    if trajectory.active is not None:
        taken = trajectory.active[ends]
    found: dict[tuple[int, int, bool, bytes], int] = {}
    lane_of = np.full(len(groups), -1, dtype=np.int64)
    for p, group in enumerate(groups):
        if group >= 0:
            key = (int(group), int(before[p]), bool(begun[p]), taken[:, p].tobytes())
            lane_of[p] = found.setdefault(key, len(found))
    group_of = np.array([group for group, *_rest in found], dtype=np.int64)
    active = np.stack([np.frombuffer(key, dtype=bool) for *_rest, key in found], axis=1)
    return group_of, lane_of, active
