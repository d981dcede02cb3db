"""Products with the Gauss-Newton matrix for the dense reference: J^T H_out J du by plain autograd.

J du is the derivative of J^T u with respect to u, H_out and J^T are backward passes; what the model returned is
noted by a hook. Nothing here comes from ``workers.hessian``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.returned import mapped


class SeenOutputs:
    """Notes the tensors that a model returns, call after call; what the caller gets are copies, in the same graph.

    None of those noted is thereby made of another, and nothing that is done to them in place matters.

    Args:
        model: Gets a hook for good.

    Attributes:
        tensors: Of all calls since ``clear``; those with a graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        model.register_forward_hook(self._note)

    def clear(self) -> None:
        """Forget them."""
        self.tensors = []

    def _note(self, _model: nn.Module, _args: Any, returned: Any) -> Any:
        def note(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            self.tensors.append(tensor.clone())
            return self.tensors[-1].clone()

        return mapped(returned, note)

    def product(
        self, loss: Tensor, parameters: Sequence[Tensor], direction: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return J^T H_out J v, a tensor a parameter, for the loss (a scalar) that the outputs went into."""
        slope = torch.autograd.grad(
            loss, self.tensors, retain_graph=True, create_graph=True, allow_unused=True
        )
        pairs = [(o, s) for o, s in zip(self.tensors, slope, strict=True) if s is not None]
        outputs = [output for output, _ in pairs]
        dual = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        back = _grad(outputs, parameters, dual, graph=True)
        forth = sum((b * v).sum() for b, v in zip(back, direction, strict=True))
        along = _grad([forth], dual, None)
        inner = sum((s * a.detach()).sum() for (_, s), a in zip(pairs, along, strict=True))
        bent = _grad([inner], outputs, None)
        return [product.detach() for product in _grad(outputs, parameters, bent)]


def _grad(
    values: Sequence[Any], inputs: Sequence[Tensor], weights: Sequence[Tensor] | None, graph: bool = False
) -> list[Tensor]:
    """Return vector-Jacobian products, zeros where there is no path; the graph is kept."""
    if not any(isinstance(value, Tensor) and value.requires_grad for value in values):
        return [torch.zeros_like(one) for one in inputs]
    found = torch.autograd.grad(
        list(values), list(inputs), weights, retain_graph=True, create_graph=graph, allow_unused=True
    )
    return [torch.zeros_like(one) if g is None else g for g, one in zip(found, inputs, strict=True)]
