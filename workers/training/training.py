"""The one seeded training loop that record and replay share, step by step.

Everything that decides the bits of a step lives here; record adds the scheduler and the writing,
replay puts the recorded settings in and takes per-sample gradients out. Neither may touch the
model's buffers or the random generators between steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...storage.errors import DoesNotFit, NonFiniteLoss, RecipeError
from ..data.batches import Indices, step_batch, step_batches, to_device
from ..data.cast import cast_model, raw_bytes
from ..data.of_recipe import is_default
from ..data.schedule import schedule_of
from ..data.user_code import listed, user_code
from ..determinism import (
    derived_seed,
    prepare_process,
    preserved_generators,
    resolve_device,
    seed_everything,
)
from ..model.autocast import refuse_low_precision
from ..model.layout import Layout, checksum, flatten, load_flat
from ..model.state import (
    Kept,
    buffers_from,
    copied,
    kept_buffers,
    load_buffers,
    same_buffer,
    unchanged_buffers,
)
from ..persample.channels import switchable, switched_statistics
from ..persample.engine import Watch
from ..persample.one_batch import NOISE
from ..persample.reference import constant_statistics, couples_samples
from ..persample.ways import Ways
from ..recipe import Batch, Recipe
from ..recursion.clipping import Clip, clipped, max_norm_of
from ..recursion.families import family_of, family_or_sgd
from ..recursion.family import Moment
from .finite import check_gradients
from .initial import initial_state, load_optimizer, load_weights
from .optimizer_state import OptimizerState, put_state, state_of, told_of
from .update import TrainableSet, check_optimizer, check_owned

ADD_UP = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far per-sample gradients of a batch may add up to something else than its gradient, relative to the
largest sum of their sizes: rounding in layers of low precision included."""


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
        graphs: ``auto``: replayed steps are captured as CUDA graphs where they can be; ``off``: never.
    """

    device: str = "auto"
    dtype: str = "float32"
    threads: int = 1
    batch_norm: str = "constant"
    per_sample: str = "auto"
    graphs: str = "off"

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
        looks_later: Whether they are looked at for many steps at once, ``norms`` being kept meanwhile.
        norms: (step, largest size of a gradient's numbers) that nobody has looked at.
        known_ways: Ways to per-sample gradients that were tried in this training already, elsewhere; None: not yet.
        before_update: Called with a step whose gradient is complete, before rows of its last batch are handed
            over and before the optimiser moves the weights; see ``moment``.
        divisors: (T,) float64: a step's loss is the sum of its samples' losses over this; NaN where it depends
            on the weights of batches not seen yet.
        clips: (T, 2) float64, norm and factor of clipping as steps are taken; None where nothing is clipped.
        active: (T, P) bool, which parameters had a gradient, as steps are taken.

    Raises:
        RecipeError: The optimiser has no rule or does not hold the model's parameters.
    """

    guarded = False
    looks_later = False
    known_ways: Ways | None = None
    before_update: Callable[[int], None] | None = None

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
            model = recipe.model()
        refuse_low_precision(model)
        with user_code(f"{recipe.name}.model() failed:"):
            self.model: nn.Module = cast_model(model, self.device, self.dtype)
        start = initial_state(recipe)
        load_weights(recipe, self.model, start)
        self.model.train()
        with user_code(f"{recipe.name}.optimizer() failed:", always=True):
            self.optimizer = recipe.optimizer(self.model)
        if recipe.epochs:
            self.family = family_of(self.optimizer)
            check_optimizer(self.optimizer, self.model)
        else:  # nothing is trained, and the optimiser says only what it holds
            self.family = family_or_sgd(self.optimizer)
        load_optimizer(recipe, self.model, self.optimizer, start)
        self.trainable = TrainableSet(self.model)
        self.layout = Layout.of(self.model, self.optimizer.param_groups)
        check_owned(self.optimizer, self.model)
        self.parameters = self.layout.parameters(self.model)
        self.schedule = schedule_of(recipe, self.n_train)
        if recipe._stop is not None:
            self.schedule = self.schedule.until(recipe._stop)
        self.batches: Indices = self.schedule.batches
        self.epoch_ends = self.schedule.epoch_ends
        self.updates = self.schedule.updates
        self.steps = len(self.batches)
        self.own_losses = torch.empty(0)  # of the last step
        self.norms: list[tuple[int, Tensor]] = []
        self._applied: npt.NDArray[Any] | None = None
        self.weighted = not is_default(recipe, "weights")
        self.divisors = np.full(self.steps, np.nan)
        recorded = self.schedule.recorded
        if recorded is not None:
            self.weighted = recorded.divisors is not None
        if recorded is not None and recorded.divisors is not None:
            self.divisors = recorded.divisors
        elif not self.weighted:
            parts = np.array([self.schedule.parts(step) for step in range(self.steps)], dtype=np.float64)
            self.divisors = (self.batches >= 0).sum(1) * parts
        self.max_norm = _max_norm(recipe)
        self.clips = None if self.max_norm is None else np.full((self.steps, 2), np.nan)
        self.active = np.ones((self.steps, len(self.parameters)), dtype=bool)

    @property
    def epochs(self) -> int:
        """E, epochs that are begun."""
        return len(self.epoch_ends)

    @property
    def optimizer_told(self) -> dict[str, Any]:
        """What a record notes of the optimiser beside its settings."""
        return told_of(self.optimizer, self.max_norm)

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
        moved = (to_device(batch, self.device, self.dtype) for batch in source)
        known = not self.weighted or self.schedule.recorded is not None
        yield from moved if known else self._with_divisors(first, moved)

    def _with_divisors(self, first: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches once the weights of their whole step are known."""
        held: list[Batch] = []
        for step, batch in enumerate(batches, start=first):
            held.append(batch)
            if not self.updates[step]:
                continue
            begun = step - len(held) + 1
            if np.isnan(self.divisors[step]) or begun == self.schedule.first[step]:
                total = sum(self._weight(begun + k, one) for k, one in enumerate(held))
                self.divisors[self.schedule.first[step] : step + 1] = total
            yield from held
            held = []
        yield from held

    def _weight(self, step: int, batch: Batch) -> float:
        """Return the sum of the weights of a batch.

        Raises:
            RecipeError: ``weights`` returned something else, or nothing to divide by.
        """
        size = self.batch_size(step)
        with user_code(f"weights() of the batch of step {step} raised", always=True):
            found = self.recipe.weights(batch)
        if not isinstance(found, Tensor) or found.shape != (size,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RecipeError(
                f"weights() returned {got} for a batch of {size} samples; it must return shape ({size},) for every batch, "
                "or not be defined"
            )
        total = float(found.double().sum())
        if not (bool((found >= 0).all()) and math.isfinite(total)):
            raise RecipeError(
                f"weights() of the batch of step {step} holds {float(found.min())}; weights are 0 or more"
            )
        return total

    def divisor(self, step: int) -> float:
        """Return what the sum of a batch's losses is divided by in its step's loss: B_t unless weighted or accumulated."""
        return float(self.divisors[step])

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
        self.seed_step(step)
        if self.schedule.first[step] == step:
            self.forget_gradients()
        loss = self.pass_through(step, batch, watch)
        self._about_to_move(step, batch, loss)
        if watch:
            watch.engine.hand_over(watch.positions, size, watch.sink, watch.factors)
        self._move(step)
        return loss

    def seed_step(self, step: int) -> None:
        """Seed the generators as a step begins with them."""
        seed_everything(derived_seed(self.recipe.seed, "step", step))

    def forget_gradients(self) -> None:
        """Begin a step of the optimiser."""
        for parameter in self.parameters:
            parameter.grad = None

    def pass_through(self, step: int, batch: Batch, watch: Watch | None) -> Tensor:
        """Run a batch forward and backward; return its loss, with what its rows are made of in the watch's engine."""
        size = self.batch_size(step)
        separate = watch is not None and self.holds_statistics and couples_samples(self.model)
        if watch is None:
            self.reduce(self._losses(batch, size), step).backward()
        elif separate and watch.engine.ruled and switchable(self.model):
            self.own_losses = self._two_ways(step, batch, size, watch).detach()
        elif separate:
            kept = kept_buffers(self.model, statistics=False)
            self.reduce(self._losses(batch, size), step).backward()
            self._second_pass(step, batch, size, watch, kept)
        else:
            losses_B = watch.engine.trace(
                batch,
                watch.positions,
                size,
                lambda: self.losses(batch, size),
                lambda losses: self.reduce(losses, step).backward(),
                divisor=self.divisor(step),
            )
            self.own_losses = losses_B.detach()
        return self.own_losses.mean() if not self.weighted else self._weighted_mean(batch)

    def _about_to_move(self, step: int, batch: Batch, loss: Tensor) -> None:
        """Look at a step whose gradients are there."""
        self.trainable.check(step, self.steps)
        if self.updates[step]:
            self._check_gradients(step)
            if self.guarded:
                check_gradients(self, step, batch, loss)
            if self.before_update is not None:
                self.before_update(step)

    def _move(self, step: int) -> None:
        """Let the optimiser move the weights, where the step ends."""
        if self.updates[step]:
            self._clip(step)
            self.optimizer.step()

    def finish_captured(self, step: int, batch: Batch, loss: Tensor, own_losses: Tensor) -> None:
        """End a step whose passes, and rows, a graph has computed."""
        self.own_losses = own_losses
        self._about_to_move(step, batch, loss)
        self._move(step)

    def reduce(self, losses_B: Tensor, step: int) -> Tensor:
        """Return what a batch adds to its step's loss."""
        if self.weighted:
            return losses_B.sum() / self.divisor(step)
        parts = self.schedule.parts(step)
        return losses_B.mean() if parts == 1 else losses_B.mean() / parts

    def _weighted_mean(self, batch: Batch) -> Tensor:
        """Return the batch's losses over its own weights, for people to look at."""
        weights = self.recipe.weights(batch)
        if weights is None:  # a loop's own divisors
            return self.own_losses.mean()
        return self.own_losses.sum() / weights.sum().to(self.own_losses)

    def _losses(self, batch: Batch, size: int) -> Tensor:
        losses_B = self.losses(batch, size)
        self.own_losses = losses_B.detach()
        return losses_B

    def again(self, step: int, batch: Batch, watch: Watch, kept: Kept) -> None:
        """Run a batch of the step that is about to be taken once more, and hand its rows over.

        Args:
            step: Which batch.
            batch: It.
            watch: What to hand over.
            kept: The buffers that its first pass began with.
        """
        size = self.batch_size(step)
        seed_everything(derived_seed(self.recipe.seed, "step", step))
        with unchanged_buffers(self.model), buffers_from(kept):
            if self.holds_statistics and couples_samples(self.model):
                self._second_pass(step, batch, size, watch, kept)
            else:
                losses = partial(self.losses, batch, size)
                watch.engine.trace(
                    batch, watch.positions, size, losses, lambda found: self.gradient_of(found.mean())
                )
        watch.engine.hand_over(watch.positions, size, watch.sink, watch.factors)

    def state_of_layers(self) -> Kept:
        """Return copies of the buffers that a step both moves and reads; batch statistics are not read."""
        return kept_buffers(self.model, statistics=False) if self.keeps_state else []

    def moment(self) -> Moment:
        """Return the step that is about to be taken; good inside ``before_update``."""
        clip = self.clip()
        return Moment(
            gradient=clip.gradient,
            clip=clip,
            weights=self.weights(),
            state=self.optimizer_state().vectors,
        )

    def clip(self) -> Clip:
        """Return what clipping makes of the step that is about to be taken; good inside ``before_update``."""
        gradient = flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])
        norm, factor = math.nan, 1.0
        if self.max_norm is not None:
            found = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            norm, factor = clipped(found, self.max_norm)
        return Clip(gradient=gradient, norm=norm, factor=factor)

    def _clip(self, step: int) -> None:
        if self.max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
            assert self.clips is not None
            first = self.schedule.first[step]
            self.clips[first : step + 1] = clipped(norm, self.max_norm)

    def _two_ways(self, step: int, batch: Batch, size: int, watch: Watch) -> Tensor:
        """Run the batch forward once, and backward twice: to the optimiser, and with BatchNorm statistics as constants."""
        capture = watch.engine.capture
        with switched_statistics(self.model) as statistics:

            def compute() -> Tensor:
                losses_B = self.losses(batch, size)
                statistics.hold()
                return losses_B

            def back(losses_B: Tensor) -> None:
                value = self.reduce(losses_B, step)
                capture.pause()
                with statistics.moving():
                    value.backward(retain_graph=True)
                capture.resume()
                capture.walk(value)

            return watch.engine.trace(batch, watch.positions, size, compute, back, divisor=self.divisor(step))

    def _second_pass(self, step: int, batch: Batch, size: int, watch: Watch, kept: Kept) -> None:
        """Run the batch again, same dropout and buffers, with BatchNorm statistics as constants."""
        seed_everything(derived_seed(self.recipe.seed, "step", step))
        with constant_statistics(self.model), buffers_from(kept):
            watch.engine.trace(
                batch,
                watch.positions,
                size,
                lambda: self.losses(batch, size),
                lambda losses: self.gradient_of(losses.mean()),
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
        """Note which parameters have a gradient; those without are left alone by the optimiser."""
        moved = [parameter.grad is not None for parameter in self.parameters]
        if not all(moved):
            self.active[self.schedule.first[step] : step + 1] = moved
            if not any(m for m, entry in zip(moved, self.layout.entries, strict=True) if entry.group >= 0):
                raise RecipeError(
                    f"no parameter that is optimised got a gradient at step {step}; use the model's output in losses()"
                )

    def read_settings(self) -> dict[str, list[float]]:
        """Return what the optimiser would use now, one value per group."""
        groups = [self.family.read(group) for group in self.optimizer.param_groups]
        return {name: [group[name] for group in groups] for name in self.family.settings}

    def apply_settings(self, recorded: Mapping[str, npt.NDArray[Any]], step: int) -> None:
        """Put the recorded settings of a step into the optimiser, where they are others than those put there last."""
        values = np.array([recorded[name][step] for name in self.family.settings])
        if self._applied is not None and np.array_equal(values, self._applied):
            return
        self._applied = values
        for g, group in enumerate(self.optimizer.param_groups):
            self.family.apply(group, {name: recorded[name][step, g] for name in self.family.settings})

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

    def optimizer_state(self) -> OptimizerState:
        """Return the optimiser's vectors as they are, flat."""
        return state_of(self.optimizer, self.family, self.parameters)

    def load_weights(self, weights_D: npt.NDArray[Any], buffers: bytes) -> None:
        """Put a checkpoint's weights and model buffers into the model."""
        vector = torch.from_numpy(np.ascontiguousarray(weights_D))
        load_flat(self.parameters, vector.to(device=self.device, dtype=self.dtype))
        load_buffers(self.model, buffers)

    def load_optimizer(self, kept: OptimizerState) -> None:
        """Put a checkpoint's vectors into the optimiser."""
        put_state(self.optimizer, self.family, self.parameters, kept)


def _max_norm(recipe: Recipe) -> float | None:
    """Return ``clip_grad_norm``, checked.

    Raises:
        RecipeError: It is no positive number, or the recipe asks for clipping by value.
    """
    if getattr(recipe, "clip_grad_value", None) is not None:
        raise RecipeError("clip_grad_value has no rule here; clip by norm instead: clip_grad_norm = 1.0")
    return max_norm_of(recipe.clip_grad_norm)
