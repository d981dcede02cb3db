"""A recipe beside the record of a loop of the user's own: what the record knows, the recipe need not say.

The record of such a loop (``loop``) holds the batches, the optimiser with its options and its parameters by
name, what settings each step used, and the first weights. A replay, and whatever else builds a training, gets a
copy of the recipe in which these stand in the place of the recipe's own.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ...storage.arrays import Source
from ...storage.errors import RecipeError
from ...storage.files import read_bytes
from ...storage.trajectory import Checkpoint, ParameterEntry, Trajectory, open_trajectory
from ...storage.trajectory_format import LOOP
from ..data.cast import raw_bytes
from ..data.schedule import RecordedBatches, Schedule
from ..model.layout import load_flat
from ..model.state import load_buffers, pack_buffers
from ..recipe import Recipe
from ..recursion.families import family_named
from .optimizer_state import OptimizerState, put_state, told_of


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoopRecord:
    """What a record of a loop says of its training.

    Attributes:
        schedule: The batches.
        settings: (T, G) each, by name.
        optimizer: See ``Trajectory.optimizer``; with ``options``, those of each group.
        parameters: What trains, in flattening order.
        frozen: Digest of the parameters that do not.
        seed: Keys the generators.
        start: Gives what it began with.
    """

    schedule: Schedule
    settings: Mapping[str, npt.NDArray[Any]]
    optimizer: Mapping[str, Any]
    parameters: Sequence[ParameterEntry]
    frozen: str
    seed: int
    start: Callable[[], Checkpoint]


def loop_record(uri: str, source: Source = read_bytes) -> LoopRecord | None:
    """Return what a trajectory, read by ``source``, says of a loop; None: it is the record of a recipe.

    Raises:
        IncompleteStage: There is no trajectory.
        CorruptStore: It is damaged.
    """
    trajectory = open_trajectory(uri, source)
    if trajectory.attrs.get("recorded") != LOOP:
        return None

    return LoopRecord(
        schedule=_schedule(trajectory),
        settings={
            name: getattr(trajectory, name) for name in family_named(trajectory.optimizer["family"]).settings
        },
        optimizer=trajectory.optimizer,
        parameters=trajectory.parameters,
        frozen=str(trajectory.attrs["frozen"]),
        seed=int(trajectory.attrs["seed"]),
        start=lambda: open_trajectory(uri, source).checkpoint(0),
    )


def _schedule(trajectory: Trajectory) -> Schedule:
    batches, steps = trajectory.batches, len(trajectory.batches)
    updates = np.ones(steps, dtype=bool) if trajectory.updates is None else trajectory.updates
    sizes = (batches >= 0).sum(1)
    weighted = bool(trajectory.attrs.get("weighted", False))
    divisor = sizes.astype(np.float64) if trajectory.divisor is None else trajectory.divisor
    return schedule_of_batches(
        batches,
        updates,
        tuple(trajectory.epoch_ends),
        RecordedBatches(
            n_train=int(trajectory.attrs["n_train"]),
            parts=None if weighted else (divisor / sizes).round().astype(np.int64),
            divisors=divisor if weighted else None,
        ),
    )


def schedule_of_batches(
    batches: npt.NDArray[np.int32],
    updates: npt.NDArray[np.bool_],
    epoch_ends: tuple[int, ...],
    recorded: RecordedBatches,
) -> Schedule:
    """Return the schedule of a loop.

    Args:
        batches: (T, B), padded with -1.
        updates: (T,) whether the optimiser stepped after a batch; the last is True.
        epoch_ends: Batches done at the end of each epoch.
        recorded: What its losses were divided by.
    """
    ends = np.flatnonzero(updates)
    last = ends[np.searchsorted(ends, np.arange(len(batches)))]
    first = np.concatenate([[0], ends[:-1] + 1])[np.searchsorted(ends, np.arange(len(batches)))]
    distinct, begun = True, 0
    for end in epoch_ends:
        seen = batches[begun:end][batches[begun:end] >= 0]
        distinct = distinct and len(seen) == recorded.n_train == len(np.unique(seen))
        begun = end
    return Schedule(
        batches=batches,
        epoch_ends=epoch_ends,
        first=first.astype(np.int64),
        last=last.astype(np.int64),
        distinct=distinct,
        recorded=recorded,
    )


def is_recorded(recipe: Recipe) -> bool:
    """Whether a recipe stands beside the record of a loop."""
    return recipe._schedule is not None


def recorded_recipe(recipe: Recipe, record: LoopRecord) -> Recipe:
    """Return a recipe like ``recipe`` that trains as the loop did: picklable, like the recipe."""
    other, own_model = copy.copy(recipe), recipe.model

    def model() -> nn.Module:
        made = own_model()
        _begin_as(made, record)
        return made

    other._schedule = record.schedule
    other.model = model  # type: ignore[method-assign]
    other.optimizer = lambda model: rebuilt_optimizer(model, record)  # type: ignore[method-assign]
    other.scheduler = lambda optimizer: RecordedSettings(optimizer, record)  # type: ignore[method-assign]
    other.initial_state = lambda: None  # type: ignore[method-assign]  # the record has the first weights
    other.scheduler_interval = "step"
    other.clip_grad_norm = record.optimizer.get("clip_grad_norm")
    other.seed = record.seed
    other.epochs = len(record.schedule.epoch_ends)
    other.batch_size = record.schedule.batches.shape[1]
    other.accumulate, other.max_steps = 1, None  # the schedule says it
    return other


def _begin_as(model: nn.Module, record: LoopRecord) -> None:
    """Give a model the first weights and buffers of the loop's.

    Raises:
        RecipeError: It is another model.
    """
    own, wanted = dict(model.named_parameters()), {e.name: e.shape for e in record.parameters}
    for name, shape in wanted.items():
        if name not in own or tuple(own[name].shape) != tuple(shape):
            found = f"of shape {tuple(own[name].shape)}" if name in own else "missing"
            raise RecipeError(
                f"parameter {name!r} of shape {tuple(shape)} was trained by the loop and is {found} in the recipe's model(); "
                "return the loop's model there"
            )
    for name, parameter in own.items():
        parameter.requires_grad_(name in wanted)
    if [name for name in own if name in wanted] != list(wanted):
        raise RecipeError(
            "the recipe's model() has its parameters in another order than the loop's model; build it the same way"
        )
    start = record.start()
    if len(pack_buffers(model)) != len(start.buffers):
        raise RecipeError(
            f"the recipe's model() has {len(pack_buffers(model))} bytes of buffers and the loop's model {len(start.buffers)}; "
            "return the loop's model there"
        )
    if digest_of_frozen(model) != record.frozen:
        raise RecipeError(
            "frozen parameters of the recipe's model() are not the loop's, and no record holds them; load them in model()"
        )
    load_flat([own[name] for name in wanted], torch.from_numpy(np.ascontiguousarray(start.weights)))
    load_buffers(model, start.buffers)


def digest_of_frozen(model: nn.Module) -> str:
    """Return the sha256 of the parameters that need no gradient."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(raw_bytes(parameter))
    return digest.hexdigest()


