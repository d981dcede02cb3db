"""The reference behind ``verify --deep``: Algorithm 1 and Eq. 10-11, 33-34 done densely, in float64.

Slow and plain on purpose. The training is replayed as it was recorded, in the run's dtype and checked
against its digests; beside it the two tangents of each sample are carried in float64 at the recorded
weights, one sample after the other:

    r  =  [H] du + L du + 1[i in batch] (N / B) g_i
    dm <- p dm + (1 - dampening) r      (first time: r)
    du <- du - h dm                     (Nesterov: h (r + p dm); p = 0: h r)

Other optimisers, clipping and accumulation: see ``optimisers``; tangents then move where the optimiser steps.
Per-sample gradients are autograd of one loss at a time, Hessian products are backward through
backward, rotations are matrix products. Nothing here comes from the engines that a run uses: no
coefficients, layer rules, factors, tiles or eigencoefficients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ...storage.curvature import Curvature
from ...storage.trajectory import Trajectory
from ..data.batches import fetch, to_device
from ..data.cast import cast_model
from ..determinism import derived_seed, seed_everything
from ..recipe import Batch
from ..training.training import Training
from ..training.verified import Report, Rows, VerifiedReplay
from .ekfac import DenseCurvature
from .gauss_newton import SeenOutputs
from .noise import SameNoise
from .optimisers import StepMove, Tangent
from .tolerances import CARRIED, DIFFERENCES, Form

Floats = npt.NDArray[np.float64]

DIFFERENCE_WIDTHS = (1e-7, 1e-9)
"""Largest change of a weight in differences; the smaller one where the larger crosses a kink."""

DIFFERENCES_FIRST, DIFFERENCES_EVERY = 4, 64
"""Which products are held against differences: so many first ones, and later one in so many."""


class DenseReference(VerifiedReplay):
    """Exact, Hessian-free and EKFAC tangents of a few samples along a record; see ``VerifiedReplay``.

    Args:
        training: A fresh ``Training`` of the recipe; its ``batch_norm`` says what the gradient of
            one sample is under BatchNorm. The exact form differentiates through the statistics.
        trajectory: The record.
        samples: Train indices.
        forms: Which forms of the Hessian to carry.
        curvature: For ``ekfac``: the stored bases and eigenvalues.
        share: For ``mixed``: of the Hessian.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        samples: Rows,
        forms: Sequence[Form],
        curvature: Curvature | None = None,
        *,
        share: float = 0.5,
    ) -> None:
        super().__init__(training, trajectory, samples)
        self.dense = DenseTangents(training, trajectory, len(samples), forms, curvature, share=share)

    def run(self, report: Report | None = None) -> DenseTangents:
        """Go through the whole record and return the tangents; raises as ``VerifiedReplay.replay``."""
        self.replay(report)
        return self.dense

    def step(self, step: int, batch: Batch, rows: Rows) -> Tensor:
        """Move every tangent by the linearised step at the recorded weights, then train."""
        self.dense.step(step, batch, rows)
        return self.training.step(step, batch)


