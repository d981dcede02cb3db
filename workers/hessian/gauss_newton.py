"""Products with the Gauss-Newton matrix of a batch, and with its mixtures with the Hessian.

With o the outputs of the recipe's model (see ``model_calls``), J = d o / d w and H_out the second derivative
of the batch loss with respect to o, the Hessian is

    H = J^T H_out J + sum_k (d loss / d o_k) (d^2 o_k / d w^2)

and the Gauss-Newton matrix is its first term. Where the losses are convex in the outputs (softmax, squared
error) that is positive semi-definite, and it needs no second derivative of the model:

    J v  ->  <g_i, v> = <d loss_i / d o, J v>  and  H_out J v  ->  J^T H_out J v

- ``GaussNewtonTile``: J v by forward mode, J^T by backward, both for all Q directions of a tile at once.
- ``GaussNewton``: one direction at a time, J v as the derivative of J^T u with respect to u: for layers
  without a rule for forward mode.

A mixture S H + (1 - S) J^T H_out J costs what the Hessian costs. With q = d loss / d o the gradient is J^T q,
and its derivative along v is J^T (dq), the Gauss-Newton product, plus (dJ)^T q, the rest of the Hessian.

- ``MixedTile``: the derivative of J^T c in forward mode, times S, where c has the value of q and 1/S times
  its derivative. ``GraphedMixedTile`` as ``GraphedTangentTile``.
- ``Mixed``: the derivative of <J^T u, v> with respect to u is J v, with respect to the weights (dJ)^T u.

What is detached, in the losses or in the model, counts as a constant. H_out comes from a second backward pass
through the losses alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..determinism import derived_seed, seed_everything
from ..model.autocast import full_precision
from ..model.state import unchanged_buffers
from ..persample.reference import twice_differentiable_layers
from ..recipe import Batch
from ..training.training import Training
from .model_calls import ModelCalls
from .second_order import Named, SecondOrder, TangentTile


class Outputs:
    """The outputs of a step's batch at the model's present weights, and its losses as a function of them.

    Args:
        training: Model, recipe and layout; its buffers are left as they were.
        step: Whose dropout masks to draw.
        batch: The step's batch, on the device.

    Attributes:
        calls: Where the losses are cut.
        losses: (B,), a function of ``calls.starts``.
        slope: d batch loss / d output, (shapes of the outputs), a function of ``calls.starts`` and ``share``.
        share: (B,) weight of each sample's loss.
    """

    def __init__(self, training: Training, step: int, batch: Batch) -> None:
        self.training = training
        self.calls = ModelCalls(training.model)
        size = training.batch_size(step)
        seed_everything(derived_seed(training.recipe.seed, "step", step))
        with (
            unchanged_buffers(training.model),
            twice_differentiable_layers(training.model),
            sdpa_kernel(SDPBackend.MATH),
            full_precision(),
        ):
            self.losses = self.calls.cut(lambda: training.losses(batch, size))
        self.share = torch.full_like(self.losses, 1.0 / training.divisor(step), requires_grad=True)
        starts = self.calls.starts
        found: Sequence[Tensor | None] = [None] * len(starts)
        if starts and self.losses.requires_grad:
            found = torch.autograd.grad(self.losses, starts, self.share, create_graph=True, allow_unused=True)
        self.calls.keep([i for i, slope in enumerate(found) if slope is not None])
        self.slope = [slope for slope in found if slope is not None]

    def bend(self, along: Sequence[Tensor], *, many: bool) -> tuple[Tensor, list[Tensor]]:
        """Return <d loss_i / d o, a> and H_out a for directions a of the outputs, or for Q of them."""
        values, *bent = _pulled(self.slope, [self.share, *self.calls.starts], along, many=many)
        return values, bent

    def back(self, bent: Sequence[Tensor], *, many: bool) -> list[Tensor]:
        """Return J^T b, a tensor a parameter, for b shaped like the outputs, or for Q of them."""
        return _pulled(self.calls.made, self.training.parameters, bent, many=many)


def _pulled(
    values: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor], *, many: bool
) -> list[Tensor]:
    """Return the vector-Jacobian products of values with respect to inputs, zeros where there is no path."""
    count = (len(vectors[0]),) if many else ()
    used = [i for i, value in enumerate(values) if value.requires_grad]
    found: Sequence[Tensor | None] = torch.autograd.grad(
        [values[i] for i in used],
        list(inputs),
        [vectors[i] for i in used],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=many,
    )
    return [
        one.new_zeros(*count, *one.shape) if g is None else g for g, one in zip(found, inputs, strict=True)
    ]


class GaussNewtonTile(TangentTile):
    """Products with J^T H_out J for a tile of directions; no second derivative of the model."""

    def __init__(self, training: Training, step: int, batch: Batch) -> None:
        super().__init__(training, step, batch)
        self.parts = Outputs(training, step, batch)
        self.losses = self.parts.losses.detach()

    def along(self, directions_QD: Tensor) -> list[Tensor]:
        """Return J v, for each output (Q, *its shape)."""
        found: list[Tensor] = self._along(self._outputs, self._named(directions_QD), len(directions_QD))[0]
        return found

    def _outputs(self, weights: Named) -> list[Tensor]:
        return self.parts.calls.outputs(lambda: functional_call(self._losses, weights, (self.batch,)))

    def _tangents(self, tangents: Named, count: int) -> tuple[Named, Tensor]:
        along: list[Tensor] = self._along(self._outputs, tangents, count)[0]
        many = count > 1
        if not many:
            along = [one[0] for one in along]
        values, bent = self.parts.bend(along, many=many)
        products = self.parts.back(bent, many=many)
        if not many:
            values, products = values[None], [one[None] for one in products]
        return dict(zip(self._names, products, strict=True)), values


class GaussNewton(SecondOrder):
    """The same, one direction at a time, for layers without forward mode."""

    def __init__(self, training: Training, step: int, batch: Batch) -> None:
        self.training = training
        self.parts = Outputs(training, step, batch)
        self.losses = self.parts.losses.detach()
        # J^T u as a function of u and of the weights, at u = d batch loss / d output: the gradient there.
        self._dual = [slope.detach().requires_grad_() for slope in self.parts.slope]
        transposed = torch.autograd.grad(
            self.parts.calls.made, training.parameters, self._dual, create_graph=True, allow_unused=True
        )
        self.used = [i for i, one in enumerate(transposed) if one is not None and one.requires_grad]
        self._transposed = [one for one in transposed if one is not None and one.requires_grad]

    def along(self, directions_QD: Tensor) -> list[Tensor]:
        """See ``GaussNewtonTile.along``."""
        rows = [self._derivatives(direction, self._dual) for direction in directions_QD]
        return [torch.stack(one) for one in zip(*rows, strict=True)]

    def apply(self, direction_D: Tensor, out_D: Tensor) -> Tensor:
        """Write J^T H_out J v into ``out_D`` (D,) and return <g_i, v> for the samples of the batch, (B,)."""
        values, bent = self.parts.bend(self._derivatives(direction_D, self._dual), many=False)
        self._write(self.parts.back(bent, many=False), out_D)
        return values

    def _derivatives(self, direction_D: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivative of <J^T u, v> with respect to ``of``."""
        parts = self._split(direction_D)
        return _pulled(self._transposed, of, [parts[i] for i in self.used], many=False)

    def _split(self, vector_D: Tensor) -> list[Tensor]:
        parameters = self.training.parameters
        parts = vector_D.split([parameter.numel() for parameter in parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]

    def _write(self, products: Sequence[Tensor], out_D: Tensor) -> None:
        for target, product in zip(self._split(out_D), products, strict=True):
            target.copy_(product)


class MixedTile(TangentTile):
    """Products with S H + (1 - S) J^T H_out J for a tile of directions; ``kept`` is S."""

    kept: ClassVar[float] = 1.0

    def __init__(self, training: Training, step: int, batch: Batch) -> None:
        super().__init__(training, step, batch)
        self._calls = Outputs(training, step, batch).calls
        self._calls.forget()  # which outputs there are is all that is needed of that pass

    def tile(self, directions_QD: Tensor, out_QD: Tensor) -> Tensor:
        """Write the product for each direction into ``out_QD`` and return the <g_i, v>, (Q, B)."""
        values = super().tile(directions_QD, out_QD)
        out_QD.mul_(self.kept)
        return values

    def _gradient(self, weights: Named) -> tuple[Named, Tensor]:
        outputs, pull, *_ = vjp(self._outputs, weights)
        losses_B, slope, *_ = vjp(self._losses_at, outputs)
        share = torch.full_like(losses_B, 1.0 / self.training.divisor(self.step))
        with torch.set_grad_enabled(self.graph):
            (found,) = slope(share, retain_graph=self.graph, create_graph=self.graph)
            more = [one / self.kept + (1.0 - 1.0 / self.kept) * one.detach() for one in found]
            (gradient,) = pull(more, retain_graph=self.graph, create_graph=self.graph)
        return gradient, losses_B

    def _outputs(self, weights: Named) -> list[Tensor]:
        return self._calls.outputs(lambda: functional_call(self._losses, weights, (self.batch,)))

    def _losses_at(self, outputs: Sequence[Tensor]) -> Tensor:
        return self._calls.losses(lambda: self._losses(self.batch), outputs)


class GraphedMixedTile(MixedTile):
    """The same for models whose backward pass must be recorded; see ``GraphedTangentTile``."""

    graph = True


class Mixed(GaussNewton):
    """The same, one direction at a time."""

    kept: ClassVar[float] = 1.0

    def apply(self, direction_D: Tensor, out_D: Tensor) -> Tensor:
        """Write the product into ``out_D`` (D,) and return <g_i, v> for the samples of the batch, (B,)."""
        parameters, count = self.training.parameters, len(self._dual)
        found = self._derivatives(direction_D, [*self._dual, *parameters])
        values, bent = self.parts.bend(found[:count], many=False)
        first = self.parts.back(bent, many=False)
        self._write([a + self.kept * b for a, b in zip(first, found[count:], strict=True)], out_D)
        return values


def mixture(kind: type[MixedTile | Mixed], share: float) -> type[MixedTile | Mixed]:
    """Return a way to the mixture with a given share of the Hessian."""
    return type(kind.__name__, (kind,), {"kept": share, "__doc__": kind.__doc__})
