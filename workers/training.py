"""The one seeded training loop that record and replay share, step by step.

Everything that decides the bits of a step lives here; record adds the scheduler and the writing,
replay puts the recorded settings in and takes per-sample gradients out. Neither may touch the
model's buffers or the random generators between steps.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..storage.errors import DoesNotFit, NonFiniteLoss, RecipeError
from .cast import cast_model, raw_bytes
from .data import Indices, batch_order, step_batches, to_device
from .determinism import derived_seed, prepare_process, resolve_device, seed_everything
from .finite import check_gradients
from .layout import Layout, checksum, flatten, load_flat
from .persample.engine import Watch
from .persample.reference import constant_statistics, couples_samples
from .recipe import Batch, Recipe
from .user_code import listed, user_code

SETTINGS = {
    "learning_rate": "lr",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "dampening": "dampening",
    "nesterov": "nesterov",
}
"""Trajectory array -> key of the optimiser's ``param_groups``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How a process computes; the same in every process of a run.

    Attributes:
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``float64``, of weights, inputs and hypergradients.
        threads: CPU threads of torch.
        batch_norm: ``constant`` statistics in per-sample gradients, or ``coupled`` (exact, slow).
    """

    device: str = "auto"
    dtype: str = "float32"
    threads: int = 1
    batch_norm: str = "constant"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of weights and hypergradients."""
        return torch.float64 if self.dtype == "float64" else torch.float32


