"""Per-sample gradients the slow, obviously right ways: the yardstick and the fallbacks.

``vjp`` differentiates each sample's own loss through the very graph of the batch: right for any
layer, for dropout (same masks) and for layers that couple samples. It costs one backward pass a
sample. ``func`` is ``torch.func``'s ``vmap(grad)``: each sample alone, much faster, right where the
samples do not see each other and nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.utils.parametrizations import _WeightNorm
from torch.utils._pytree import tree_map

from ..model.state import uses_batch_statistics
from ..recipe import Batch, Recipe
from . import recurrent
from .rules import batch_statistics

LOSSES_ALIKE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of a sample's loss alone and in its batch, relative to the batch's largest loss."""


def vjp(
    losses_B: Tensor, parameters: Sequence[nn.Parameter], positions: Tensor, weight: float = 1.0
) -> list[Tensor]:
    """Return d (weight losses_B[r]) / d parameter for each position r: tensors (R, *parameter shape).

    The graph is kept for a later backward pass.
    """
    ones = F.one_hot(positions, losses_B.shape[0]).to(losses_B.dtype) * weight
    inputs = list(parameters)
    try:
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            losses_B, inputs, ones, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
    except RuntimeError:  # an operation without a batching rule: one row after the other
        rows = [
            torch.autograd.grad(losses_B, inputs, row, retain_graph=True, allow_unused=True) for row in ones
        ]
        grads = [
            None if rows[0][p] is None else torch.stack([row[p] for row in rows]) for p in range(len(inputs))
        ]
    shapes = [(len(positions), *p.shape) for p in parameters]
    return [
        p.new_zeros(s) if g is None else g.detach() for g, p, s in zip(grads, parameters, shapes, strict=True)
    ]


class LossModule(nn.Module):
    """The recipe's losses as a module, so that ``functional_call`` can put other weights in."""

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        """Wrap the model, whose parameters are then called ``model.<name>``."""
        super().__init__()
        self.model = model
        self._recipe = recipe

    def forward(self, batch: Batch) -> Tensor:
        """Return the losses, (B,)."""
        return self._recipe.losses(self.model, batch)


def func(
    recipe: Recipe, model: nn.Module, names: Sequence[str], batch: Batch, positions: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return each sample's gradient by ``vmap(grad)``, (R, *parameter shape) each, and its loss alone, (R,)."""
    module = LossModule(recipe, model)
    parameters = dict(model.named_parameters())
    chosen = {f"model.{name}": parameters[name].detach() for name in names}
    rows = tree_map(lambda leaf: leaf.index_select(0, positions) if isinstance(leaf, Tensor) else leaf, batch)

    def one(values: dict[str, Tensor], sample: Batch) -> Tensor:
        alone = tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, sample)
        losses: Tensor = functional_call(module, values, (alone,))
        return losses[0]

    axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, rows)
    grads, losses = vmap(grad_and_value(one), in_dims=(None, axes), randomness="different")(chosen, rows)
    return [grads[f"model.{name}"].detach() for name in names], losses.detach()


def same_losses(alone_R: Tensor, together_R: Tensor, scale: float) -> bool:
    """Whether losses of samples alone are those they have in their batch, to rounding.

    Where they are not, the samples see each other (mining, batch negatives, weights normalised over the
    batch), and a sample's gradient must be taken inside the batch.
    """
    allowed = LOSSES_ALIKE[together_R.dtype] * scale
    return bool(((alone_R - together_R).abs() <= allowed).all())


def _constant_forward(module: Any, x: Tensor) -> Tensor:
    mean, variance = batch_statistics(module, x.detach())
    return F.batch_norm(x, mean, variance, module.weight, module.bias, False, 0.0, module.eps)


@contextmanager
def constant_statistics(model: nn.Module) -> Iterator[bool]:
    """Let BatchNorm layers normalise with the batch's statistics as constants; touch no buffer.

    Yields:
        Whether there was such a layer at all.
    """
    coupled = [module for module in model.modules() if uses_batch_statistics(module)]
    for module in coupled:
        module.__dict__["forward"] = partial(_constant_forward, module)
    try:
        yield bool(coupled)
    finally:
        for module in coupled:
            module.__dict__.pop("forward", None)


def _coupled_forward(module: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)


def _embedding_forward(module: Any, tokens: Tensor) -> Tensor:
    rows = F.embedding(tokens, module.weight)
    return torch.where((tokens == module.padding_idx).unsqueeze(-1), rows.detach(), rows)


