"""Differences of the gradient: the yardstick that knows nothing of second derivatives.

    J v = (g(w + h v) - g(w - h v)) / 2h

with g as ``backward`` gives it, on a copy of the model with slightly moved weights, in float64.
"""

from __future__ import annotations

import copy
import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..data.batches import step_batch, to_device
from ..data.cast import cast_model
from ..determinism import derived_seed, seed_everything
from ..model.autocast import full_precision
from ..model.state import copied, unchanged_buffers
from ..persample.wide import widened
from ..recipe import Batch
from ..training.training import Training
from .second_order import (
    SecondOrder,
    TangentTile,
)

logger = logging.getLogger(__name__)

MOVED = 0.05
"""How far the probe moves the weights, in standard normals: what is zero in a fresh model hides terms."""

SMALL = 1e-3
"""Share of the largest entry of J v below which a parameter's own scale is not used."""

DIFFERENCES = 1e-4
"""How far a way may be from the differences, relative to the parameter's scale: they are no better."""

WIDTHS = (1e-7, 1e-9)
"""h, in standard normals: the smaller one where the larger crosses a kink (ReLU, pooling)."""

DIRECTIONS = 3


class Probe:
    """A trial of a training on one batch in float64, and J v by differences for a few directions.

    Args:
        trial: See ``moved_copy``; used up.
        batch: On its device, in its dtype.
    """

    def __init__(self, trial: Training, batch: Batch) -> None:
        self.trial, self.batch = trial, batch
        self.directions = _directions(trial)
        self.right = [_differences(trial, batch, self.directions, WIDTHS[0])]

    def double_backward(self, kind: type[SecondOrder]) -> tuple[tuple[Tensor, Tensor] | None, str]:
        """Return J v and the <g_i, v> of the directions by double backward, or None and why not."""
        try:
            return both(kind(self.trial, 0, self.batch), self.directions), ""
        except RuntimeError as error:
            return None, one_line(error)

    def difference(self, tried: Tensor) -> str | None:
        """Return a parameter of which ``tried`` is not J v by differences, or None."""
        name: str | None = None
        for k, h in enumerate(WIDTHS):
            if k == len(self.right):
                self.right.append(_differences(self.trial, self.batch, self.directions, h))
            name = self.unlike(tried, self.right[k], DIFFERENCES, SMALL)
            if name is None:
                return None
        return name

    def unlike(self, tried: Tensor, right: Tensor, tolerance: float, small: float) -> str | None:
        """Return a parameter of which two products differ, relative to its scale or ``small`` of the whole's."""
        layout = self.trial.layout
        floor = small * float(right.abs().max())
        for i, entry in enumerate(layout.entries):
            span = slice(entry.start, entry.start + layout.size(i))
            a, b = tried[:, span], right[:, span]
            if a.numel() and not bool((a - b).abs().max() <= tolerance * max(float(b.abs().max()), floor)):
                return entry.name
        return None

    def values_agree(self, values_QB: Tensor) -> bool:
        """Whether the <g_i, v>, weighted at random, are the products of a weighted gradient."""
        size = values_QB.shape[1]
        weights = torch.rand(size, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
        weights = weights.to(values_QB)
        gradient = weighted_gradient(self.trial, self.batch, weights)
        right, found = self.directions @ gradient, values_QB @ weights
        return bool((right - found).abs().max() <= 1e-7 * float(right.abs().max()) + 1e-12)


def moved_copy(training: Training, dtype: torch.dtype) -> Training:
    """Return a training of a copy of the model, its weights moved."""
    trial = copy.copy(training)
    if dtype == torch.float64:
        trial.recipe = widened(training.recipe)
    trial.model, trial.dtype = cast_model(copied(training.model), None, dtype), dtype
    trial.parameters = training.layout.parameters(trial.model)
    with torch.no_grad():
        move = MOVED * random_directions((training.layout.dimension,), trial, 2)
        parts = move.split([parameter.numel() for parameter in trial.parameters])
        for parameter, part in zip(trial.parameters, parts, strict=True):
            parameter.add_(part.view_as(parameter))
    return trial


def _directions(trial: Training) -> Tensor:
    """Return random directions (Q, D); rows at a ``padding_idx``, which never move, stay out of them."""
    found = random_directions((DIRECTIONS, trial.layout.dimension), trial, 3)
    entries = {id(p): entry for p, entry in zip(trial.parameters, trial.layout.entries, strict=True)}
    for module in trial.model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and padding is not None:
            entry = entries.get(id(module.weight))
            if entry is not None:
                width = module.weight.shape[1]
                found[:, entry.start + padding * width : entry.start + (padding + 1) * width] = 0.0
    return found


def _differences(trial: Training, batch: Batch, directions_QD: Tensor, h: float) -> Tensor:
    """Return J v by central differences of the batch's gradient, (Q, D)."""
    size = trial.batch_size(0)
    share = torch.full((size,), 1.0 / trial.divisor(0), dtype=trial.dtype, device=trial.device)
    rows = []
    for v in directions_QD:
        ends = []
        for sign in (1.0, -1.0):
            with moved(trial, sign * h * v):
                ends.append(weighted_gradient(trial, batch, share))
        rows.append((ends[0] - ends[1]) / (2.0 * h))
    return torch.stack(rows)


class moved:
    """Move the weights for a while, and put exactly the old ones back."""

    def __init__(self, trial: Training, by_D: Tensor) -> None:
        self.trial, self.by = trial, by_D
        self.old = [p.detach().clone() for p in trial.parameters]

    @torch.no_grad()
    def __enter__(self) -> None:
        parts = self.by.split([p.numel() for p in self.trial.parameters])
        for p, part in zip(self.trial.parameters, parts, strict=True):
            p.add_(part.view_as(p))

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for p, old in zip(self.trial.parameters, self.old, strict=True):
            p.copy_(old)


def weighted_gradient(trial: Training, batch: Batch, weights_B: Tensor) -> Tensor:
    """Return the gradient of the weighted sum of the losses as ``backward`` gives it, (D,)."""
    seed_everything(derived_seed(trial.recipe.seed, "step", 0))
    with unchanged_buffers(trial.model), full_precision():
        losses_B = trial.losses(batch, trial.batch_size(0))
        found = torch.autograd.grad(losses_B, trial.parameters, weights_B, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, trial.parameters, strict=True)]
    return torch.cat([part.detach().reshape(-1) for part in parts])


