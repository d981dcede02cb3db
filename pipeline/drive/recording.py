"""A record of a training loop that is not ours: `recording`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

    from ...workers.recipe import Recipe

    Indices = Sequence[int] | npt.NDArray[np.integer] | Tensor


def recording(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    out: str | os.PathLike[str],
    recipe: Recipe | str | None = None,
    scheduler: Any = None,
    scheduler_interval: Literal["epoch", "step"] = "step",
    clip_grad_norm: float | None = None,
    accumulate: int = 1,
    scaler: Any = None,
    seed: int = 0,
    n_train: int | None = None,
    checkpoint_every: int | None = None,
    threads: int = 1,
    check: int = 8,
    overwrite: bool = False,
) -> Recording:
    """Record a training loop of your own; use it as ``with recording(...) as rec:``.

    In the loop, either call ``rec.step(indices, losses)`` in the place of zero_grad, backward, clipping and
    ``optimizer.step()``, or ``rec.batch(indices)`` before each forward pass and leave the rest as it is.
    When the block ends, ``out`` holds a record; when it raises, nothing.

    Args:
        model: What is trained, on its device, in float32 or float64.
        optimizer: Its optimiser; one with a rule (SGD, Adam, AdamW).
        out: Run directory.
        recipe: What a replay is made from (model, data and losses): an instance, or ``file.py:Class``. The first
            batches are replayed with it at once. None: nothing is checked before the first replay.
        scheduler: Moved by ``rec.step`` after each step of the optimiser, or by ``rec.end_epoch``. Leave it out
            where the loop moves its own.
        scheduler_interval: When.
        clip_grad_norm: Largest norm of a step's gradient. Clipped by ``rec.step``, or just before the optimiser's
            step, or where the loop calls ``rec.clip()``: a loop's own ``clip_grad_norm_`` must go.
        accumulate: Batches a step of the optimiser; the mean of each batch is divided by it.
        scaler: The loop's ``GradScaler``, whose skipped steps are then left out.
        seed: Keys the generators of each batch.
        n_train: Size of the training set; None: the recipe's, or the largest index and one.
        checkpoint_every: Batches between checkpoints; None: about 20 in all.
        threads: CPU threads of torch meanwhile; the replay needs the same (``--threads``).
        check: First batches that are replayed at once; 0: none.
        overwrite: Replace a run that is at ``out``.

    Raises:
        RecipeError: The optimiser has no rule, or see ``Recording``.
        StoreError: ``out`` holds something.
    """
    raise NotImplementedError


class Recording:
    """What `recording` returns.

    Attributes:
        uri: The run directory.
        done: Batches so far.
        notes: What was left out of the record, one line each.
    """

    uri: str
    done: int
    notes: list[str]

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError

    def batch(
        self, indices: Indices, *, inputs: Any = None, parts: int | None = None, divisor: float | None = None
    ) -> None:
        """Begin a batch: call it before its forward pass, which draws from generators that are seeded here.

        Args:
            indices: Training indices of its samples, in order.
            inputs: Tensors of the batch, to be compared with what the recipe's dataset gives for these indices.
            parts: What the mean of its losses is divided by; None: ``accumulate``.
            divisor: What the sum of its losses is divided by instead, such as all tokens of the step.
        """
        raise NotImplementedError

    def step(
        self, indices: Indices, losses: Tensor, *, parts: int | None = None, divisor: float | None = None
    ) -> Tensor:
        """Take the losses of a batch, (B,), unreduced: backward, and after ``accumulate`` batches the step.

        Returns:
            What was differentiated, detached.
        """
        raise NotImplementedError

    def clip(self) -> Tensor:
        """Clip the gradient now, as the step would; return its norm."""
        raise NotImplementedError

    def end_epoch(self) -> None:
        """End an epoch. Not called at all: a batch that repeats a sample begins one."""
        raise NotImplementedError
