"""The judge: Algorithm 1 of the HyDRA paper done densely in float64, one sample after the other.

Slow and plain on purpose, and sharing no arithmetic with the package: the optimiser step, the two
tangent buffers of each sample, and the per-sample gradients (autograd of each sample's own loss
through the graph of the whole batch) are all written out here. Only the batch order, the recorded
optimiser settings, the initial weights and the per-step seed are taken from the record.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hydra_pipe.storage.trajectory import Trajectory
from hydra_pipe.workers.data.batches import fetch, to_device
from hydra_pipe.workers.determinism import derived_seed, seed_everything
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.reference import tolerances

# How far a fast path may be from the dense form, relative to the largest norm of a row.
DENSE_FLOAT64 = tolerances.FORM["none"]["float64"]
DENSE_FLOAT32 = tolerances.FORM["none"]["float32"]
EXACT_FLOAT64 = tolerances.FORM["exact"]["float64"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """What the dense form came to: ``hypergradient`` (n, D), final ``weights`` (D,), ``loss`` (T,)."""

    hypergradient: np.ndarray
    weights: np.ndarray
    loss: np.ndarray
    model: torch.nn.Module


def dense(
    recipe: Recipe,
    trajectory: Trajectory,
    tracked: Sequence[int],
    *,
    batch_norm: str = "constant",
    curvature: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> Dense:
    """Run Algorithm 1 for the tracked samples along the recorded batches and settings.

    ``curvature(step, du)`` stands for the Hessian product of the exact form; None drops it.
    """
    torch.manual_seed(recipe.seed)
    seed_everything(recipe.seed)
    dataset = recipe.train_dataset()
    seed_everything(recipe.seed)
    model = _built(recipe)
    model.train()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    _load(parameters, trajectory.checkpoint(0).weights.astype(np.float64))
    groups = [entry.group for entry in trajectory.parameters]
    assert names == [entry.name for entry in trajectory.parameters]
    n_train = len(dataset)
    momentum = _momentum(trajectory, parameters)
    du = {i: [torch.zeros_like(p) for p in parameters] for i in tracked}
    dm = {i: [None if m is None else torch.zeros_like(m) for m in momentum] for i in tracked}
    losses = np.zeros(len(trajectory.batches))
    for step, row in enumerate(trajectory.batches):
        members = row[row >= 0]
        seed_everything(derived_seed(recipe.seed, "data", step))
        batch = to_device(fetch(recipe, dataset, members), torch.device("cpu"), torch.float64)
        own = _own_gradients(recipe, model, parameters, batch, members, tracked, step, batch_norm)
        seed_everything(derived_seed(recipe.seed, "step", step))
        loss = recipe.losses(model, batch).mean()
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        losses[step] = loss.item()
        bent = {i: [torch.zeros_like(p) for p in parameters] for i in tracked}
        if curvature is not None:
            for i in tracked:
                flat = curvature(step, torch.cat([u.reshape(-1) for u in du[i]]).numpy())
                parts = torch.from_numpy(flat).split([p.numel() for p in parameters])
                bent[i] = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
        with torch.no_grad():
            for k, parameter in enumerate(parameters):
                if groups[k] < 0:
                    continue
                h, p, decay, damp, nesterov = _settings(trajectory, step, groups[k])
                for i in tracked:
                    g = own[i][k] * (n_train / len(members)) if i in own else torch.zeros_like(parameter)
                    tangent = g + bent[i][k] + decay * du[i][k]
                    dm[i][k], move = _sgd(tangent, dm[i][k], p, damp, nesterov)
                    du[i][k] = du[i][k] - h * move
                full = gradient[k] + decay * parameter
                momentum[k], move = _sgd(full, momentum[k], p, damp, nesterov)
                parameter.sub_(h * move)
    rows = [torch.cat([u.reshape(-1) for u in du[i]]).numpy() for i in tracked]
    weights = torch.cat([p.detach().reshape(-1) for p in parameters]).numpy()
    return Dense(hypergradient=np.stack(rows), weights=weights, loss=losses, model=model)


def test_gradients(recipe: Recipe, model: torch.nn.Module, chosen: Sequence[int]) -> np.ndarray:
    """Return d loss_j / d w in eval mode for each chosen test sample alone, (M, D) float64."""
    model.eval()
    seed_everything(recipe.seed)
    dataset = recipe.test_dataset()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for j in chosen:
        batch = to_device(fetch(recipe, dataset, [j]), torch.device("cpu"), torch.float64)
        found = torch.autograd.grad(recipe.losses(model, batch)[0], parameters, allow_unused=True)
        full = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in full]).numpy())
    return np.stack(rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unrolled:
    """``weights`` w_T (D,) with its graph back to ``eps`` (n,) and to the first weights ``start``."""

    weights: torch.Tensor
    eps: torch.Tensor
    start: Sequence[torch.Tensor]

    def along(self, directions: np.ndarray) -> np.ndarray:
        """Return d <v, w_T> / d eps for each direction v (K, D), shape (K, n)."""
        rows = []
        for v in directions:
            (row,) = torch.autograd.grad(self.weights, self.eps, torch.from_numpy(v), retain_graph=True)
            rows.append(row.numpy())
        return np.stack(rows)

    def from_start(self) -> np.ndarray:
        """Return d w_T / d w_0, (D, D), a row after the other."""
        rows = []
        for value in self.weights:
            parts = torch.autograd.grad(value, list(self.start), retain_graph=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy())
        return np.stack(rows)


def unrolled(recipe: Recipe, trajectory: Trajectory, tracked: Sequence[int]) -> Unrolled:
    """Autograd through the whole training: w_T as a function of the tracked samples' weights.

    Sample i of batch t enters the batch loss with ``1/B_t + eps_i N/B_t``, as in Eq. 30.
    """
    seed_everything(recipe.seed)
    dataset = recipe.train_dataset()
    seed_everything(recipe.seed)
    model = _built(recipe)
    model.train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    flat = torch.from_numpy(trajectory.checkpoint(0).weights.astype(np.float64))
    parts = flat.split([p.numel() for p in parameters.values()])
    weights = [w.view(p.shape) for w, p in zip(parts, parameters.values(), strict=True)]
    momentum = _momentum(trajectory, weights)
    place = {int(i): k for k, i in enumerate(tracked)}
    eps = torch.zeros(len(tracked), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    loss_of = _Losses(recipe, model)
    start: Sequence[torch.Tensor] = ()
    for step, row in enumerate(trajectory.batches):
        members = row[row >= 0]
        seed_everything(derived_seed(recipe.seed, "data", step))
        batch = to_device(fetch(recipe, dataset, members), torch.device("cpu"), torch.float64)
        weights = [w if w.requires_grad else w.clone().requires_grad_() for w in weights]
        start = start or list(weights)
        state = {f"model.{n}": w for n, w in zip(parameters, weights, strict=True)}
        state |= {f"model.{n}": b.clone() for n, b in model.named_buffers()}
        seed_everything(derived_seed(recipe.seed, "step", step))
        losses = torch.func.functional_call(loss_of, state, (batch,))
        extra = torch.stack([eps[place[int(m)]] if int(m) in place else zero for m in members])
        total = (losses * (1 + extra * len(dataset))).sum() / len(members)
        gradient = torch.autograd.grad(total, weights, create_graph=True, allow_unused=True)
        for k, entry in enumerate(trajectory.parameters):
            if entry.group >= 0:
                h, p, decay, damp, nesterov = _settings(trajectory, step, entry.group)
                momentum[k], move = _sgd(gradient[k] + decay * weights[k], momentum[k], p, damp, nesterov)
                weights[k] = weights[k] - h * move
    return Unrolled(weights=torch.cat([w.reshape(-1) for w in weights]), eps=eps, start=start)


class _Losses(torch.nn.Module):
    def __init__(self, recipe: Recipe, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, batch: Any) -> torch.Tensor:
        return self.recipe.losses(self.model, batch)


def contributions(hypergradient: np.ndarray, gradients: np.ndarray, n_train: int) -> np.ndarray:
    """Eq. 8 and 9: C(i, j) = -(1/N) <hypergradient_i, gradient_j>, shape (n, M)."""
    return -(hypergradient @ gradients.T) / n_train


def relative_error(found: np.ndarray, right: np.ndarray) -> float:
    """Return the largest row-wise distance, relative to the largest norm of a row of ``right``."""
    distance = np.linalg.norm(np.asarray(found, dtype=np.float64) - right, axis=1)
    return float(distance.max() / np.linalg.norm(right, axis=1).max())


def _sgd(
    gradient: torch.Tensor, buffer: torch.Tensor | None, p: float, damp: float, nesterov: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """One step of SGD's momentum, as PyTorch documents it: (new buffer, direction)."""
    if p == 0:
        return buffer, gradient
    buffer = gradient.clone() if buffer is None else p * buffer + (1 - damp) * gradient
    return buffer, gradient + p * buffer if nesterov else buffer