class DenseTangents:
    """The two tangents of n samples in each form, moved step by step beside a training.

    Args:
        training: Gives the weights of every step; it is not changed.
        trajectory: The record, for the optimiser's settings.
        samples: n.
        forms: Which forms of the Hessian.
        curvature: For ``ekfac``.
        dtype: Of everything here but the training's own weights.
        share: For ``mixed``: of the Hessian; the rest is the Gauss-Newton matrix's.

    Attributes:
        tangents: By form, n of them.
        loss: (T,) batch losses at the recorded weights, in ``dtype``.
        products: Hessian products taken.
        differences: Whether exact products are differences of the gradient, since double backward is not
            the derivative of the update.
        deviation: The largest deviation of double backward from differences, relative.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        samples: int,
        forms: Sequence[Form],
        curvature: Curvature | None = None,
        dtype: torch.dtype = torch.float64,
        *,
        share: float = 0.5,
    ) -> None:
        self.training, self.trajectory, self.dtype = training, trajectory, dtype
        self.forms = tuple(forms)
        self.carried = [form for form in CARRIED if form in self.forms]
        self.share = {"exact": 1.0, "gauss-newton": 0.0, "mixed": share}
        self.twin, self.parameters = _twin(training, dtype)
        bent = any(self.share[form] < 1.0 for form in self.carried)
        self.outputs = SeenOutputs(self.twin) if bent else None
        self.frozen: tuple[nn.Module, list[nn.Parameter]] | None = None
        if training.holds_statistics and any(map(_normalizes, training.model.modules())):
            self.frozen = _twin(training, dtype)
            for module in self.frozen[0].modules():
                if _normalizes(module):
                    module.register_forward_pre_hook(_freeze_statistics)
        self.bend = None if curvature is None else DenseCurvature(trajectory, curvature, training.device)
        begun = trajectory.checkpoint(0).has_momentum.tolist()
        self.tangents = {form: [Tangent(self.parameters, begun) for _ in range(samples)] for form in forms}
        self.gradient: list[Tensor | None] = []
        self.loss = np.zeros(training.steps)
        self.products = 0
        # A row at a padding_idx is a constant to double backward. Where a read-out shares it, it moves all the
        # same, and differences see more than the form that is defined here.
        self.padded = _shares_padding(self.twin)
        self.moved: tuple[nn.Module, list[nn.Parameter]] | None = None
        self.differences = False
        self.deviation = 0.0

    def hypergradients(self, form: Form) -> Floats:
        """Return du of the samples, (n, D)."""
        return np.stack([tangent.flat().cpu().numpy() for tangent in self.tangents[form]])

    def step(self, step: int, batch: Batch, rows: Rows) -> None:
        """Move every tangent by one linearised step, at the weights the training has now.

        Args:
            step: Which.
            batch: Its batch.
            rows: (B,) which sample each member of the batch is, -1: none of them.
        """
        wide = to_device(batch, self.training.device, self.dtype)
        _copy_state(self.training, self.twin, self.parameters)
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if self.carried else nullcontext():
            if self.outputs is not None:
                self.outputs.clear()
            losses = self._losses(self.twin, wide, step)
            self.loss[step] = self._mean(wide, losses)
            whole = self._part(losses, step)
            bending = [form for form in self.carried if self.share[form]]
            moved = any(t.moved for form in bending for t in self.tangents[form])
            found = _raw_gradient(whole, self.parameters, graph=moved)
            if self.training.schedule.first[step] == step:
                self.gradient = [None] * len(self.parameters)
                for tangent in self._all():
                    tangent.source = None
            self.gradient = [_plus(a, b) for a, b in zip(self.gradient, found, strict=True)]
            slope = _filled(found, self.parameters)
            own = self._own(losses, rows, self.parameters)
            fixed = own
            if self.frozen is not None and own and self.carried != list(self.forms):
                model, parameters = self.frozen
                _copy_state(self.training, model, parameters)
                fixed = self._own(self._losses(model, wide, step), rows, parameters)
            share = self.training.n_train / self.training.divisor(step)
            for form in self.forms:
                source = own if form in self.carried else fixed
                for row, tangent in enumerate(self.tangents[form]):
                    bent = self._bent(form, step, slope, whole, tangent)
                    if form == "exact" and tangent.moved:
                        bent = self._held_against_differences(step, wide, tangent, bent)
                    tangent.take(bent, source.get(row), share)
        if self.training.updates[step]:
            self._move(step)

    def _all(self) -> Iterator[Tangent]:
        for tangents in self.tangents.values():
            yield from tangents

    def _mean(self, batch: Batch, losses: Tensor) -> float:
        """Return what the record calls the loss of a batch."""
        if not self.training.weighted:
            return float(losses.detach().mean())
        weights = self.training.recipe.weights(batch)
        assert weights is not None
        return float(losses.detach().sum() / weights.sum())

    def _part(self, losses: Tensor, step: int) -> Tensor:
        """Return what a batch adds to the loss of its step."""
        divisor = self.training.divisor(step)
        return losses.mean() if divisor == len(losses) else losses.sum() / divisor

    def _losses(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        seed_everything(derived_seed(self.training.recipe.seed, "step", step))
        with SameNoise(self.training.dtype, self.dtype):
            return self.training.recipe.losses(model, batch)

    def _own(self, losses: Tensor, rows: Rows, parameters: Sequence[nn.Parameter]) -> dict[int, list[Tensor]]:
        """Return the gradient of each member's own loss, by row, one backward pass each; twice what is there twice."""
        found: dict[int, list[Tensor]] = {}
        for position, row in enumerate(rows.tolist()):
            if row >= 0:
                part = [g.detach() for g in _gradient(losses[position], parameters)]
                before = found.get(row)
                found[row] = part if before is None else [a + b for a, b in zip(before, part, strict=True)]
        return found

    def _bent(
        self, form: Form, step: int, slope: list[Tensor], whole: Tensor, tangent: Tangent
    ) -> list[Tensor] | None:
        """Return H du, or what the form puts in its place; None for nothing."""
        if form in ("none", "ekfac") or not tangent.moved:  # EKFAC is that of the step's loss as a whole
            return None
        self.products += 1
        share = self.share[form]
        hessian = self._hessian_product(slope, tangent) if share else None
        if share == 1.0:
            return hessian
        assert self.outputs is not None
        found = self.outputs.product(whole, self.parameters, tangent.du)
        if hessian is None:
            return [(1.0 - share) * one for one in found]
        return [share * h + (1.0 - share) * one for h, one in zip(hessian, found, strict=True)]

    def _hessian_product(self, slope: list[Tensor], tangent: Tangent) -> list[Tensor] | None:
        along = sum((g * u).sum() for g, u in zip(slope, tangent.du, strict=True))
        if not (isinstance(along, Tensor) and along.requires_grad):  # the loss is linear in the weights
            return None
        return [product.detach() for product in _gradient(along, self.parameters)]

    def _held_against_differences(
        self, step: int, batch: Batch, tangent: Tangent, bent: list[Tensor] | None
    ) -> list[Tensor] | None:
        """Return ``bent``, or the product by differences of the gradient from where the two part.

        Double backward gives J^T du, and J is not symmetric where the update is no gradient; it also has
        rules of its own that may be wrong. (g(w + h du) - g(w - h du)) / 2h knows nothing of that.
        """
        if self.dtype != torch.float64 or self.padded:
            return bent
        if not self.differences and self.products > DIFFERENCES_FIRST and self.products % DIFFERENCES_EVERY:
            return bent
        kept = [torch.zeros_like(u) for u in tangent.du] if bent is None else bent
        found: list[list[Tensor]] = []
        deviation = math.inf
        for width in DIFFERENCE_WIDTHS:
            found.append(self._difference(step, batch, tangent.du, width))
            distance = max(
                float((a - b).abs().max()) for a, b in zip(found[-1], kept, strict=True) if a.numel()
            )
            scale = max(float(b.abs().max()) for b in found[-1] if b.numel())
            deviation = min(deviation, distance / scale if scale else distance)
            if deviation <= DIFFERENCES:
                break
        if not self.differences:
            self.deviation = max(self.deviation, deviation)
            self.differences = deviation > DIFFERENCES
        return found[0] if self.differences else bent

    def _difference(self, step: int, batch: Batch, direction: Sequence[Tensor], width: float) -> list[Tensor]:
        """Return the derivative of the batch's gradient along a direction by central differences."""
        h = width / max(max(float(u.abs().max()) for u in direction if u.numel()), 1e-300)
        self.moved = self.moved or _twin(self.training, self.dtype)
        model, parameters = self.moved
        ends = []
        for sign in (h, -h):
            _copy_state(self.training, model, parameters)
            with torch.no_grad():
                for p, u in zip(parameters, direction, strict=True):
                    p.add_(u, alpha=sign)
            losses = self._losses(model, batch, step)
            ends.append(_gradient(self._part(losses, step), parameters))
        return [(a.detach() - b.detach()) / (2.0 * h) for a, b in zip(*ends, strict=True)]

    def _move(self, step: int) -> None:
        """Move all tangents by the step of the optimiser that the batch ends."""
        move = StepMove(self.training, self.trajectory, step, self.gradient, self.dtype)
        for form, tangents in self.tangents.items():
            for tangent in tangents:
                if form == "ekfac":
                    assert self.bend is not None
                    move.bent(tangent, self.bend)
                else:
                    move.of(tangent, frozen=form not in self.carried)


