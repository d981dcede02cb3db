"""Hessian products and per-sample directional derivatives of one batch, exact.

For a direction v at the weights w, both of

    <g_i, v>    every sample's directional derivative
    H v         the Hessian of the batch loss, without regulariser

Where the update is not the gradient of its loss (see ``update_field``) the Hessian's place is taken by
the derivative J of the batch gradient as ``backward`` gives it, or by its transpose.

Nothing is approximated: BatchNorm couples the batch through its statistics here as it does in training,
and dropout draws the masks of the training step. Two ways, the same numbers to rounding:

- ``SecondOrder``: with a dummy weight u_i per sample (value 1/B), ``q = d (sum_i u_i loss_i) / d w`` is
  the batch gradient as a function of (u, w), and one backward pass through its graph gives
  ``d <q, v> / d u_i = <g_i, v>`` and ``d <q, v> / d w = H v`` (Pearlmutter 1994). One pass a direction;
  right for anything that has second derivatives.
- ``TangentTile``: the tangent along v of ``w -> (batch gradient, losses)``, forward differentiation over
  the backward pass. What belongs to w alone is computed once a tile, what belongs to the directions
  for all Q of them at once.
- ``FieldSecondOrder`` and ``FieldTangentTile``: the same where something is detached; J^T v and J v.

``tiles`` chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from ..determinism import derived_seed, seed_everything
from ..model.autocast import full_precision
from ..model.state import own_parameters, unchanged_buffers
from ..persample.reference import LossModule, differentiable_layers, twice_differentiable_layers
from ..recipe import Batch
from ..training.training import Training
from ..training.update_field import backward_through, forward_through, outer_derivative, stopped

Named = dict[str, Tensor]


class SecondOrder:
    """The batch of one step at the model's present weights, ready for any number of directions.

    Gives J^T v in place of H v where J is not symmetric.

    Args:
        training: Model, recipe and layout; its buffers are left as they were.
        step: Whose dropout masks to draw.
        batch: The step's batch, on the device.

    Attributes:
        losses: Own losses of the samples at these weights, (B,).
    """

    def __init__(self, training: Training, step: int, batch: Batch) -> None:
        self.training = training
        size = training.batch_size(step)
        seed_everything(derived_seed(training.recipe.seed, "step", step))
        with unchanged_buffers(training.model), self._plainly(), self.through():
            losses_B = training.losses(batch, size)
        self.losses = losses_B.detach()
        self.share = torch.full_like(losses_B, 1.0 / training.divisor(step), requires_grad=True)
        with self._plainly():
            self.gradient = torch.autograd.grad(
                losses_B, training.parameters, self.share, create_graph=True, allow_unused=True
            )
        self.used = [i for i, g in enumerate(self.gradient) if g is not None and g.requires_grad]

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Compute by operations that have second derivatives, where fused kernels have none.

        Backward passes run under it too: what is checkpointed computes there again.
        """
        with twice_differentiable_layers(self.training.model), sdpa_kernel(SDPBackend.MATH), full_precision():
            yield

    def through(self) -> AbstractContextManager[None]:
        """Return what the losses are computed under."""
        return nullcontext()

    def outer(self) -> AbstractContextManager[None]:
        """Return what the second backward pass runs under."""
        return nullcontext()

    def tile(self, directions_QD: Tensor, out_QD: Tensor) -> Tensor:
        """Write H v for each direction into ``out_QD`` and return the <g_i, v>, (Q, B)."""
        return torch.stack([self.apply(v, out) for v, out in zip(directions_QD, out_QD, strict=True)])

    def apply(self, direction_D: Tensor, out_D: Tensor) -> Tensor:
        """Write H v into ``out_D`` (D,) and return <g_i, v> for the samples of the batch, (B,)."""
        layout, parameters = self.training.layout, self.training.parameters
        starts = [entry.start for entry in layout.entries]
        directions = [
            direction_D[starts[i] : starts[i] + layout.size(i)].view_as(parameters[i]) for i in self.used
        ]
        with self._plainly(), self.outer():
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


class FieldSecondOrder(SecondOrder):
    """J^T v where something is detached; see ``update_field``."""

    def through(self) -> AbstractContextManager[None]:
        """See ``SecondOrder.through``."""
        return backward_through()

    def outer(self) -> AbstractContextManager[None]:
        """See ``SecondOrder.outer``."""
        return outer_derivative()