def _built(recipe: Recipe) -> torch.nn.Module:
    model = recipe.model().double()
    state = recipe.initial_state()
    if state is not None:
        model.load_state_dict(dict(state.weights))  # also what is frozen, which no record holds
    return model


def _momentum(trajectory: Trajectory, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the momentum buffers that training began with; None where there was none."""
    first = trajectory.checkpoint(0)
    parts = torch.from_numpy(first.momentum.astype(np.float64)).split([p.numel() for p in parameters])
    return [
        part.view(p.shape).clone() if there else None
        for part, p, there in zip(parts, parameters, first.has_momentum, strict=True)
    ]


def _settings(t: Trajectory, step: int, group: int) -> tuple[float, float, float, float, bool]:
    return (
        float(t.learning_rate[step, group]),
        float(t.momentum[step, group]),
        float(t.weight_decay[step, group]),
        float(t.dampening[step, group]),
        bool(t.nesterov[step, group]),
    )


def _load(parameters: Sequence[torch.nn.Parameter], vector: np.ndarray) -> None:
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            stop = start + parameter.numel()
            parameter.copy_(torch.from_numpy(vector[start:stop]).view_as(parameter))
            start = stop


def _own_gradients(
    recipe: Recipe,
    model: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    batch: Any,
    members: np.ndarray,
    tracked: Sequence[int],
    step: int,
    batch_norm: str,
) -> dict[int, list[torch.Tensor]]:
    """Gradient of each tracked member's own loss, on a copy so that no buffer moves."""
    wanted = set(tracked) & {int(m) for m in members}
    if not wanted:
        return {}
    twin = copy.deepcopy(model)
    if batch_norm == "constant":
        for module in twin.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(_freeze_statistics)
    own = [p for p in twin.parameters() if p.requires_grad]
    seed_everything(derived_seed(recipe.seed, "step", step))
    losses = recipe.losses(twin, batch)
    found = {}
    for position, member in enumerate(members):
        if int(member) in wanted:
            grads = torch.autograd.grad(losses[position], own, retain_graph=True, allow_unused=True)
            found[int(member)] = [
                torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)
            ]
    return found


def _freeze_statistics(module: Any, args: tuple[torch.Tensor, ...]) -> None:
    """Make a BatchNorm layer an affine map with this batch's mean and biased variance."""
    x = args[0].detach()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    module.running_mean = x.mean(axes)
    module.running_var = x.var(axes, unbiased=False)
    module.eval()
