"""Which samples each batch of a training holds, and which batches make a step of the optimiser.

T batches, B samples of the widest, E epochs, N training samples.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import psutil
import torch

from ...storage.errors import RecipeError
from ..determinism import derived_seed
from .user_code import user_code

Indices = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]


class ScheduledRecipe(Protocol):
    """The part of a recipe that orders training; see ``Recipe``."""

    epochs: int
    batch_size: int
    seed: int
    accumulate: int
    max_steps: int | None
    _schedule: Schedule | None

    def order(self, epoch: int, generator: torch.Generator) -> Sequence[int] | torch.Tensor | None:
        """Return the training indices of an epoch."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RecordedBatches:
    """What a loop that is not ours divided its losses by.

    Attributes:
        n_train: N, which the batches are indices of.
        parts: (T,) what the mean of each batch was divided by; None: ``divisors`` hold.
        divisors: (T,) what the sum of each batch's losses was divided by; None: ``parts`` hold.
    """

    n_train: int
    parts: Integers | None = None
    divisors: npt.NDArray[np.float64] | None = None

    def until(self, stop: int) -> RecordedBatches:
        """Return those of the first ``stop`` batches."""
        return replace(
            self,
            parts=None if self.parts is None else self.parts[:stop],
            divisors=None if self.divisors is None else self.divisors[:stop],
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Schedule:
    """The batches of a training.

    Attributes:
        batches: (T, B) int32, training indices, padded with -1.
        epoch_ends: (E,) how many batches are done at the end of each epoch.
        first: (T,) the first batch of the optimiser's step that a batch belongs to.
        last: (T,) the last one.
        distinct: Whether every epoch holds each of the N samples once.
        recorded: Of a loop that is not ours (``training.recorded``); None: drawn by the recipe.
    """

    batches: Indices
    epoch_ends: tuple[int, ...]
    first: Integers
    last: Integers
    distinct: bool
    recorded: RecordedBatches | None = None

    @property
    def updates(self) -> npt.NDArray[np.bool_]:
        """(T,) whether the optimiser steps after a batch."""
        found: npt.NDArray[np.bool_] = self.last == np.arange(len(self.last))
        return found

    @property
    def accumulates(self) -> bool:
        """Whether several batches make a step anywhere."""
        return bool((self.first != self.last).any())

    def until(self, stop: int) -> Schedule:
        """Return the schedule of a training that ended after ``stop`` batches, between two steps of the optimiser."""
        ends = tuple(end for end in self.epoch_ends if end < stop)
        return replace(
            self,
            batches=self.batches[:stop],
            epoch_ends=(*ends, stop),
            first=self.first[:stop],
            last=self.last[:stop],
            distinct=self.distinct and stop in self.epoch_ends,
            recorded=None if self.recorded is None else self.recorded.until(stop),
        )

    def parts(self, step: int) -> int:
        """Return what the mean of a batch is divided by: how many batches make its step of the optimiser."""
        if self.recorded is not None and self.recorded.parts is not None:
            return int(self.recorded.parts[step])
        return int(self.last[step] - self.first[step]) + 1


def schedule_of(recipe: ScheduledRecipe, n_train: int) -> Schedule:
    """Return the batches of a recipe's training.

    Each epoch is a permutation of the N samples drawn from (seed, epoch), or what ``Recipe.order`` returns, cut
    into batches of ``batch_size``; the last one is smaller where they do not go up. ``accumulate`` batches make
    a step; what is left at the end of an epoch makes a smaller one. ``max_steps`` counts steps of the optimiser
    and stands in for ``epochs``.

    Raises:
        RecipeError: A number is out of its range, or ``order`` returned no indices.
    """
    if recipe._schedule is not None:
        return _of_record(recipe._schedule, n_train)
    size, parts = _whole("batch_size", recipe.batch_size), _whole("accumulate", recipe.accumulate)
    epochs = _whole("epochs", recipe.epochs, least=0)  # 0: trained already, see `StateFile`
    limit = None if recipe.max_steps is None else _whole("max_steps", recipe.max_steps)
    blocks: list[Indices] = [np.full((0, size), -1, dtype=np.int32)]
    first: list[Integers] = []
    last: list[Integers] = []
    ends: list[int] = []
    epoch, batches, updates, distinct = 0, 0, 0, True
    while epoch < epochs if limit is None else updates < limit:
        order = epoch_order(recipe, n_train, epoch)
        block = np.full((-(-len(order) // size), size), -1, dtype=np.int32)
        block.reshape(-1)[: len(order)] = order
        if epoch == 0:
            _check_room(len(block) * epochs if limit is None else limit * parts, size)
        steps = -(-len(block) // parts)
        distinct = distinct and len(order) == n_train and bool(np.bincount(order).max() == 1)
        if limit is not None and updates + steps > limit:
            steps, distinct = limit - updates, False
            block = block[: steps * parts]
        at = np.arange(len(block))
        begins = at - at % parts
        first.append(batches + begins)
        last.append(batches + np.minimum(begins + parts, len(block)) - 1)
        blocks.append(block)
        batches, updates, epoch = batches + len(block), updates + steps, epoch + 1
        ends.append(batches)
    none = np.zeros(0, dtype=np.int64)
    return Schedule(
        batches=np.concatenate(blocks),
        epoch_ends=tuple(ends),
        first=np.concatenate([none, *first]),
        last=np.concatenate([none, *last]),
        distinct=distinct,
    )


def _check_room(batches: int, size: int) -> None:
    """Raise where the indices alone would fill the memory."""
    needed, most = 4 * batches * size, psutil.virtual_memory().total // 2
    if needed > most:
        raise RecipeError(
            f"{batches:,} batches of {size} samples are {needed / 2**30:,.1f} GiB of training indices, and {most / 2**30:,.1f} "
            "GiB (half of this machine's memory) are the most; train for fewer epochs or steps"
        )


def _of_record(schedule: Schedule, n_train: int) -> Schedule:
    assert schedule.recorded is not None
    if schedule.recorded.n_train != n_train:
        raise RecipeError(
            f"a loop's batches were recorded of {schedule.recorded.n_train} training samples and this training set has {n_train}; give the "
            "recipe that of the loop (to train on other samples, as the way subset does, is the loop's to do: use rescaled)"
        )
    return schedule


def _whole(name: str, value: object, least: int = 1) -> int:
    try:
        found = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = -1
    if found < least:
        raise RecipeError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return found


def padded(rows: Iterable[npt.NDArray[np.integer]], size: int) -> Indices:
    """Return batches of at most ``size`` samples as one array (T, B), padded with -1."""
    rows = list(rows)
    batches = np.full((len(rows), size), -1, dtype=np.int32)
    for t, row in enumerate(rows):
        batches[t, : len(row)] = row
    return batches


def epoch_order(recipe: ScheduledRecipe, n_train: int, epoch: int) -> Indices:
    """Return the training samples of an epoch in their order.

    Raises:
        RecipeError: ``order`` raised or returned something else.
    """
    generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "order", epoch))
    with user_code(f"order({epoch}, generator) raised", always=True):
        found = recipe.order(epoch, generator)
    if found is None:
        return torch.randperm(n_train, generator=generator).numpy().astype(np.int32)
    values = np.asarray(found if not isinstance(found, torch.Tensor) else found.cpu().numpy())
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu":
        raise RecipeError(
            f"order() returned {values.dtype} of shape {values.shape} for epoch {epoch}; it must return a flat list of one or "
            "more training indices, or None for a permutation"
        )
    wrong = values[(values < 0) | (values >= n_train)]
    if len(wrong):
        raise RecipeError(
            f"order() returned the index {wrong[0]} for epoch {epoch}; training indices go from 0 to {n_train - 1}"
        )
    return values.astype(np.int32)