def _weight_norm_forward(module: Any, weight_g: Tensor, weight_v: Tensor) -> Tensor:
    axes = [axis for axis in range(weight_v.ndim) if axis != module.dim]
    return weight_v * (weight_g / weight_v.square().sum(axes, keepdim=module.dim >= 0).sqrt())


def _bag_forward(
    module: Any, x: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Tensor:
    """``nn.EmbeddingBag`` as an Embedding and a reduction: its kernel has neither forward mode nor a second derivative."""
    if x.ndim != 2:
        if module.include_last_offset:
            offsets = None if offsets is None else offsets[:-1]
        assert offsets is not None
        x, inside, per_sample_weights = _bags(x, offsets, per_sample_weights)
    else:
        inside = torch.ones_like(x, dtype=torch.bool)
    if module.padding_idx is not None:
        inside = inside & (x != module.padding_idx)
    rows, kept = F.embedding(x, module.weight), inside.unsqueeze(2)
    if module.mode == "max":
        highest = rows.masked_fill(~kept, -torch.inf).max(1).values
        return torch.where(inside.any(1, keepdim=True), highest, torch.zeros_like(highest))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(2)
    summed = torch.where(kept, rows, torch.zeros_like(rows)).sum(1)
    if module.mode == "mean":
        summed = summed / inside.sum(1, keepdim=True).clamp(min=1)
    return summed


def _bags(x: Tensor, offsets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a flat list of bags as (B, L), where there is something, and their weights."""
    ends = torch.cat([offsets[1:], offsets.new_tensor([len(x)])])
    place = offsets.unsqueeze(1) + torch.arange(int((ends - offsets).max()), device=x.device)
    inside = place < ends.unsqueeze(1)
    place = place.clamp(max=max(len(x) - 1, 0))
    return x[place], inside, None if weights is None else weights[place]


def _with_second_derivative(module: nn.Module) -> Callable[..., Any] | None:
    if isinstance(module, _WeightNorm):  # torch._weight_norm's double backward is wrong (2.13)
        return _weight_norm_forward
    if recurrent.known(module):
        return recurrent.forward
    if isinstance(module, nn.EmbeddingBag) and module.max_norm is None:
        return _bag_forward
    return None


def _dropout_forward(module: Any, x: Tensor) -> Tensor:
    """``nn.Dropout`` with its masks drawn in the memory order of its input; ``torch.func`` forgets that (2.13)."""
    if not module.training or not 0 < module.p < 1 or x.device.type != "cpu":
        return F.dropout(x, module.p, module.training)
    like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    noise = torch.empty_like(like).bernoulli_(1 - module.p).div_(1 - module.p)
    return x * noise


def _group_norm_forward(module: Any, x: Tensor) -> Tensor:
    """``nn.GroupNorm``, whose forward mode refuses channels_last (2.13)."""
    return F.group_norm(x.contiguous(), module.num_groups, module.weight, module.bias, module.eps)


def _as_backward_sees_it(module: nn.Module) -> Callable[..., Any] | None:
    if uses_batch_statistics(module):
        return _coupled_forward
    if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.max_norm is None:
        return _embedding_forward
    if type(module) is nn.Dropout:
        return _dropout_forward
    if type(module) is nn.GroupNorm:
        return _group_norm_forward
    return _with_second_derivative(module)


def twice_differentiable_layers(model: nn.Module) -> AbstractContextManager[None]:
    """Let layers compute what they do in a form whose double backward is right."""
    return _other_forwards(model, _with_second_derivative)


def differentiable_layers(model: nn.Module) -> AbstractContextManager[None]:
    """Let layers compute what they do in training in a form whose forward-mode derivative is backward's.

    BatchNorm does not note the batch in its buffers, which ``torch.func`` refuses; rows of an Embedding
    at ``padding_idx`` count as constants, as they do in its backward pass.
    """
    return _other_forwards(model, _as_backward_sees_it)


@contextmanager
def _other_forwards(model: nn.Module, of: Callable[[nn.Module], Callable[..., Any] | None]) -> Iterator[None]:
    found = [(module, of(module)) for module in model.modules()]
    changed = [(module, forward) for module, forward in found if forward is not None]
    for module, forward in changed:
        module.__dict__["forward"] = partial(forward, module)
    try:
        yield
    finally:
        for module, _ in changed:
            module.__dict__.pop("forward", None)


def couples_samples(model: nn.Module) -> bool:
    """Whether the model, in its present mode, has layers that couple the samples of a batch."""
    return any(uses_batch_statistics(module) for module in model.modules())


__all__ = [
    "LossModule",
    "constant_statistics",
    "couples_samples",
    "differentiable_layers",
    "func",
    "same_losses",
    "twice_differentiable_layers",
    "vjp",
]
