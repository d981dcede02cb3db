"""A batch run forward and backward at weights that stay: rows without a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..persample.engine import PerSampleGradients, TakeRows
from ..persample.reference import constant_statistics
from ..recipe import Batch
from .training import Training


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FixedPass:
    """What a pass left behind, until the engine's next one.

    Attributes:
        engine: Holds the pieces of the rows.
        positions: (B,) of all samples of the batch.
        losses_B: Their losses.
        whole: Gradient of the mean loss, a tensor a parameter; None where there is no path.
    """

    engine: PerSampleGradients
    positions: Tensor
    losses_B: Tensor
    whole: list[Tensor | None]

    def rows(self, sink: TakeRows) -> None:
        """Hand over the gradients of all samples, a tile at a time; once."""
        self.engine.hand_over(self.positions, len(self.positions), sink)


@contextmanager
def fixed_pass(
    training: Training,
    engine: PerSampleGradients,
    batch: Batch,
    size: int,
    compute: Callable[[], Tensor] | None = None,
) -> Iterator[FixedPass]:
    """Run a batch; what it left is good inside the block.

    The model's mode and the generators are the caller's. Batch statistics, where the mode uses them, are
    constants; what the optimiser sees is not touched.

    Args:
        training: Gives model, losses and parameters.
        engine: Of its model.
        batch: On the device.
        size: B.
        compute: Returns the losses, (B,); None: ``training.losses``.
    """
    positions = torch.arange(size, device=training.device)
    whole: list[Tensor | None] = []
    with constant_statistics(training.model):
        losses_B = engine.trace(
            batch,
            positions,
            size,
            compute or partial(training.losses, batch, size),
            lambda losses: whole.extend(training.gradient_of(losses.mean())),
        )
        yield FixedPass(engine=engine, positions=positions, losses_B=losses_B, whole=whole)
