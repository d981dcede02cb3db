"""The one seeded training loop that record and replay share, step by step.

Everything that decides the bits of a step lives here; record adds the scheduler and the writing,
replay puts the recorded settings in and takes per-sample gradients out. Neither may touch the
model's buffers or the random generators between steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...storage.errors import DoesNotFit, NonFiniteLoss, RecipeError
from ..data.batches import Indices, batch_order, step_batch, step_batches, to_device
from ..data.cast import cast_model, raw_bytes
from ..data.user_code import listed, user_code
from ..determinism import (
    derived_seed,
    prepare_process,
    preserved_generators,
    resolve_device,
    seed_everything,
)
from ..model.layout import Layout, checksum, flatten, load_flat
from ..model.state import Kept, buffers_from, copied, kept_buffers, load_buffers, same_buffer
from ..persample.engine import Watch
from ..persample.one_batch import NOISE
from ..persample.reference import constant_statistics, couples_samples
from ..recipe import Batch, Recipe
from .finite import check_gradients
from .initial import initial_state, load_optimizer, load_weights
from .update import TrainableSet, check_optimizer, check_owned

ADD_UP = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far per-sample gradients of a batch may add up to something else than its gradient, relative to the
largest sum of their sizes: rounding in layers of low precision included."""

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
        per_sample: ``auto``: the fastest way to each parameter's per-sample gradients that agrees with
            autograd; ``vjp``: autograd itself, one backward pass a sample.
    """

    device: str = "auto"
    dtype: str = "float32"
    threads: int = 1
    batch_norm: str = "constant"
    per_sample: str = "auto"

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
        own_losses: (B,) losses of the last step's samples, on the device.
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
        start = initial_state(recipe)
        load_weights(recipe, self.model, start)
        self.model.train()
        with user_code(f"{recipe.name}.optimizer() failed:", always=True):
            self.optimizer = recipe.optimizer(self.model)
        if recipe.epochs:  # else nothing is trained, and the optimiser says only what it holds
            check_optimizer(self.optimizer, self.model)
        load_optimizer(recipe, self.model, self.optimizer, start)
        self.trainable = TrainableSet(self.model)
        self.layout = Layout.of(self.model, self.optimizer.param_groups)
        check_owned(self.optimizer, self.model)
        self.parameters = self.layout.parameters(self.model)
        self.batches: Indices = batch_order(self.n_train, recipe.batch_size, recipe.epochs, recipe.seed)
        self.steps_per_epoch = -(-self.n_train // recipe.batch_size)
        self.steps = len(self.batches)
        self.own_losses = torch.empty(0)  # of the last step

    @cached_property
    def holds_statistics(self) -> bool:
        """Whether the batch statistics of BatchNorm layers count as constants in per-sample gradients.

        Not where other layers keep a state too (power iterations, running statistics, centres): the pass
        with constant statistics would see another state than the step's own, so samples are traced there
        as they are, coupled.
        """
        if self.compute.batch_norm != "constant" or not couples_samples(self.model):
            return False
        return not self.keeps_state

    @cached_property
    def keeps_state(self) -> bool:
        """Whether a forward pass of the first batch moves a buffer of a layer that is no BatchNorm."""
        if not self.steps or not kept_buffers(self.model, statistics=False):
            return False
        with preserved_generators(), torch.no_grad():
            found = step_batch(self.recipe, self.dataset, self.batches, self.recipe.seed, 0)
            trial = copied(self.model)
            before = kept_buffers(trial, statistics=False)
            self.recipe.losses(trial, to_device(found, self.device, self.dtype))
            return any(not same_buffer(module._buffers.get(name), kept) for module, name, kept in before)

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
        separate = watch is not None and self.holds_statistics and couples_samples(self.model)
        seed_everything(derived_seed(self.recipe.seed, "step", step))
        for parameter in self.parameters:
            parameter.grad = None
        if watch is None:
            loss = self._mean(batch, size)
            loss.backward()
        elif separate:
            kept = kept_buffers(self.model, statistics=False)
            loss = self._mean(batch, size)
            loss.backward()
            self._second_pass(step, batch, size, watch, kept)
        else:
            losses_B = watch.engine.trace(
                batch, watch.positions, size, lambda: self.losses(batch, size), lambda mean: mean.backward()
            )
            self.own_losses, loss = losses_B.detach(), losses_B.mean()
        self.trainable.check(step, self.steps)
        if watch:
            watch.engine.hand_over(watch.positions, size, watch.sink, watch.factors)
        self._check_gradients(step)
        if self.guarded:
            check_gradients(self, step, batch, loss.detach())
        self.optimizer.step()
        return loss.detach()

    def _mean(self, batch: Batch, size: int) -> Tensor:
        losses_B = self.losses(batch, size)
        self.own_losses = losses_B.detach()
        return losses_B.mean()

    def _second_pass(self, step: int, batch: Batch, size: int, watch: Watch, kept: Kept) -> None:
        """Run the batch again, same dropout and buffers, with BatchNorm statistics as constants."""
        seed_everything(derived_seed(self.recipe.seed, "step", step))
        with constant_statistics(self.model), buffers_from(kept):
            watch.engine.trace(
                batch,
                watch.positions,
                size,
                lambda: self.losses(batch, size),
                self.gradient_of,
            )

    def gradient_of(self, value: Tensor) -> tuple[Tensor | None, ...]:
        """Return d value / d parameters without touching what the optimiser sees; None where there is no path."""
        return torch.autograd.grad(value, self.parameters, allow_unused=True)

    def unlike_sum(
        self, rows_BD: Tensor, whole: Sequence[Tensor | None], size: int, allowed: float | None = None
    ) -> list[int]:
        """Return the entries of which the rows of a whole batch do not add up to its gradient.

        Args:
            rows_BD: Gradients of each sample's own loss.
            whole: Gradient of the batch's mean loss, a tensor a parameter; None: zero.
            size: B.
            allowed: How far they may, relative; None: ``ADD_UP``.
        """
        found = []
        floor = NOISE * float(rows_BD.abs().sum(0).max()) if rows_BD.numel() else 0.0
        allowed = ADD_UP[self.dtype] if allowed is None else allowed
        for i, (entry, gradient) in enumerate(zip(self.layout.entries, whole, strict=True)):
            rows = rows_BD[:, entry.start : entry.start + self.layout.size(i)]
            if not rows.numel():
                continue
            total, most = rows.sum(0), max(float(rows.abs().sum(0).max()), floor)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                continue  # told elsewhere, by sample
            if gradient is not None:
                total = total - gradient.detach().reshape(-1).to(rows) * size
            if not bool(total.abs().max() <= allowed * most):
                found.append(i)
        return found

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

    def check_finite(self, step: int, loss: float, own_losses: Tensor | None = None) -> None:
        """Raise NonFiniteLoss when a batch loss is NaN or infinite, naming the samples whose own loss is.

        Args:
            step: Which.
            loss: Of its batch.
            own_losses: (B,) of its samples; None: it was the last step.
        """
        if not np.isfinite(loss):
            row = self.batches[step]
            members = row[row >= 0]
            own = (self.own_losses if own_losses is None else own_losses).double().cpu().numpy()
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

    def groups_with_momentum(self) -> list[int]:
        """Return the parameter groups whose parameters have momentum buffers."""
        exists = self.momentum()[1]
        return sorted({e.group for e, there in zip(self.layout.entries, exists, strict=True) if there})

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