class TangentTile:
    """The same for a whole tile of directions at once; arguments as for ``SecondOrder``. Gives J v.

    A direction's bits may depend on the number Q of directions it is computed with.

    Attributes:
        losses: Own losses of the samples at these weights, (B,); there once a tile was worked on.
    """

    graph = False
    """Whether the backward pass is recorded, though only forward mode goes on from it."""

    losses: Tensor

    def __init__(self, training: Training, step: int, batch: Batch) -> None:
        self.training, self.step, self.batch = training, step, batch
        self._losses = LossModule(training.recipe, training.model)
        self._names = [f"model.{entry.name}" for entry in training.layout.entries]
        self._weights = {
            name: parameter.detach() for name, parameter in zip(self._names, training.parameters, strict=True)
        }

    def tile(self, directions_QD: Tensor, out_QD: Tensor) -> Tensor:
        """Write H v for each direction into ``out_QD`` and return the <g_i, v>, (Q, B)."""
        count = len(directions_QD)
        products, values_QB = self._tangents(self._named(directions_QD), count)
        for name, entry in zip(self._names, self.training.layout.entries, strict=True):
            product = products[name].reshape(count, -1)
            out_QD[:, entry.start : entry.start + product.shape[1]] = product
        return values_QB

    def _named(self, directions_QD: Tensor) -> Named:
        """Return directions as tangents of the parameters by name, (Q, *shape)."""
        layout, count = self.training.layout, len(directions_QD)
        return {
            name: directions_QD[:, entry.start : entry.start + layout.size(i)].reshape(count, *entry.shape)
            for i, (name, entry) in enumerate(zip(self._names, layout.entries, strict=True))
        }

    def _tangents(self, tangents: Named, count: int) -> tuple[Named, Tensor]:
        """Return (J v, <g_i, v>) for all directions."""
        found: tuple[Named, Tensor]
        found, self.losses = self._along(self._gradient, tangents, count, keep=lambda values: values[1])
        return found

    def _along(
        self,
        function: Callable[[Named], Any],
        tangents: Named,
        count: int,
        keep: Callable[[Any], Tensor | None] = lambda values: None,
    ) -> tuple[Any, Any]:
        """Return the derivatives of a function of the weights along all directions, and what to keep of its values."""
        training = self.training

        def along(tangent: Named) -> tuple[Any, Any]:
            values, derivatives, *_ = jvp(function, (self._weights,), (tangent,))
            return derivatives, keep(values)

        seed_everything(derived_seed(training.recipe.seed, "step", self.step))
        with (
            own_parameters(training.model),
            unchanged_buffers(training.model),
            differentiable_layers(training.model),
            sdpa_kernel(SDPBackend.MATH),
            full_precision(),
        ):
            if count == 1:
                found, kept = along({name: tangent[0] for name, tangent in tangents.items()})
                return tree_map(lambda value: value[None], found), kept
            # "same": the masks belong to w, not to the directions.
            dims: Any = (0, None)
            together: tuple[Any, Any] = vmap(along, randomness="same", out_dims=dims)(tangents)
            return together

    def _values(self, weights: Named) -> Tensor:
        """Return the losses (B,)."""
        found: Tensor = functional_call(self._losses, weights, (self.batch,))
        return found

    def _gradient(self, weights: Named) -> tuple[Named, Tensor]:
        """Return the batch gradient and the losses (B,)."""
        losses_B, pull, *_ = vjp(self._values, weights)
        share = torch.full_like(losses_B, 1.0 / self.training.divisor(self.step))
        with torch.set_grad_enabled(self.graph):
            (gradient,) = pull(share, retain_graph=self.graph, create_graph=self.graph)
        return gradient, losses_B


class GraphedTangentTile(TangentTile):
    """The same for models with GroupNorm and the like: a little slower, and more memory.

    Their backward pass has a forward-mode derivative only in the form it takes when it is recorded.
    """

    graph = True


class FieldTangentTile(TangentTile):
    """J v where something is detached; see ``update_field``. The losses' own derivatives stop there."""

    def _tangents(self, tangents: Named, count: int) -> tuple[Named, Tensor]:
        with forward_through():
            products: Named
            products, _kept = self._along(lambda weights: self._gradient(weights)[0], tangents, count)
        with stopped():
            values: Tensor
            values, self.losses = self._along(self._values, tangents, count, keep=lambda losses_B: losses_B)
        return products, values


class GraphedFieldTangentTile(FieldTangentTile):
    """The same for models whose backward pass must be recorded; see ``GraphedTangentTile``."""

    graph = True