def loop_notes(optimizer: torch.optim.Optimizer, max_norm: float | None) -> dict[str, Any]:
    """Return what a loop's record notes of its optimiser: enough to build it again."""
    plain = (bool, int, float, str, type(None))
    options = [
        {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in group.items()
            if key != "params"
            and (
                isinstance(value, plain)
                or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value))
            )
        }
        for group in optimizer.param_groups
    ]
    return {**told_of(optimizer, max_norm), "options": options}


def rebuilt_optimizer(model: nn.Module, record: LoopRecord) -> torch.optim.Optimizer:
    """Return an optimiser of the loop's class, options and groups, over the parameters of the same names."""
    own = dict(model.named_parameters())
    groups = []
    for g, options in enumerate(record.optimizer["options"]):
        held = [own[entry.name] for entry in record.parameters if entry.group == g]
        groups.append(
            {
                "params": held,
                **{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()},
            }
        )
    kind = getattr(torch.optim, record.optimizer["class"])
    fused = record.optimizer["options"][0].get("fused")
    made: torch.optim.Optimizer = kind(groups, lr=float(record.settings["learning_rate"][0, 0]), fused=fused)
    _apply(made, record, 0)
    if "begun" in record.optimizer or "count" in record.optimizer:
        parameters = [own[entry.name] for entry in record.parameters]
        put_state(
            made, family_named(record.optimizer["family"]), parameters, OptimizerState.of(record.start())
        )
    return made


def _apply(optimizer: torch.optim.Optimizer, record: LoopRecord, step: int) -> None:
    family = family_named(record.optimizer["family"])
    for g, group in enumerate(optimizer.param_groups):
        family.apply(group, {name: record.settings[name][step, g] for name in family.settings})


class RecordedSettings:
    """A scheduler that gives an optimiser the settings that the loop's had at each step.

    Args:
        optimizer: The optimiser, with those of the first.
        record: Of the loop.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, record: LoopRecord) -> None:
        self.optimizer, self.record = optimizer, record
        self._ends = np.flatnonzero(record.schedule.updates)
        self._taken = 0

    def step(self) -> None:
        """Move on to the next step of the optimiser."""
        self._taken = min(self._taken + 1, len(self._ends) - 1)
        _apply(self.optimizer, self.record, int(self._ends[self._taken]))
