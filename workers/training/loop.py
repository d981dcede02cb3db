"""A training loop of the user's own, watched batch by batch: what a record of it needs, and what speaks against one.

The loop announces its batches; the optimiser's step is observed through its hooks. Everything a replay could not
follow is looked for where it shows: when the loop begins, before a batch, at a step. Letters: T batches, B
samples of a batch, N training samples, P parameters, G groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...storage.errors import NonFiniteLoss, RecipeError
from ...storage.trajectory import Checkpoint, TrajectoryWriter
from ...storage.trajectory_format import LOOP
from ..data.cast import raw_bytes
from ..data.schedule import RecordedBatches, padded
from ..data.user_code import listed
from ..determinism import derived_seed, fingerprint, seed_everything
from ..model.layout import Layout, checksum, flatten
from ..model.state import pack_buffers
from ..recursion.clipping import clipped, max_norm_of
from ..recursion.coefficients import stored_coefficients
from ..recursion.families import family_of
from ..recursion.settings import Recorded
from .kept import Kept
from .optimizer_state import state_of
from .record import CHECKED, CHECKPOINT_BYTES, CHECKPOINTS, DIGEST_EVERY, always_and_sometimes
from .recorded import LoopRecord, digest_of_frozen, loop_notes, schedule_of_batches
from .update import TrainableSet, UpdateCheck, check_optimizer, check_owned

Indices = npt.NDArray[np.int32]

MODES = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)
"""Layers that do something else in eval mode."""

AT_LIMIT = 1e-5
"""A gradient whose norm is this near below the limit was clipped already."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Batch:
    """A batch that belongs to no step yet."""

    indices: Indices
    parts: int
    divisor: float | None
    losses: Tensor | None = None
    value: float = float("nan")


@dataclass(kw_only=True, slots=True, eq=False)
class _Taken:
    """What was noted of the batches whose steps are done, a list each with one entry a batch."""

    batches: list[Indices] = field(default_factory=list)
    updates: list[bool] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    divisors: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    settings: list[dict[str, list[float]]] = field(default_factory=list)
    clips: list[tuple[float, float]] = field(default_factory=list)
    active: list[list[bool]] = field(default_factory=list)
    own_losses: list[npt.NDArray[Any] | None] = field(default_factory=list)