class Training:
    """Model, data, optimiser and batch order of a recipe, built the same way in every process.

    Args:
        recipe: The user's recipe.
        compute: How to compute.

    Attributes:
        guarded: Whether each step's gradients are looked at before they move the weights. A replay
            follows a record whose gradients were.

    Raises:
        RecipeError: The optimiser is not a ``torch.optim.SGD`` or does not hold the model's parameters.
    """

    guarded = False

    def __init__(self, recipe: Recipe, compute: Compute) -> None:
        prepare_process(compute.threads)
        self.recipe, self.compute = recipe, compute
        self.device = resolve_device(compute.device)
        self.dtype = compute.torch_dtype
        seed_everything(recipe.seed)
        with user_code(f"{recipe.name}.train_dataset() failed:", always=True):
            self.dataset: Dataset[Any] = recipe.train_dataset()
            self.n_train = len(self.dataset)  # type: ignore[arg-type]
        seed_everything(recipe.seed)
        with user_code(f"{recipe.name}.model() failed:"):
            self.model: nn.Module = cast_model(recipe.model(), self.device, self.dtype)
        self.model.train()
        with user_code(f"{recipe.name}.optimizer() failed:", always=True):
            self.optimizer = recipe.optimizer(self.model)
        if type(self.optimizer) is not torch.optim.SGD:
            raise RecipeError(
                f"optimizer {type(self.optimizer).__name__} has no rule for its hypergradient; "
                "use torch.optim.SGD (any momentum, dampening, Nesterov, weight decay, groups)"
            )
        for group in self.optimizer.param_groups:
            if group.get("maximize"):
                raise RecipeError("SGD(maximize=True) is not supported; negate the losses instead")
        self.layout = Layout.of(self.model, self.optimizer.param_groups)
        self.parameters = self.layout.parameters(self.model)
        self.batches: Indices = batch_order(self.n_train, recipe.batch_size, recipe.epochs, recipe.seed)
        self.steps_per_epoch = -(-self.n_train // recipe.batch_size)
        self.steps = len(self.batches)
        self._own_losses = torch.empty(0)  # of the last step

    def loader(self, first: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches of steps ``first`` to ``stop`` on the device."""
        source = step_batches(self.recipe, self.dataset, self.batches, self.recipe.seed, first, stop)
        for batch in source:
            yield to_device(batch, self.device, self.dtype)

    def batch_size(self, step: int) -> int:
        """Return B_t, the real number of samples of a step."""
        return int((self.batches[step] >= 0).sum())

    def step(self, step: int, batch: Batch, watch: Watch | None = None) -> Tensor:
        """Take one training step; see ``_step``, whose device errors get a name here.

        Raises:
            DoesNotFit: The device's memory does not hold the step.
            RecipeError: An operation has no deterministic form on this device, the recipe's code raised, or
                see ``_step``.
        """
        first = ", the first training step," if step == 0 else ""
        # What only a watched step raises is not the recipe's, unless its code is on the way there.
        with user_code(f"step {step} of {self.steps}{first} raised", always=watch is None):
            return self._step_on_device(step, batch, watch)

    def _step_on_device(self, step: int, batch: Batch, watch: Watch | None) -> Tensor:
        try:
            return self._step(step, batch, watch)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(
                f"step {step} does not fit into the memory of {self.device}: {str(error).splitlines()[0]}; "
                "use a smaller batch size or a larger device"
            ) from error
        except RuntimeError as error:
            if "does not have a deterministic implementation" not in str(error):
                raise
            raise RecipeError(
                f"{str(error).split(' does not have')[0]} has no deterministic form on {self.device}, so no "
                "replay could follow it; use another layer, or --device cpu"
            ) from error

    def _step(self, step: int, batch: Batch, watch: Watch | None) -> Tensor:
        """Take one training step; with ``watch``, also hand over the rows' per-sample gradients.

        Returns:
            The batch loss at w_t, before the update: a scalar on the device.

        Raises:
            RecipeError: The losses are not one finite-length vector per batch, or a parameter got no gradient.
            NonFiniteTangents: The loss is finite, a gradient is not (where ``guarded``).
        """
        size = self.batch_size(step)
        separate = watch is not None and self.compute.batch_norm == "constant" and couples_samples(self.model)
        seed_everything(derived_seed(self.recipe.seed, "step", step))
        self.optimizer.zero_grad(set_to_none=True)
        listen = watch.engine.capture.listen() if watch and not separate else contextlib.nullcontext()
        with listen:
            losses_B = self.losses(batch, size)
            if watch and not separate:
                watch.engine.before_backward(losses_B, watch.positions)
            loss = losses_B.mean()
            self._own_losses = losses_B.detach()
            loss.backward()
        if watch and separate:
            self._second_pass(step, batch, size, watch)
        if watch:
            with constant_statistics(self.model) if separate else contextlib.nullcontext():
                watch.engine.after_backward(batch, watch.positions, size, watch.sink, watch.factors)
        self._check_gradients(step)
        if self.guarded:
            check_gradients(self, step, batch, loss.detach())
        self.optimizer.step()
        return loss.detach()

    def _second_pass(self, step: int, batch: Batch, size: int, watch: Watch) -> None:
        """Run the batch again, same dropout, with BatchNorm statistics as constants."""
        seed_everything(derived_seed(self.recipe.seed, "step", step))
        with constant_statistics(self.model), watch.engine.capture.listen():
            losses_B = self.losses(batch, size)
            watch.engine.before_backward(losses_B, watch.positions)
            torch.autograd.grad(losses_B.mean(), self.parameters, allow_unused=True)

    def losses(self, batch: Batch, size: int) -> Tensor:
        """Return the recipe's losses after checking their shape, (B,)."""
        losses_B = self.recipe.losses(self.model, batch)
        if not isinstance(losses_B, Tensor) or losses_B.shape != (size,):
            got = tuple(losses_B.shape) if isinstance(losses_B, Tensor) else type(losses_B).__name__
            raise RecipeError(
                f"losses() returned {got} for a batch of {size} samples and must return shape ({size},); "
                "use reduction='none' and average over everything but the batch axis"
            )
        return losses_B

    def _check_gradients(self, step: int) -> None:
        for entry, parameter in zip(self.layout.entries, self.parameters, strict=True):
            if parameter.grad is None and entry.group >= 0:
                raise RecipeError(
                    f"parameter {entry.name!r} got no gradient at step {step}: SGD would skip it there; "
                    "freeze it (requires_grad=False) or use it in every forward pass"
                )

    def read_settings(self) -> dict[str, list[float]]:
        """Return what the optimiser would use now, one value per group."""
        return {
            name: [float(group[key]) for group in self.optimizer.param_groups]
            for name, key in SETTINGS.items()
        }

    def apply_settings(self, recorded: dict[str, npt.NDArray[Any]], step: int) -> None:
        """Put the recorded settings of a step into the optimiser."""
        for name, key in SETTINGS.items():
            for g, group in enumerate(self.optimizer.param_groups):
                value = recorded[name][step, g]
                group[key] = bool(value) if name == "nesterov" else float(value)

    def check_finite(self, step: int, loss: float) -> None:
        """Raise NonFiniteLoss when a batch loss is NaN or infinite, naming the samples whose own loss is."""
        if not np.isfinite(loss):
            row = self.batches[step]
            members = row[row >= 0]
            own = self._own_losses.double().cpu().numpy()
            bad = members[~np.isfinite(own)] if len(own) == len(members) else []
            raise NonFiniteLoss(
                f"the batch loss is {loss} at step {step} of {self.steps} (train_index "
                f"{listed([int(i) for i in (bad if len(bad) else members)])}); "
                "lower the learning rate or look at these samples"
            )

    def weights(self) -> Tensor:
        """Return the flat weights, shape (D,)."""
        return flatten(self.parameters)

    def weight_checksum(self) -> int:
        """Return the crc32 of the weights."""
        return checksum(self.parameters)

    def state_digest(self) -> str:
        """Return the sha256 of weights and buffers."""
        digest = hashlib.sha256()
        for tensor in [*self.parameters, *self.model.buffers()]:
            digest.update(raw_bytes(tensor))
        return digest.hexdigest()

    def momentum(self) -> tuple[Tensor, list[bool]]:
        """Return the flat momentum buffers (D,), zero where there is none yet, and which exist."""
        buffers = [self.optimizer.state.get(p, {}).get("momentum_buffer") for p in self.parameters]
        filled = [
            torch.zeros_like(p) if b is None else b for p, b in zip(self.parameters, buffers, strict=True)
        ]
        return flatten(filled), [b is not None for b in buffers]

    def load_weights(self, weights_D: npt.NDArray[Any], buffers: bytes) -> None:
        """Put a checkpoint's weights and model buffers into the model."""
        vector = torch.from_numpy(np.ascontiguousarray(weights_D))
        load_flat(self.parameters, vector.to(device=self.device, dtype=self.dtype))
        load_buffers(self.model, buffers)

    def load_momentum(self, momentum_D: npt.NDArray[Any], exists: list[bool]) -> None:
        """Put a checkpoint's momentum buffers into the optimiser."""
        vector = torch.from_numpy(np.ascontiguousarray(momentum_D)).to(device=self.device, dtype=self.dtype)
        for i, (parameter, present) in enumerate(zip(self.parameters, exists, strict=True)):
            start = self.layout.entries[i].start
            view = vector[start : start + parameter.numel()].view_as(parameter)
            self.optimizer.state[parameter]["momentum_buffer"] = view.clone() if present else None


def pack_buffers(model: nn.Module) -> bytes:
    """Return the bytes of all model buffers (BatchNorm statistics and the like), in order."""
    return b"".join(raw_bytes(buffer) for buffer in model.buffers())


@torch.no_grad()
def load_buffers(model: nn.Module, packed: bytes) -> None:
    """Inverse of ``pack_buffers``."""
    start = 0
    for buffer in model.buffers():
        stop = start + buffer.numel() * buffer.element_size()
        if stop > start:
            flat = torch.frombuffer(bytearray(packed[start:stop]), dtype=buffer.dtype)
            buffer.copy_(flat.view(buffer.shape))
        start = stop