def both(way: TangentTile | SecondOrder, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a way gives: its products (Q, D) and the <g_i, v>, (Q, B)."""
    out = torch.empty_like(directions)
    values = way.tile(directions, out)
    return out, values.detach()


def unlike_differences(training: Training, batch: Batch, indices: npt.NDArray[np.int64]) -> str | None:
    """Return a parameter whose double backward is not the derivative of its gradient, or None.

    Tried on the given batch, in the mode that the model is in; None too where differences mean nothing,
    because the model does not compute in float64.
    """
    trial = moved_copy(training, torch.float64)
    trial.batches = indices[None].astype(np.int32)
    trial.divisors = np.array([float(len(indices))])  # its scale is the same on both sides
    wide = to_device(batch, training.device, torch.float64)
    try:
        probe = Probe(trial, wide)
    except RuntimeError as error:
        logger.debug("differences in float64 failed: %s", error)
        return None
    found, _ = probe.double_backward(SecondOrder)
    return None if found is None else probe.difference(found[0])


def first_samples(training: Training, step: int) -> Batch:
    """Return a step's batch on the device, outside of the loop; moves the generators."""
    found = step_batch(training.recipe, training.dataset, training.batches, training.recipe.seed, step)
    return to_device(found, training.device, training.dtype)


def random_directions(shape: tuple[int, ...], training: Training, seed: int) -> Tensor:
    """Return standard normals in the training's dtype, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.to(device=training.device, dtype=training.dtype)


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