class LoopRecorder:
    """Watches a loop.

    Args:
        model: What is trained.
        optimizer: Its optimiser.
        n_train: N.
        seed: Keys the generators.
        scheduler: Moved after each step or epoch; None: the loop moves its own.
        scheduler_interval: Which.
        clip_grad_norm: See ``Recipe``.
        accumulate: Batches a step.
        scaler: The loop's ``GradScaler``, or None.
        checkpoint_every: Batches between checkpoints, or None.

    Attributes:
        done: Batches whose steps are done.
        skipped: Batches of steps that the scaler skipped.
        after_step: Called when a step is done.

    Raises:
        RecipeError: The optimiser has no rule, or the model is no single float32 or float64.
    """

    after_step: Callable[[], None] | None = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        n_train: int,
        seed: int = 0,
        scheduler: Any = None,
        scheduler_interval: Literal["epoch", "step"] = "step",
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
        scaler: Any = None,
        checkpoint_every: int | None = None,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.optimizer, self.scheduler, self.scaler = optimizer, scheduler, scaler
        self.n_train, self.seed, self.accumulate = n_train, seed, accumulate
        self.interval = scheduler_interval
        self.max_norm = max_norm_of(clip_grad_norm)
        _check_numbers(accumulate, seed, scheduler, scheduler_interval)
        self.dtype, self.device = _kind_of(self.model)
        check_optimizer(optimizer, self.model)
        check_owned(optimizer, self.model)
        self.family = family_of(optimizer)
        self.layout = Layout.of(self.model, optimizer.param_groups)
        self.parameters = self.layout.parameters(self.model)
        self.trainable = TrainableSet(self.model)
        names = {id(p): e.name for p, e in zip(self.parameters, self.layout.entries, strict=True)}
        self.update = UpdateCheck(optimizer, names)
        told = state_of(optimizer, self.family, self.parameters).told()
        self.notes = {**loop_notes(optimizer, self.max_norm), **told}
        self.frozen = digest_of_frozen(self.model)
        dimension, itemsize = self.layout.dimension, self.dtype.itemsize
        self.digest_every = DIGEST_EVERY if dimension <= 5_000_000 else 5 * DIGEST_EVERY
        affordable = CHECKPOINT_BYTES // (2 * dimension * itemsize)
        self.kept = Kept(min(CHECKPOINTS, affordable) - 1, checkpoint_every)
        self.done = self.skipped = self.checked = 0
        self.taken = _Taken()
        self.digests: dict[int, int] = {0: checksum(self.parameters)}
        self.ends: list[int] = []
        self.epoch_digest: list[str] = []
        self._group: list[_Batch] = []
        self._opened = False  # generators are seeded for the next batch, and no batch is announced yet
        self._waits = True  # the next forward pass of the model opens a batch
        self._noted = False
        self._said_epochs = False
        self._drawn = self._largest = 0
        self._candidate: str | None = None
        self._buffers: list[tuple[int, Tensor]] = []  # before the step that is being gathered
        self._void = False  # the optimiser itself leaves this step out
        self._next_digest = self.digest_every
        self._clipped: tuple[float, float] | None = None
        self._values: dict[str, list[float]] = {}
        self._present: list[bool] = []
        self._versions: list[int] | None = None
        self._of_gradients: dict[int, int] = {}
        self.first_weights: npt.NDArray[Any] | None = None
        self._hooks: list[Any] = []
        self._gradient_hooks: list[Any] = []
        self._scale = self._scale_now()
        self._keep()

    # ------------------------------------------------------------------ watching

    def watch(self) -> None:
        """Put the hooks on model and optimiser."""
        self._hooks = [m.register_forward_pre_hook(self._forward) for m in self.model.modules()]
        self._hooks.append(self.optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(self.optimizer.register_step_post_hook(self._after_step))

    def close(self) -> None:
        """Take all hooks away and forget the checkpoints."""
        for hook in (*self._hooks, *self._gradient_hooks):
            hook.remove()
        self._hooks, self._gradient_hooks = [], []
        self.kept.close()

    def _forward(self, module: nn.Module, _inputs: Any) -> None:
        """Open a batch at the first forward pass since the last step: that of a loop that only calls `step`."""
        if self._waits and module.training:
            self._open()

    @property
    def begun(self) -> int:
        """Batches announced so far, those of no step yet included: the next one's number."""
        return self.done + len(self._group)

    def begin(self, indices: Any, parts: int | None, divisor: float | None) -> Indices:
        """Begin a batch before its forward pass; return its indices."""
        found = self._indices(indices)
        if self._group:
            self._unstepped()
        self._open()
        self._announce(found, parts, divisor)
        return found

    def _unstepped(self) -> None:
        """Forget a step that the scaler skipped; batches that accumulate wait for theirs.

        Raises:
            RecipeError: The loop said neither.
        """
        scale, count = self._scale_now(), len(self._group)
        if scale is None or self._scale is None or not scale < self._scale:
            if self.accumulate > 1:
                return
            raise RecipeError(
                f"batch {self.begun} begins and the one before it made no step of the optimizer, where accumulate is 1; say accumulate=K "
                "for K batches a step, or scaler=... where a GradScaler skips steps"
            )
        if pack_buffers(self.model) != self._packed_before():
            raise RecipeError(
                f"the scaler skipped the step of batch {self.done}, whose forward pass moved buffers of the model (batch "
                "statistics?), which no replay can follow; use bf16, which needs no scaler, or a smaller init_scale"
            )
        self.skipped += count
        self._scale = scale
        self._group = []

    def _scale_now(self) -> float | None:
        return None if self.scaler is None else float(self.scaler.get_scale())

    def _open(self) -> None:
        """Look at what must hold before a batch, and seed the generators of its forward pass."""
        self._waits, self._opened = False, True
        if not self._group:
            self._open_step()
        seed_everything(derived_seed(self.seed, "step", self.begun))

    def _open_step(self) -> None:
        if self._versions is not None and self._versions != self._versions_now():
            raise RecipeError(
                f"parameters or buffers were changed between the steps of batches {self.done - 1} and {self.done}, which no replay "
                "can follow; let only the optimizer's step and training batches change the model"
            )
        self._noted = self.done < CHECKED or self.done + self.accumulate >= self._next_digest
        if self._noted:
            self._check_modes()
            self.trainable.check_identity(self.done, self.done + 1)
            self.update.before()
        self._watch_gradients(self.done < CHECKED and self.scaler is None)
        self._copy_buffers()
        ends = self._drawn and self._drawn + self._largest > self.n_train
        self._candidate = self._state_digest() if ends and not self._said_epochs else None

    def _copy_buffers(self) -> None:
        """Keep the buffers as they are before a step: that may be left out."""
        buffers = list(self.model.buffers())
        known = self._buffers if len(self._buffers) == len(buffers) else [(-1, b) for b in buffers]
        self._buffers = [
            (version, copy) if buffer._version == version else (buffer._version, buffer.detach().clone())
            for buffer, (version, copy) in zip(buffers, known, strict=True)
        ]

    def _packed_before(self) -> bytes:
        return b"".join(raw_bytes(copy) for _version, copy in self._buffers)

    def _check_modes(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, MODES) and not module.training:
                raise RecipeError(
                    f"layer {name!r} ({type(module).__name__}) is in eval mode at training batch {self.done}, and a replay trains in "
                    "train mode; call model.train() before the batch"
                )

    def _announce(self, indices: Indices, parts: int | None, divisor: float | None) -> None:
        self._opened = False
        number = self.begun
        if divisor is not None and not (0 < divisor < float("inf")):
            raise RecipeError(f"divisor is {divisor!r} for batch {number}; it must be a positive number")
        if parts is not None and (isinstance(parts, bool) or not isinstance(parts, int) or parts < 1):
            raise RecipeError(
                f"parts is {parts!r} for batch {number}; it must be a whole number of at least 1"
            )
        if self._said_divisor() not in (None, divisor is not None):
            raise RecipeError(
                f"batch {number} has {'a' if divisor is not None else 'no'} divisor and the batches before it have "
                f"{'none' if divisor is not None else 'one'}; say it for all batches, or for none"
            )
        if not self._group:
            self._end_if_full(len(indices))
        self._drawn += len(indices)
        self._largest = max(self._largest, len(indices))
        self._group.append(_Batch(indices=indices, parts=parts or self.accumulate, divisor=divisor))

    def _said_divisor(self) -> bool | None:
        """Whether batches come with a divisor; None: there is none yet."""
        if self._group:
            return self._group[0].divisor is not None
        return not np.isnan(self.taken.divisors[0]) if self.taken.divisors else None

    def _end_if_full(self, size: int) -> None:
        """End an epoch where the next batch would be more than N samples, unless the loop says its epochs."""
        if self._candidate is None or self._drawn + size <= self.n_train:
            return
        self._drawn = max(0, self._drawn - self.n_train)
        self._close_epoch(self._candidate)

    def _indices(self, given: Any) -> Indices:
        found = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
            raise RecipeError(
                f"indices of batch {self.begun} are {found.dtype} of shape {found.shape}; give the training indices of its "
                "samples, a flat list"
            )
        wrong = found[(found < 0) | (found >= self.n_train)]
        if len(wrong):
            raise RecipeError(
                f"batch {self.begun} holds the training index {wrong[0]}; indices go from 0 to {self.n_train - 1}"
            )
        return found.astype(np.int32)

    # ------------------------------------------------------------------ steps that are ours

    def step(self, indices: Any, losses: Tensor, parts: int | None, divisor: float | None) -> Tensor:
        """Differentiate a batch's losses and step where its group is full; return what was differentiated.

        Raises:
            RecipeError: The losses are not one a sample, or nothing opened the batch.
            NonFiniteLoss: One is NaN or infinite.
        """
        found = self._indices(indices)
        if self.scaler is not None:
            raise RecipeError(
                "step() takes no scaler; call batch() and let the loop do scaler.scale(), scaler.step() and scaler.update()"
            )
        announced = self._group and self._group[-1].losses is None
        if announced and not np.array_equal(self._group[-1].indices, found):
            raise RecipeError(
                f"step() was given other indices than batch() before it (batch {self.begun - 1}); give both the same"
            )
        if not announced:
            if not self._opened:
                raise RecipeError(
                    f"no forward pass of the model in train mode was seen before step() of batch {self.begun}, so that its random "
                    "draws are not keyed; call batch(indices) before the forward pass"
                )
            self._announce(found, parts, divisor)
        batch, number = self._group[-1], self.begun - 1
        if not isinstance(losses, Tensor) or losses.shape != (len(found),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise RecipeError(
                f"losses of batch {number} are {got} and must have shape ({len(found)},); use reduction='none' and average over "
                "everything but the batch axis"
            )
        batch.losses = losses.detach()
        if batch.divisor is not None:
            value = losses.sum() / batch.divisor
        else:
            value = losses.mean() if batch.parts == 1 else losses.mean() / batch.parts
        batch.value = float(losses.detach().mean())
        if not np.isfinite(batch.value):
            own = losses.detach().double().cpu().numpy()
            raise NonFiniteLoss(
                f"the loss of batch {number} is {batch.value} (train_index {listed(found[~np.isfinite(own)].tolist())}); lower the "
                "learning rate or look at these samples"
            )
        if len(self._group) == 1:
            for parameter in self.parameters:
                parameter.grad = None
        value.backward()
        if len(self._group) >= self.accumulate:
            self.optimizer.step()
        self._waits = True
        return value.detach()

    def clip(self) -> Tensor:
        """Clip the gradient as the step would, now; return its norm.

        Raises:
            RecipeError: ``clip_grad_norm`` was not given.
        """
        if self.max_norm is None:
            raise RecipeError("clip() needs to know how far: say recording(..., clip_grad_norm=1.0)")
        self._check_gradients()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        before = float(nn.utils.get_total_norm(gradients))
        if (1 - AT_LIMIT) * self.max_norm <= before <= self.max_norm * (1 + 1e-6):
            raise RecipeError(
                f"the gradient of batch {self.begun - 1} comes in with norm {before:.7g}, clipped at {self.max_norm} already; leave the "
                "loop's clip_grad_norm_ out: the recording clips, just before the step or at rec.clip()"
            )
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self._clipped = clipped(norm, self.max_norm)
        return norm

    def end_epoch(self) -> None:
        """End an epoch here; a step that is ours is taken with the batches there are."""
        if not self._said_epochs:
            self.ends, self.epoch_digest, self._said_epochs = [], [], True
        if self._group and self._group[-1].losses is not None:
            self.optimizer.step()
        if self._group:
            raise RecipeError(
                f"end_epoch() was called after {len(self._group)} batches without a step of the optimizer; step first"
            )
        if self.done > (self.ends[-1] if self.ends else 0):
            self._close_epoch(self._state_digest())

    def _close_epoch(self, digest: str) -> None:
        self._candidate = None
        self.ends.append(self.done)
        self.epoch_digest.append(digest)
        if self.scheduler is not None and self.interval == "epoch":
            self.scheduler.step()

    # ------------------------------------------------------------------ the optimiser's step

    def _before_step(self, _optimizer: Any, args: Any, kwargs: Any) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):  # the first is the optimiser
            raise RecipeError(
                "optimizer.step(closure) is not followed; call backward() first and step() without one"
            )
        if not self._group:
            raise RecipeError(
                f"optimizer.step() after batch {self.done - 1} and before the next batch(indices): say which samples the step is of"
            )
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise RecipeError(
                "the fused optimizer divides by the scale inside of its step; call scaler.unscale_(optimizer) before scaler.step()"
            )
        found_inf = getattr(self.optimizer, "found_inf", None)
        self._void = found_inf is not None and float(found_inf) > 0
        if self._void:
            return
        for name, p in zip((e.name for e in self.layout.entries), self.parameters, strict=True):
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise RecipeError(f"parameter {name!r} has a sparse gradient; use Embedding(sparse=False)")
        if self._clipped is None:
            self._check_gradients()
            if self.max_norm is not None:
                self.clip()
        self.trainable.check(self.done, self.done + 1)
        present = [p.grad is not None for p in self.parameters]
        self._present = self._present if present == self._present else present  # held once, not T times
        optimised = [e.group >= 0 for e in self.layout.entries]
        if not any(m and o for m, o in zip(self._present, optimised, strict=True)):
            raise RecipeError(
                f"no parameter that is optimised has a gradient at the step of batch {self.begun - 1}; call backward() before step()"
            )
        groups = [self.family.read(group) for group in self.optimizer.param_groups]
        values = {name: [group[name] for group in groups] for name in self.family.settings}
        self._values = self._values if values == self._values else values
        if self._noted:
            self.update.settle()

    def _after_step(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if self._void:  # the next batch finds a group without a step
            return
        group, self._group = self._group, []
        step = self.done + len(group) - 1
        taken = self.taken
        for k, batch in enumerate(group):
            taken.batches.append(batch.indices)
            taken.updates.append(k == len(group) - 1)
            taken.parts.append(batch.parts)
            taken.divisors.append(float("nan") if batch.divisor is None else batch.divisor)
            taken.loss.append(batch.value)
            taken.settings.append(self._values)
            taken.clips.append(self._clipped or (float("nan"), 1.0))
            taken.active.append(self._present)
            early = self.done + k < CHECKED and batch.losses is not None
            taken.own_losses.append(
                batch.losses.cpu().numpy() if early and batch.losses is not None else None
            )
        self._clipped = None
        if not self.done:
            self.first_weights = flatten(self.parameters).cpu().numpy()
        self.done = step + 1
        if self._noted:
            self.update.after(step)
            self.checked += 1
        if self.scheduler is not None and self.interval == "step":
            before = self._versions_now()
            self.scheduler.step()
            if self._versions_now() != before:
                raise RecipeError(
                    f"scheduler.step() changed the model after batch {step}, which no replay can follow; let it change settings "
                    "of the optimizer alone"
                )
        self._versions, self._scale = self._versions_now(), self._scale_now()
        if self.done >= self._next_digest or self.done <= CHECKED:
            self.digests[self.done] = checksum(self.parameters)
            self._next_digest = (self.done // self.digest_every + 1) * self.digest_every
        if self.kept.due(self.done):
            self._keep()
        if self.after_step is not None:
            self.after_step()

    def _versions_now(self) -> list[int]:
        """How often each parameter and buffer was written to in place."""
        return [tensor._version for tensor in (*self.model.parameters(), *self.model.buffers())]

    def _watch_gradients(self, wanted: bool) -> None:
        """Note how often each gradient was written to when its backward pass was done."""
        if wanted and not self._gradient_hooks:
            self._gradient_hooks = [
                p.register_post_accumulate_grad_hook(self._note_gradient) for p in self.parameters
            ]
        if not wanted and self._gradient_hooks:
            for hook in self._gradient_hooks:
                hook.remove()
            self._gradient_hooks = []
        self._of_gradients = {}

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._of_gradients[id(parameter)] = parameter.grad._version

    def _check_gradients(self) -> None:
        """Raise where something wrote to a gradient after the backward pass."""
        for p, entry in zip(self.parameters, self.layout.entries, strict=True):
            noted = self._of_gradients.get(id(p))
            if self._gradient_hooks and noted is not None and p.grad is not None and p.grad._version != noted:
                raise RecipeError(
                    f"the gradient of {entry.name!r} was changed between backward() and the step of batch {self.begun - 1} "
                    "(clip_grad_norm_?); leave that out and say recording(..., clip_grad_norm=1.0), which clips before the step"
                )

    # ------------------------------------------------------------------ what is written

    def _keep(self) -> None:
        self.kept.add(self.done, self._state(pack_buffers(self.model)))

    def _state(self, buffers: bytes) -> dict[str, Any]:
        state = state_of(self.optimizer, self.family, self.parameters)
        return {"weights": flatten(self.parameters).cpu().numpy(), "buffers": buffers, **state.stored()}

    def _state_digest(self, packed: bytes | None = None) -> str:
        digest = hashlib.sha256()
        for tensor in self.parameters:
            digest.update(raw_bytes(tensor))
        digest.update(pack_buffers(self.model) if packed is None else packed)
        return digest.hexdigest()

    def so_far(self) -> LoopRecord:
        """Return what the record says of the steps that are done."""
        first = self.kept.state(0)
        ends = tuple(sorted({*self.ends, self.done}))
        return LoopRecord(
            schedule=schedule_of_batches(
                self._batches(), np.array(self.taken.updates), ends, self._divided()
            ),
            settings=self._settings(),
            optimizer=self.notes,
            parameters=self.layout.entries,
            frozen=self.frozen,
            seed=self.seed,
            start=lambda: Checkpoint(step=0, **first),
        )

    def _batches(self) -> Indices:
        return padded(self.taken.batches, max(len(row) for row in self.taken.batches))

    def _divided(self) -> RecordedBatches:
        weighted = not np.isnan(self.taken.divisors[0])
        return RecordedBatches(
            n_train=self.n_train,
            parts=None if weighted else np.array(self.taken.parts, dtype=np.int64),
            divisors=np.array(self.taken.divisors) if weighted else None,
        )

    def _settings(self) -> dict[str, npt.NDArray[Any]]:
        taken = self.taken.settings
        return {name: np.array([values[name] for values in taken]) for name in self.family.settings}

    def finish(self) -> list[str]:
        """Close the last epoch; return what is left out, one line each.

        Raises:
            RecipeError: No step was taken.
        """
        if not self.done:
            raise RecipeError(
                "0 steps of the optimizer were recorded; call rec.step(indices, losses), or rec.batch(indices) before each forward pass"
            )
        notes = []
        packed = pack_buffers(self.model)
        if self._group:
            notes.append(
                f"the last {len(self._group)} batches made no step of the optimizer and are not in the record"
            )
            packed = self._packed_before()
        if self.skipped:
            notes.append(f"{self.skipped} batches whose step the scaler skipped are not in the record")
        self.digests.setdefault(self.done, checksum(self.parameters))
        if self.done not in self.kept.steps:
            self.last = self._state(packed)
        else:
            self.last = self.kept.state(self.done)
            self.last["buffers"] = packed
        if not self.ends or self.ends[-1] < self.done:
            self.ends.append(self.done)
            self.epoch_digest.append(self._state_digest(packed))
        return notes

    def write(self, uri: str) -> None:
        """Write the trajectory."""
        schedule = self.so_far().schedule
        kept = sorted({*self.kept.steps, self.done})
        notes = self.notes
        settings, sometimes = always_and_sometimes(self._settings())
        sizes = (schedule.batches >= 0).sum(1)
        weighted = self._divided().divisors is not None
        parts = np.array(self.taken.parts, dtype=np.float64)
        if weighted:
            sometimes["divisor"] = np.array(self.taken.divisors)
        elif (parts != 1).any():
            sometimes["divisor"] = sizes * parts
        if schedule.accumulates:
            sometimes["updates"] = schedule.updates
        if self.max_norm is not None:
            clips = np.array(self.taken.clips)
            sometimes |= {"clip_norm": clips[:, 0], "clip_factor": clips[:, 1]}
        active = np.array(self.taken.active)
        if not active.all():
            sometimes["active"] = active
        entries = self.layout.entries
        coefficient = stored_coefficients(
            Recorded(parameters=entries, batches=schedule.batches, optimizer=notes, **settings, **sometimes)
        )
        with TrajectoryWriter(
            uri,
            dimension=self.layout.dimension,
            dtype=str(self.dtype).removeprefix("torch."),
            checkpoint_steps=kept,
            buffer_bytes=len(self.last["buffers"]),
            parameter_count=len(entries),
            moments=self.family.counts,
        ) as writer:
            for k, step in enumerate(kept):
                state = self.last if step == self.done else self.kept.state(step)
                writer.write_checkpoint(k, step, **state)
            writer.finish(
                batches=schedule.batches,
                **settings,
                coefficient=coefficient,
                sometimes=sometimes,
                loss=np.array(self.taken.loss),
                digest_step=np.array(sorted(self.digests), dtype=np.int64),
                digest=np.array([self.digests[k] for k in sorted(self.digests)], dtype=np.uint32),
                epoch_digest=self.epoch_digest,
                parameters=entries,
                epochs={"train_loss": self._epoch_losses(sizes)},
                attrs={
                    "recorded": LOOP,
                    "n_train": self.n_train,
                    "batch_size": int(schedule.batches.shape[1]),
                    "seed": self.seed,
                    "epochs": len(self.ends),
                    "steps_per_epoch": self.ends[0],
                    "epoch_ends": list(self.ends),
                    "optimizer": notes,
                    "frozen": self.frozen,
                    **({"weighted": True} if weighted else {}),
                    "environment": fingerprint(self.device),
                },
            )

    def _epoch_losses(self, sizes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        loss, found, begun = np.array(self.taken.loss), [], 0
        for end in self.ends:
            found.append(float(np.average(loss[begun:end], weights=sizes[begun:end])))
            begun = end
        return np.array(found)


def _check_numbers(accumulate: object, seed: object, scheduler: Any, interval: str) -> None:
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise RecipeError(f"accumulate is {accumulate!r}; it must be a whole number of at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise RecipeError(f"seed is {seed!r}; it must be a whole number of at least 0")
    if interval not in ("epoch", "step"):
        raise RecipeError(f"scheduler_interval is {interval!r}; use one of epoch, step")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise RecipeError(
            "scheduler is a ReduceLROnPlateau, which needs a loss to look at; leave it out and move it in the loop"
        )


def _kind_of(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and device of a model.

    Raises:
        RecipeError: They are several, or none that a replay trains with.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise RecipeError(
            f"the model is a {type(model).__name__}, and a record is that of one process; give model.module, trained alone"
        )
    named: Sequence[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    floating = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    for name, tensor in floating:
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != floating[0][1].dtype:
            raise RecipeError(
                f"{name!r} of the model is {tensor.dtype} and a replay trains with all of it in float32 or float64; call "
                "model.float(), and torch.autocast in the forward pass for speed"
            )
        if tensor.device.type not in ("cpu", "cuda") or tensor.device != floating[0][1].device:
            raise RecipeError(
                f"{name!r} of the model is on {tensor.device} and a replay trains on one CPU or CUDA device; move the model there"
            )
    if not floating:
        raise RecipeError("the model has 0 floating parameters; give the model that is trained")
    return floating[0][1].dtype, floating[0][1].device