def dense_test_gradients(
    training: Training,
    trajectory: Trajectory,
    indices: Sequence[int],
    dtype: torch.dtype = torch.float64,
) -> Floats:
    """Return d loss_j / d w at w_T in eval mode, each test sample alone, by autograd in ``dtype``, (Q, D)."""
    last = trajectory.checkpoint(-1)
    training.load_weights(last.weights, last.buffers)
    model, parameters = _twin(training, dtype)
    model.eval()
    seed_everything(training.recipe.seed)
    dataset = training.recipe.test_dataset()
    rows = []
    for j in indices:
        seed_everything(derived_seed(training.recipe.seed, "test", int(j)))
        batch = to_device(fetch(training.recipe, dataset, [int(j)]), training.device, training.dtype)
        loss = training.recipe.losses(model, to_device(batch, training.device, dtype))[0]
        rows.append(torch.cat([g.reshape(-1) for g in _gradient(loss, parameters)]).cpu().numpy())
    return np.stack(rows)


def _twin(training: Training, dtype: torch.dtype) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return a copy of the model with its own parameters, in the order of the flat vector."""
    twin = cast_model(copy.deepcopy(training.model), None, dtype)
    named: Mapping[str, nn.Parameter] = dict(twin.named_parameters())
    return twin, [named[entry.name] for entry in training.layout.entries]


@torch.no_grad()
def _copy_state(training: Training, twin: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    for own, recorded in zip(parameters, training.parameters, strict=True):
        own.copy_(recorded)
    recorded_buffers = dict(training.model.named_buffers())
    for name, buffer in twin.named_buffers():
        if name in recorded_buffers:
            buffer.copy_(recorded_buffers[name])


def _gradient(value: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return d value / d parameters by autograd, zeros where there is no path; the graph is kept."""
    return _filled(_raw_gradient(value, parameters), parameters)


def _raw_gradient(
    value: Tensor, parameters: Sequence[nn.Parameter], graph: bool = False
) -> list[Tensor | None]:
    found = torch.autograd.grad(
        value, list(parameters), retain_graph=True, create_graph=graph, allow_unused=True
    )
    return list(found)


def _filled(found: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _plus(before: Tensor | None, part: Tensor | None) -> Tensor | None:
    if part is None:
        return before
    return part.detach() if before is None else before + part.detach()


def _shares_padding(model: nn.Module) -> bool:
    """Whether another layer uses the table of an Embedding that has a ``padding_idx``."""
    users: dict[int, int] = {}
    padded = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            padded.add(id(module.weight))
    return any(users[key] > 1 for key in padded)


def _normalizes(module: nn.Module) -> bool:
    """Whether this is a BatchNorm layer that uses the statistics of the batch."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _freeze_statistics(module: Any, args: tuple[Tensor, ...]) -> None:
    """Make a BatchNorm layer an affine map with this batch's mean and biased variance."""
    x = args[0].detach()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    module.running_mean = x.mean(axes)
    module.running_var = x.var(axes, unbiased=False)
    module.eval()
