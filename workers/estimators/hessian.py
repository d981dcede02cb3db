"""Products with the Hessian of the whole training loss at fixed weights.

    A v = (1/N) sum_i (d^2 loss_i / d w^2) v + L v + damping v

in eval mode, over mini-batches, exact (Pearlmutter 1994: the gradient of <gradient, v>); L is the
recorded weight decay. Parameters that the optimiser does not hold never move: their rows and
columns are left out. Vectors are float64 whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten

from ...storage.errors import EstimatorError
from ..determinism import preserved_generators
from ..hessian.differences import unlike_differences
from ..persample.reference import constant_statistics, twice_differentiable_layers
from ..recipe import Batch
from ..training.metrics import evaluating
from .base import Integers
from .fixed import FixedWeights

KEPT_BYTES = 256 << 20
"""Training data that is kept on the device between products; beyond it is fetched again."""

BATCH_BYTES, MOST_SAMPLES = 1 << 20, 1024
"""Input of a mini-batch of products: small samples go together in more than the recipe's batches."""


class LossHessian:
    """The Hessian of the regularised training loss at the weights that ``fixed`` holds.

    Args:
        fixed: Model and data.
        damping: Added to the diagonal.
    """

    def __init__(self, fixed: FixedWeights, damping: float) -> None:
        self.fixed, self.damping = fixed, damping
        one = _bytes(fixed.fetch(fixed.training.dataset, np.arange(1)))
        together = min(MOST_SAMPLES, BATCH_BYTES // max(1, one))
        self.size = max(together, fixed.training.recipe.batch_size)
        self._kept: dict[int, Batch] = {}
        self._room = KEPT_BYTES
        self.calls = 0
        self._check()

    def _check(self) -> None:
        """Hold the Hessian against differences of the gradient, once, on one batch of the recipe's size.

        Raises:
            EstimatorError: The loss's second derivatives are not those of its gradient; names the parameter.
        """
        training = self.fixed.training
        indices = np.arange(min(training.recipe.batch_size, training.n_train))
        with evaluating(training.model), preserved_generators():
            name = unlike_differences(training, self.fixed.fetch(training.dataset, indices), indices)
        if name is not None:
            raise EstimatorError(
                f"the second derivative of the loss by parameter {name!r} is not the derivative of its gradient: something "
                "in losses() is detached, or a backward pass has no right derivative; use tracin or gradient-dot, which "
                "need none"
            )

    def __call__(self, vectors_QD: Tensor) -> Tensor:
        """Return A v for each row, (Q, D) float64; each row's bits are its own."""
        self.calls += 1
        total = self.fixed.training.n_train
        out = torch.zeros_like(vectors_QD)
        for batch, size in self._batches():
            self._add(batch, size, size / total, vectors_QD, out)
        return self._finish(out, vectors_QD)

    def on(self, indices: Integers, vectors_QD: Tensor) -> Tensor:
        """Return the same with the mean over the given samples in place of all, (Q, D)."""
        out = torch.zeros_like(vectors_QD)
        batch = self.fixed.fetch(self.fixed.training.dataset, indices)
        self._add(batch, len(indices), 1.0, vectors_QD, out)
        return self._finish(out, vectors_QD)

    def _finish(self, out: Tensor, vectors_QD: Tensor) -> Tensor:
        return (out + (self.fixed.decay + self.damping) * vectors_QD) * self.fixed.optimised

    def _batches(self) -> Iterator[tuple[Batch, int]]:
        training = self.fixed.training
        for start in range(0, training.n_train, self.size):
            stop = min(training.n_train, start + self.size)
            batch = self._kept.get(start)
            if batch is None:
                batch = self.fixed.fetch(training.dataset, np.arange(start, stop))
                held = _bytes(batch)
                if held <= self._room:
                    self._kept[start] = batch
                    self._room -= held
            yield batch, stop - start

    def _add(self, batch: Batch, size: int, weight: float, vectors_QD: Tensor, out_QD: Tensor) -> None:
        """Add ``weight`` times the mean loss's Hessian products to ``out_QD``."""
        training = self.fixed.training
        layout, parameters = training.layout, training.parameters
        # Fused attention kernels have no second derivative; the plain formula has.
        with (
            evaluating(training.model),
            constant_statistics(training.model),
            twice_differentiable_layers(training.model),
            sdpa_kernel(SDPBackend.MATH),
        ):
            loss = training.losses(batch, size).mean()
            gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            used = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]
            if not used:  # the loss is linear in the weights
                return
            starts = [entry.start for entry in layout.entries]
            for vector, out in zip(vectors_QD, out_QD, strict=True):
                cast = (vector * self.fixed.optimised).to(training.dtype)
                directions = [
                    cast[starts[i] : starts[i] + layout.size(i)].view_as(parameters[i]) for i in used
                ]
                found = torch.autograd.grad(
                    [gradient[i] for i in used], parameters, directions, retain_graph=True, allow_unused=True
                )
                for i, product in enumerate(found):
                    if product is not None:
                        span = slice(starts[i], starts[i] + layout.size(i))
                        out[span] += weight * product.reshape(-1).double()


def _bytes(batch: Batch) -> int:
    leaves = tree_flatten(batch)[0]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
