"""Whether the fast way to Hessian products is right for a recipe, found out by trying.

``TangentTile`` rests on rules for forward-mode derivatives, double backward and batching of every
operation of the model. None is believed before it agreed: once, when a replay begins, a copy of the
model with slightly moved weights runs a few samples both ways. Where they differ, or the fast way
raises, all steps go one direction at a time through ``SecondOrder``. The choice follows from the
recipe alone and holds for the whole replay, or bits would depend on who computes.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor

from .data import fetch, to_device
from .persample.probe import TOLERANCE, copied
from .recipe import Batch
from .replay import PROBE_SAMPLES
from .second_order import SecondOrder, TangentTile
from .training import Training

logger = logging.getLogger(__name__)

MOVED = 0.05
"""How far the probe moves the weights, in standard normals: what is zero in a fresh model hides terms."""

SMALL = 1e-4
"""Share of the largest entry of H v below which a parameter's own scale is not used."""


def disagreement(training: Training) -> str | None:
    """Return why the fast way is not to be believed for this recipe, or None.

    A copy of the model is tried on a few samples, in float64 where it can be.

    Raises:
        RecipeError: The model cannot be copied.
    """
    for dtype in (torch.float64, torch.float32):
        trial = _trial(training, dtype)
        batch = first_samples(trial, 0, PROBE_SAMPLES)
        try:
            right = _both(SecondOrder(trial, 0, batch), trial)
        except RuntimeError as error:
            if dtype == torch.float32:
                raise
            logger.debug("probe in float64 failed, trying float32: %s", error)
            continue
        try:
            tried = _both(TangentTile(trial, 0, batch), trial)
        except Exception as error:  # noqa: BLE001 - whatever torch.func cannot do, SecondOrder can
            return f"torch.func fails: {one_line(error)}"
        return _difference(trial, tried, right, TOLERANCE[dtype])
    raise AssertionError("unreachable")


def _trial(training: Training, dtype: torch.dtype) -> Training:
    """Return a training of a copy of the model, its weights moved, whose first step has few samples."""
    trial = copy.copy(training)
    trial.model, trial.dtype = copied(training.model).to(dtype), dtype
    trial.parameters = training.layout.parameters(trial.model)
    trial.batches = training.batches[:1, :PROBE_SAMPLES]
    with torch.no_grad():
        move = MOVED * _random((training.layout.dimension,), trial, 2)
        parts = move.split([parameter.numel() for parameter in trial.parameters])
        for parameter, part in zip(trial.parameters, parts, strict=True):
            parameter.add_(part.view_as(parameter))
    return trial


def _both(way: TangentTile | SecondOrder, trial: Training) -> tuple[Tensor, Tensor]:
    directions = _random((3, trial.layout.dimension), trial, 3)
    out = torch.empty_like(directions)
    values = way.tile(directions, out)
    return out, values.detach()


def _difference(
    trial: Training, tried: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], tolerance: float
) -> str | None:
    """Return which quantity differs by more than rounding, or None."""
    layout = trial.layout
    floor = SMALL * float(right[0].abs().max())
    for i, entry in enumerate(layout.entries):
        span = slice(entry.start, entry.start + layout.size(i))
        a, b = tried[0][:, span], right[0][:, span]
        if not a.numel():
            continue
        scale = max(float(b.abs().max()), floor)
        if not bool((a - b).abs().max() <= tolerance * scale):
            return f"its Hessian products of parameter {entry.name!r} differ from those of double backward"
    scale = float(right[1].abs().max())
    if not bool((tried[1] - right[1]).abs().max() <= tolerance * scale):
        return "its derivatives of the losses differ from those of double backward"
    return None


def dependence(training: Training, width: int) -> set[int]:
    """Return the batch sizes for which the rows of a padded tile are not alone.

    One direction in every row must give the same bits everywhere, and in its row among others too. Which
    kernels run follows from shapes, so the recipe's own whole batch and its last one are tried. (A
    product of odd sizes may start at another alignment of memory in every row.)
    """
    found = set()
    for step in sorted({0, training.steps_per_epoch - 1}):
        size = training.batch_size(step)
        batch = first_samples(training, step, size)
        one, others = (_random((width, training.layout.dimension), training, seed) for seed in (0, 1))
        same = _row_bits(training, step, batch, one[:1].repeat(width, 1))
        mixed = _row_bits(training, step, batch, torch.cat([one[:1], 100 * others[1:]]))
        if any(not torch.equal(row, same[0]) for row in [*same, mixed[0]]):
            found.add(size)
    return found


def _row_bits(training: Training, step: int, batch: Batch, directions_KD: Tensor) -> Tensor:
    out = torch.empty_like(directions_KD)
    values = TangentTile(training, step, batch).tile(directions_KD, out)
    return torch.cat([out, values], 1)


def first_samples(training: Training, step: int, count: int) -> Batch:
    """Return the first ``count`` samples of a step's batch, on the device."""
    members = training.batches[step]
    chosen = members[members >= 0][:count]
    batch = fetch(training.recipe, training.dataset, chosen)
    return to_device(batch, training.device, training.dtype)


def _random(shape: tuple[int, ...], training: Training, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.to(device=training.device, dtype=training.dtype)


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
