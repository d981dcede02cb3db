"""Losses and gradients that are no numbers: which step and which samples they come from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from ...storage.errors import NonFiniteTangents
from ..data.batches import fetch, to_device
from ..data.user_code import listed
from ..determinism import derived_seed, seed_everything
from ..model.layout import Layout
from ..recipe import Batch, Recipe
from .metrics import evaluating

_REMEDY = (
    "look at these samples and at the derivative of their loss (square root, logarithm, norm or division "
    "at 0, torch.where over such a value), or lower the learning rate"
)


class Trained(Protocol):
    """What is needed of a ``Training`` to name its samples."""

    recipe: Recipe
    model: nn.Module
    layout: Layout
    parameters: list[nn.Parameter]
    batches: npt.NDArray[np.int32]
    steps: int
    device: torch.device
    dtype: torch.dtype
    looks_later: bool
    norms: list[tuple[int, Tensor]]


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite, for the price of reading them once."""
    if not tensors:
        return True
    # A norm is not finite as soon as one number is not; one that overflowed is looked at again. Euclid's, because
    # the largest absolute value takes eight times as long on a CPU.
    if bool(torch.isfinite(nn.utils.get_total_norm(tensors))):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def check_gradients(training: Trained, step: int, batch: Batch, loss: Tensor) -> None:
    """Raise where the batch loss is finite and a gradient that was just computed is not.

    Raises:
        NonFiniteTangents: Names parameter, step, and the samples whose own gradient is not finite.
    """
    if training.looks_later:
        given = [p.grad for p in training.parameters if p.grad is not None]
        training.norms.append((step, nn.utils.get_total_norm(given, float("inf"))))
        return
    owned = [(e.name, p.grad) for e, p in zip(training.layout.entries, training.parameters, strict=True)]
    if finite([grad for _, grad in owned if grad is not None]) or not bool(torch.isfinite(loss)):
        return
    name = next(name for name, grad in owned if grad is not None and not bool(torch.isfinite(grad).all()))
    row = training.batches[step]
    members = row[row >= 0].tolist()
    guilty = [members[position] for position in _guilty(training, step, batch, len(members))]
    which = f"that of train_index {listed(guilty)} alone is not" if guilty else "no sample alone explains it"
    raise NonFiniteTangents(
        f"the gradient of parameter {name!r} is not finite at step {step} of {training.steps}, though the batch "
        f"loss is {float(loss):.3g}: {which} (batch: train_index {listed(members)}); {_REMEDY}"
    )


def check_norms(training: Trained, losses: npt.NDArray[np.float64]) -> None:
    """Raise for the first step since the last look whose gradients were not finite though its loss was.

    Args:
        training: Whose weights have gone on since, so that no sample can be tried alone.
        losses: (T,).

    Raises:
        NonFiniteTangents: Names the step and its batch.
    """
    waiting, training.norms[:] = list(training.norms), []
    if not waiting or bool(torch.isfinite(torch.stack([norm for _step, norm in waiting])).all()):
        return
    for step, norm in waiting:
        if not bool(torch.isfinite(norm)) and np.isfinite(losses[step]):
            row = training.batches[step]
            raise NonFiniteTangents(
                f"the gradient is not finite at step {step} of {training.steps}, though the batch loss is {losses[step]:.3g} "
                f"(batch: train_index {listed(row[row >= 0].tolist())}; with --device cpu the sample is named); {_REMEDY}"
            )


def check_own_gradients(
    training: Trained,
    dataset: Dataset[Any],
    index: npt.NDArray[np.int64],
    gradient: npt.NDArray[np.floating],
    loss: npt.NDArray[np.float64],
    what: str = "test",
) -> None:
    """Raise where the gradient of a sample's own loss is not finite.

    Args:
        training: At the trained weights, or at those of a checkpoint.
        dataset: The test or training dataset.
        index: (R,).
        gradient: (R, D).
        loss: (R,).
        what: ``test`` or ``train``, after the dataset.

    Raises:
        NonFiniteTangents: Names the samples.
    """
    # A row at a time: a mask of the whole block would be another quarter of its memory.
    bad = [r for r, row in enumerate(gradient) if not np.isfinite(row).all()]
    if not bad:
        return
    # One such sample can spoil the rows of others in its batch (0 times infinity): each is tried alone.
    with evaluating(training.model):
        own = [r for r in bad if not _alone_finite(training, dataset, int(index[r]), what)]
    named = own or bad
    option = {"test": "--test", "train": "--track"}[what]
    raise NonFiniteTangents(
        f"the gradient of the loss of {what}_index {listed([int(index[r]) for r in named])} is not finite at the "
        f"trained weights, though the loss is {loss[named[0]]:.3g}; {_REMEDY}, or leave them out with {option}"
    )


def _alone_finite(training: Trained, dataset: Dataset[Any], index: int, what: str) -> bool:
    seed_everything(derived_seed(training.recipe.seed, what, index))
    batch = to_device(fetch(training.recipe, dataset, [index]), training.device, training.dtype)
    return _own_finite(training, batch)


def _own_finite(training: Trained, alone: Batch) -> bool:
    """Whether a batch of one has a gradient whose numbers are finite."""
    loss = training.recipe.losses(training.model, alone).sum()
    grads = torch.autograd.grad(loss, training.parameters, allow_unused=True)
    return finite([grad for grad in grads if grad is not None])


def _guilty(training: Trained, step: int, batch: Batch, size: int) -> list[int]:
    """Return the positions whose loss, each computed alone, has a gradient that is not finite.

    The step cannot be taken any more: what this does to buffers and generators does not matter.
    """
    model = training.model
    found = []
    for position in range(size):
        chosen = torch.tensor([position], device=training.device)
        alone = tree_map(
            lambda leaf: leaf.index_select(0, chosen) if isinstance(leaf, Tensor) and leaf.ndim else leaf,  # noqa: B023
            batch,
        )
        for mode in (True, False):  # some layers cannot train on one sample
            model.train(mode)
            seed_everything(derived_seed(training.recipe.seed, "step", step))
            # Whatever a recipe cannot do with one sample leaves that sample unnamed.
            with suppress(Exception):
                if not _own_finite(training, alone):
                    found.append(position)
                break
    return found
