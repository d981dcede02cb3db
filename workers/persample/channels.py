"""BatchNorm layers: their per-sample gradients, and a step whose statistics count as constants in its second backward pass.

With batch statistics held constant, ``y = (x - mean) rstd weight + bias`` a channel: a sample's gradients are its own
sums of ``d xhat`` and of ``d``. Those sums are what the layer's backward kernel computes of a batch of one whose
channels are the samples' channels, so one call a layer gives both, for all rows, without forming ``xhat``.

The gradients ``d`` under constant statistics differ from the step's own all the way down, since what a layer's
statistics add is spread by the layers below it. They need a backward pass of their own, but no forward pass: the
graph of the step is the same. ``switched_statistics`` lets it be walked twice.
Letters: B samples of a batch, R rows, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from ..model.state import uses_batch_statistics
from .rules import batch_statistics

Moments: TypeAlias = tuple[Tensor, Tensor]
"""Mean and one over the standard deviation that a layer normalises with, (C,) each."""


def is_channel_norm(module: nn.Module) -> bool:
    """Whether rows of this layer come from ``channel_rows``."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def moments_of(module: nn.Module, x_B: Tensor) -> Moments:
    """Return the moments of a layer for a batch, computed anew."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    mean, variance = batch_statistics(module, x_B)
    return mean, torch.rsqrt(variance + module.eps)


class Spread:
    """Gives each row of a tile a layer's moments: what all layers have is spread at once.

    Args:
        moments: Of the layers of a batch.
    """

    def __init__(self, moments: Sequence[Moments]) -> None:
        self._all = torch.cat([part for pair in moments for part in pair])
        self._sizes = [len(mean) for mean, _ in moments]

    def over(self, rows: int, places: dict[tuple[int, ...], Tensor]) -> list[Moments]:
        """Return (R C,) moments of each layer, rows first; ``places`` keeps where they come from."""
        key = (rows, *self._sizes)
        if key not in places:
            own = torch.arange(len(self._all), device=self._all.device)
            parts = own.split([size for size in self._sizes for _side in range(2)])
            places[key] = torch.cat([part.repeat(rows) for part in parts])
        spread = self._all.index_select(0, places[key])
        parts = spread.split([rows * size for size in self._sizes for _side in range(2)])
        return list(zip(parts[::2], parts[1::2], strict=True))


def channel_rows(x_R: Tensor, d_R: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias, (R, C) each; ``moments`` are (R C,)."""
    rows, channels = x_R.shape[:2]
    mean, rstd = moments
    _none, weight, bias = torch.ops.aten.native_batch_norm_backward(
        d_R.reshape(1, rows * channels, -1),
        x_R.reshape(1, rows * channels, -1),
        None,
        None,
        None,
        mean,
        rstd,
        True,
        0.0,
        (False, True, True),
    )
    return weight.view(rows, channels), bias.view(rows, channels)


class Statistics:
    """Whether statistics of the batch count as constants in backward passes, and the layers' calls so far.

    Attributes:
        constant: They do.
        inputs_alone: Gradients of the layers' own parameters are not asked for.
    """

    def __init__(self) -> None:
        self.constant = self.inputs_alone = False
        self._calls: list[Any] = []

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return type(self)()  # a model that is copied leaves the graph behind

    def note(self, call: Any) -> None:
        """Note a layer's call, the context of its node."""
        self._calls.append(call)

    def hold(self) -> None:
        """Take statistics as constants from now on; the forward pass is done."""
        self.constant = True
        if not self._calls:
            return
        scales = torch.cat([call.moments[1] for call in self._calls])
        if all(call.scale is not None for call in self._calls):
            scales = scales * torch.cat([call.scale for call in self._calls])
            parts = scales.split([len(call.scale) for call in self._calls])
        else:
            parts = scales.split([len(call.moments[1]) for call in self._calls])
            parts = tuple(
                part if call.scale is None else part * call.scale
                for part, call in zip(parts, self._calls, strict=True)
            )
        for call, part in zip(self._calls, parts, strict=True):
            call.scale = part
        self._calls = []

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Let backward passes go through the statistics, as in training; afterwards to no parameter of a layer."""
        self.constant = False
        try:
            yield
        finally:
            self.constant = self.inputs_alone = True


class SwitchedBatchNorm(torch.autograd.Function):
    """``torch.batch_norm`` with the kernels it uses itself, both ways; backward with constants where that is asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, given: Any) -> Any:  # noqa: D102
        statistics, running, factor, eps = given
        out, mean, rstd, reserve, kind = torch.ops.aten._batch_norm_impl_index(
            x, weight, bias, *running, True, factor, eps, torch.backends.cudnn.enabled
        )
        ctx.save_for_backward(x, weight)
        ctx.moments, ctx.scale = (mean, rstd), None if weight is None else weight.detach()
        ctx.rest = (statistics, running, reserve, kind, eps)
        statistics.note(ctx)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:  # noqa: D102
        statistics, running, reserve, kind, eps = ctx.rest
        x, weight = ctx.saved_tensors
        if statistics.constant:
            shape = (1, -1, *(1,) * (d.ndim - 2))
            scaled = d * ctx.scale.view(shape)
            if statistics.inputs_alone:
                return scaled, None, None, None
            mean, rstd = (part.view(shape) for part in ctx.moments)
            axes = [axis for axis in range(d.ndim) if axis != 1]
            return scaled, (d * ((x - mean) * rstd)).sum(axes), d.sum(axes), None
        found = torch.ops.aten._batch_norm_impl_index_backward(
            kind, x, d, weight, *running, *ctx.moments, True, eps, ctx.needs_input_grad[:3], reserve
        )
        return *found, None


def _switched_forward(module: Any, statistics: Statistics, x: Tensor) -> Tensor:
    """Do what ``_BatchNorm.forward`` does where it uses the batch's statistics."""
    module._check_input_dim(x)
    tracked = module.training and module.track_running_stats and not statistics.constant
    factor = 0.0 if module.momentum is None else module.momentum
    if tracked and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            factor = 1.0 / float(module.num_batches_tracked)
    # A forward pass that is repeated inside a backward pass (checkpointing) has been counted the first time, or not.
    running = (module.running_mean, module.running_var) if tracked else (None, None)
    nn.functional._verify_batch_size(x.size())  # type: ignore[attr-defined]
    given = (statistics, running, factor, module.eps)
    out: Tensor = SwitchedBatchNorm.apply(x, module.weight, module.bias, given)  # type: ignore[no-untyped-call]
    return out


@contextmanager
def switched_statistics(model: nn.Module) -> Iterator[Statistics]:
    """Let a step's graph be walked twice: as training does, and with the batch's statistics as constants."""
    statistics = Statistics()
    switched = [module for module in model.modules() if uses_batch_statistics(module)]
    for module in switched:
        module.__dict__["forward"] = partial(_switched_forward, module, statistics)
    try:
        yield statistics
    finally:
        for module in switched:
            module.__dict__.pop("forward", None)


def switchable(model: nn.Module) -> bool:
    """Whether all layers with batch statistics have the forward pass that ``switched_statistics`` knows."""
    known = nn.modules.batchnorm._BatchNorm.forward
    return all(
        type(module).forward is known and "forward" not in vars(module)
        for module in model.modules()
        if uses_batch_statistics(module)
    )
