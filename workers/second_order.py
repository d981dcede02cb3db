"""Hessian products and per-sample directional derivatives of one batch, exact.

For a direction v at the weights w, both of

    <g_i, v>    every sample's directional derivative
    H v         the Hessian of the batch loss, without regulariser

Nothing is approximated: BatchNorm couples the batch through its statistics here as it does in training,
and dropout draws the masks of the training step. Two ways, the same numbers to rounding:

- ``SecondOrder``: with a dummy weight u_i per sample (value 1/B), ``q = d (sum_i u_i loss_i) / d w`` is
  the batch gradient as a function of (u, w), and one backward pass through its graph gives
  ``d <q, v> / d u_i = <g_i, v>`` and ``d <q, v> / d w = H v`` (Pearlmutter 1994). One pass a direction;
  right for anything that has second derivatives.
- ``TangentTile``: the tangent along v of ``w -> (batch gradient, losses)``, forward differentiation over
  the backward pass. What belongs to w alone is computed once a tile, what belongs to the directions
  for all K of them at once.

``hessian_tiles`` chooses between the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .determinism import derived_seed, seed_everything
from .persample.reference import LossModule, differentiable_layers
from .recipe import Batch
from .training import Training

Named = dict[str, Tensor]


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

    def tile(self, directions_KD: Tensor, out_KD: Tensor) -> Tensor:
        """Write H v for each direction into ``out_KD`` and return the <g_i, v>, (K, B)."""
        return torch.stack([self.apply(v, out) for v, out in zip(directions_KD, out_KD, strict=True)])

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


class TangentTile:
    """The same for a whole tile of directions at once; arguments as for ``SecondOrder``.

    A direction's bits may depend on the number K of directions it is computed with.
    """

    def __init__(self, training: Training, step: int, batch: Batch) -> None:
        self.training, self.step, self.batch = training, step, batch
        self._losses = LossModule(training.recipe, training.model)
        self._names = [f"model.{entry.name}" for entry in training.layout.entries]
        self._weights = {
            name: parameter.detach() for name, parameter in zip(self._names, training.parameters, strict=True)
        }

    def tile(self, directions_KD: Tensor, out_KD: Tensor) -> Tensor:
        """Write H v for each direction into ``out_KD`` and return the <g_i, v>, (K, B)."""
        training, count = self.training, len(directions_KD)
        spans = [
            (entry.start, entry.start + training.layout.size(i))
            for i, entry in enumerate(training.layout.entries)
        ]
        tangents = {
            name: directions_KD[:, start:stop].reshape(count, *entry.shape)
            for name, (start, stop), entry in zip(self._names, spans, training.layout.entries, strict=True)
        }
        seed_everything(derived_seed(training.recipe.seed, "step", self.step))
        with (
            unchanged_buffers(training.model),
            differentiable_layers(training.model),
            sdpa_kernel(SDPBackend.MATH),
        ):
            products, values_KB = self._tangents(tangents, count)
        for name, (start, stop) in zip(self._names, spans, strict=True):
            out_KD[:, start:stop] = products[name].reshape(count, -1)
        return values_KB

    def _tangents(self, tangents: Named, count: int) -> tuple[Named, Tensor]:
        if count == 1:
            products, values = self._along({name: tangent[0] for name, tangent in tangents.items()})
            return {name: product[None] for name, product in products.items()}, values[None]
        # "same": the masks belong to w, not to the directions.
        found: tuple[Named, Tensor] = vmap(self._along, randomness="same")(tangents)
        return found

    def _along(self, tangent: Named) -> tuple[Named, Tensor]:
        """Return (H v, <g_i, v>) for one direction."""
        found: tuple[Named, Tensor] = jvp(self._gradient, (self._weights,), (tangent,))[1]
        return found

    def _gradient(self, weights: Named) -> tuple[Named, Tensor]:
        """Return the batch gradient and the losses (B,)."""

        def mean(weights: Named) -> tuple[Tensor, Tensor]:
            losses_B: Tensor = functional_call(self._losses, weights, (self.batch,))
            return losses_B.mean(), losses_B

        found: tuple[Named, Tensor] = grad(mean, has_aux=True)(weights)
        return found


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
