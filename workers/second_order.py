"""Hessian products and per-sample directional derivatives of one batch, exact, from one graph.

With a dummy weight u_i per sample (value 1/B), ``q = d (sum_i u_i loss_i) / d w`` is the batch
gradient as a function of (u, w). For any direction v, differentiating ``<q, v>`` once gives both

    d <q, v> / d u_i = <g_i, v>          (every sample's directional derivative)
    d <q, v> / d w   = H v               (the Hessian of the batch loss, without regulariser)

so a direction costs one backward pass through the gradient's own graph (Pearlmutter 1994). Nothing
is approximated: BatchNorm couples the batch through its statistics here as it does in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .determinism import derived_seed, seed_everything
from .recipe import Batch
from .training import Training


class SecondOrder:
    """The batch of one step at the model's present weights, ready for any number of directions.

    Args:
        training: Model, recipe and layout; its buffers are left as they were.
        step: Whose dropout masks to draw.
        batch: The step's batch, on the device.
    """

    def __init__(self, training: Training, step: int, batch: Batch) -> None:
        self.training = training
        size = training.batch_size(step)
        seed_everything(derived_seed(training.recipe.seed, "step", step))
        # Fused attention kernels have no second derivative; the plain formula has.
        with unchanged_buffers(training.model), sdpa_kernel(SDPBackend.MATH):
            losses_B = training.losses(batch, size)
        self.share = torch.full_like(losses_B, 1.0 / size, requires_grad=True)
        with sdpa_kernel(SDPBackend.MATH):
            self.gradient = torch.autograd.grad(
                losses_B, training.parameters, self.share, create_graph=True, allow_unused=True
            )
        self.used = [i for i, g in enumerate(self.gradient) if g is not None and g.requires_grad]

    def apply(self, direction_D: Tensor, out_D: Tensor) -> Tensor:
        """Write H v into ``out_D`` (D,) and return <g_i, v> for the samples of the batch, (B,)."""
        layout, parameters = self.training.layout, self.training.parameters
        starts = [entry.start for entry in layout.entries]
        directions = [
            direction_D[starts[i] : starts[i] + layout.size(i)].view_as(parameters[i]) for i in self.used
        ]
        found = torch.autograd.grad(
            [self.gradient[i] for i in self.used],
            [self.share, *parameters],
            directions,
            retain_graph=True,
            allow_unused=True,
        )
        for i, product in enumerate(found[1:]):
            target = out_D[starts[i] : starts[i] + layout.size(i)]
            if product is None:
                target.zero_()
            else:
                target.copy_(product.reshape(-1))
        assert found[0] is not None
        return found[0]


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers (running statistics), and put its own back.

    Copies are swapped in, not written back: a graph that saw a buffer must find it as it was.
    """
    own = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for module, name, buffer in own:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in own:
            module._buffers[name] = buffer
