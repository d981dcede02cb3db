"""The last batch of an epoch, tried before anything runs: it is the only one of its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...storage.errors import RecipeError
from ..data.user_code import user_code
from ..determinism import derived_seed, preserved_generators, seed_everything
from ..model.state import copied
from .training import Training

_TOO_FEW = "Expected more than 1 value per channel"  # torch's words, of BatchNorm and GroupNorm


def check_last_batch(training: Training) -> None:
    """Refuse a last batch that the model cannot train on, where it is smaller than the others or a single sample.

    A copy of the model gets it in training mode: buffers and generators stay as they are.

    Raises:
        RecipeError: Names N, the batch size and what is left over.
    """
    sizes = (training.batches >= 0).sum(1)
    last = int(sizes.argmin())
    left = training.batch_size(last)
    if left == training.batch_size(0) and left > 1:
        return
    count, size = training.n_train, training.recipe.batch_size
    what = (
        f"the last batch of an epoch holds {left} of {count} samples (N mod batch_size = {count} mod {size})"
    )
    with preserved_generators():
        batch = next(training.loader(last, last + 1))
        model = copied(training.model)
        entered: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(_noted(entered, name, module))
        with user_code(f"{what} and failed:", always=True):
            try:
                seed_everything(derived_seed(training.recipe.seed, "step", last))
                losses = training.recipe.losses(model, batch)
            except ValueError as error:
                if _TOO_FEW not in str(error):
                    raise
                layer = entered[-1] if entered else "a normalisation"
                raise RecipeError(
                    f"{what}, where {layer} has one value per channel and cannot normalise it; use another "
                    f"batch_size{_such_as(count, size)}, or drop a sample from the training dataset"
                ) from error
    shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
    if shape != (left,):
        raise RecipeError(
            f"{what}, for which losses() returned {shape} and must return shape ({left},); do not squeeze the batch "
            "axis, or use another batch_size"
        )


def _such_as(count: int, size: int) -> str:
    """Return a batch size near ``size`` that leaves no single sample over."""
    near = sorted(range(2, min(count, 2 * size + 2) + 1), key=lambda other: abs(other - size))
    fits = next((other for other in near if count % other != 1), None)
    return "" if fits is None else f", such as {fits}"


def _noted(entered: list[str], name: str, module: nn.Module) -> Callable[..., None]:
    def note(_module: nn.Module, _inputs: Any) -> None:
        entered.append(f"layer {name!r} ({type(module).__name__})")

    return note
