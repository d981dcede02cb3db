"""The judge: Algorithm 1 of the HyDRA paper done densely in float64, one sample after the other.

Slow and plain on purpose, and sharing no arithmetic with the package: the optimiser step, clipping,
accumulation, the tangent buffers of each sample, and the per-sample gradients (autograd of each sample's
own loss through the graph of the whole batch) are all written out here. Only the batch order, the recorded
optimiser settings, where the optimiser stepped, the initial weights and the per-step seed are taken from
the record; which optimiser it was, clipping and weights from the recipe.
"""

from __future__ import annotations

import copy
import math
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

    ``curvature(step, du)`` stands for the Hessian product of the exact form (of SGD); None drops it. Adam's
    tangents then have the preconditioner D of the step that the gradient came in with, as a constant.
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
    optimiser = _Optimiser(recipe, model, trajectory)
    du = {i: [torch.zeros_like(p) for p in parameters] for i in tracked}
    began = [None if m is None else torch.zeros_like(m) for m in optimiser.first]
    dm: dict[int, list[torch.Tensor | None]] = {i: list(began) for i in tracked}
    losses = np.zeros(len(trajectory.batches))
    for steps in _updates(trajectory):
        gradient: list[torch.Tensor | None] = [None] * len(parameters)
        own = {i: [torch.zeros_like(p) for p in parameters] for i in tracked}
        bent = {i: [torch.zeros_like(p) for p in parameters] for i in tracked}
        batches = [_fetched(recipe, dataset, trajectory, step) for step in steps]
        divisor = _divisors(recipe, batches, trajectory, steps)
        for step, batch, over in zip(steps, batches, divisor, strict=True):
            members = _members(trajectory, step)
            found = _own_gradients(recipe, model, parameters, batch, members, tracked, step, batch_norm)
            for i, gradients in found.items():
                own[i] = [a + n_train / over * g for a, g in zip(own[i], gradients, strict=True)]
            seed_everything(derived_seed(recipe.seed, "step", step))
            each = recipe.losses(model, batch)
            weights = recipe.weights(batch)
            losses[step] = each.detach().sum() / (len(members) if weights is None else weights.sum())
            part = torch.autograd.grad(each.sum() / over, parameters, allow_unused=True)
            gradient = [_plus(a, b) for a, b in zip(gradient, part, strict=True)]
        if curvature is not None:
            assert not optimiser.adam
            assert len(steps) == 1
            for i in tracked:
                flat = curvature(steps[0], torch.cat([u.reshape(-1) for u in du[i]]).numpy())
                parts = torch.from_numpy(flat).split([p.numel() for p in parameters])
                bent[i] = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
        with torch.no_grad():
            whole = [
                torch.zeros_like(p) if g is None else g for g, p in zip(gradient, parameters, strict=True)
            ]
            moved = {
                i: _clip_tangent(
                    whole, [a + b for a, b in zip(own[i], bent[i], strict=True)], recipe.clip_grad_norm
                )
                for i in tracked
            }
            clipped = _clip(gradient, recipe.clip_grad_norm)
            step = steps[-1]
            for k, parameter in enumerate(parameters):
                if groups[k] < 0 or gradient[k] is None:
                    continue
                new = optimiser.stepped(step, k, parameter, clipped[k])
                for i in tracked:
                    if optimiser.adam:
                        now = optimiser.settings(step, groups[k])
                        shrunk = now["lr"] * now["decay"] if optimiser.decoupled[groups[k]] else 0.0
                        before = torch.zeros_like(parameter) if dm[i][k] is None else dm[i][k]
                        scaled = optimiser.scale[k] * moved[i][k]
                        dm[i][k] = after = now["beta1"] * before + (1 - now["beta1"]) * scaled
                        late = 1 - now["beta1"] ** optimiser.count[k]
                        du[i][k] = (1 - shrunk) * du[i][k] - now["lr"] / late * after
                    else:
                        h, p, decay, damp, nesterov = _settings(trajectory, step, groups[k])
                        tangent = moved[i][k] + decay * du[i][k]
                        dm[i][k], move = _sgd(tangent, dm[i][k], p, damp, nesterov)
                        du[i][k] = du[i][k] - h * move
                parameter.copy_(new)
    rows = [torch.cat([u.reshape(-1) for u in du[i]]).numpy() for i in tracked]
    weights_D = torch.cat([p.detach().reshape(-1) for p in parameters]).numpy()
    return Dense(hypergradient=np.stack(rows), weights=weights_D, loss=losses, model=model)


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

    Sample i of batch t enters the loss of its step with ``(1 + eps_i N) / divisor``, as in Eq. 30; twice where
    it is in the batch twice.
    """
    seed_everything(recipe.seed)
    dataset = recipe.train_dataset()
    seed_everything(recipe.seed)
    model = _built(recipe)
    model.train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = _Optimiser(recipe, model, trajectory)
    flat = torch.from_numpy(trajectory.checkpoint(0).weights.astype(np.float64))
    parts = flat.split([p.numel() for p in parameters.values()])
    weights = [w.view(p.shape) for w, p in zip(parts, parameters.values(), strict=True)]
    place = {int(i): k for k, i in enumerate(tracked)}
    eps = torch.zeros(len(tracked), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    loss_of = _Losses(recipe, model)
    start: Sequence[torch.Tensor] = ()
    for steps in _updates(trajectory):
        weights = [w if w.requires_grad else w.clone().requires_grad_() for w in weights]
        start = start or list(weights)
        batches = [_fetched(recipe, dataset, trajectory, step) for step in steps]
        total = zero
        divisor = _divisors(recipe, batches, trajectory, steps)
        for step, batch, over in zip(steps, batches, divisor, strict=True):
            state = {f"model.{n}": w for n, w in zip(parameters, weights, strict=True)}
            state |= {f"model.{n}": b.clone() for n, b in model.named_buffers()}
            seed_everything(derived_seed(recipe.seed, "step", step))
            losses = torch.func.functional_call(loss_of, state, (batch,))
            members = _members(trajectory, step)
            extra = torch.stack([eps[place[int(m)]] if int(m) in place else zero for m in members])
            total = total + (losses * (1 + extra * len(dataset))).sum() / over
        gradient = torch.autograd.grad(total, weights, create_graph=True, allow_unused=True)
        clipped = _clip(gradient, recipe.clip_grad_norm)
        for k, entry in enumerate(trajectory.parameters):
            if entry.group >= 0 and clipped[k] is not None:
                weights[k] = optimiser.stepped(steps[-1], k, weights[k], clipped[k])
    return Unrolled(weights=torch.cat([w.reshape(-1) for w in weights]), eps=eps, start=start)


class _Optimiser:
    """What the recipe's optimiser does to a parameter, written out; differentiable.

    ``count``, ``scale``: steps taken with each parameter, and Adam's 1 / (sqrt(vhat) + eps) of its last.
    """

    def __init__(self, recipe: Recipe, model: torch.nn.Module, trajectory: Trajectory) -> None:
        made = recipe.optimizer(model)
        kind = type(made).__name__
        assert kind in ("SGD", "Adam", "AdamW")
        self.adam, self.trajectory = kind != "SGD", trajectory
        self.decoupled = [
            kind == "AdamW" or bool(g.get("decoupled_weight_decay", False)) for g in made.param_groups
        ]
        start = trajectory.checkpoint(0)
        self.first, self.second = (_begun(trajectory, part) for part in (start.momentum, start.second_moment))
        self.scale: list[torch.Tensor | None] = [None] * len(trajectory.parameters)
        self.count = [0] * len(trajectory.parameters) if start.count is None else start.count.tolist()

    def settings(self, step: int, group: int) -> dict[str, float]:
        names = {
            "lr": "learning_rate",
            "decay": "weight_decay",
            "beta1": "beta1",
            "beta2": "beta2",
            "eps": "eps",
        }
        return {short: float(getattr(self.trajectory, name)[step, group]) for short, name in names.items()}

    def stepped(self, step: int, k: int, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return parameter ``k`` after a step with the clipped gradient."""
        group = self.trajectory.parameters[k].group
        self.count[k] += 1
        if not self.adam:
            h, p, decay, damp, nesterov = _settings(self.trajectory, step, group)
            self.first[k], move = _sgd(gradient + decay * weight, self.first[k], p, damp, nesterov)
            return weight - h * move
        now = self.settings(step, group)
        if self.decoupled[group]:
            weight = weight * (1 - now["lr"] * now["decay"])
        else:
            gradient = gradient + now["decay"] * weight
        before = [torch.zeros_like(gradient) if s is None else s for s in (self.first[k], self.second[k])]
        self.first[k] = now["beta1"] * before[0] + (1 - now["beta1"]) * gradient
        self.second[k] = now["beta2"] * before[1] + (1 - now["beta2"]) * gradient**2
        mean = self.first[k] / (1 - now["beta1"] ** self.count[k])
        spread = self.second[k] / (1 - now["beta2"] ** self.count[k])
        seen = spread > 0  # the root has no slope at 0: nothing moves there, and nothing must become NaN
        root = torch.where(seen, torch.where(seen, spread, torch.ones_like(spread)).sqrt(), 0.0)
        self.scale[k] = 1 / (root + now["eps"])
        return weight - now["lr"] * mean * self.scale[k]


def _clip(gradient: Sequence[torch.Tensor | None], most: float | None) -> list[torch.Tensor | None]:
    """Clip by the norm of all gradients, as ``clip_grad_norm_`` documents it; differentiable."""
    if most is None:
        return list(gradient)
    norm = torch.sqrt(sum((g**2).sum() for g in gradient if g is not None))
    factor = most / (norm + 1e-6)
    return [g if g is None or factor >= 1 else g * factor for g in gradient]


def _clip_tangent(
    gradient: Sequence[torch.Tensor], change: Sequence[torch.Tensor], most: float | None
) -> list[torch.Tensor]:
    """Return what clipping makes of a small change of the gradient."""
    norm = float(torch.sqrt(sum((g**2).sum() for g in gradient)))
    if most is None or most / (norm + 1e-6) >= 1:
        return list(change)
    grown = float(sum((g * c).sum() for g, c in zip(gradient, change, strict=True))) / norm
    factor = most / (norm + 1e-6)
    shrunk = -most / (norm + 1e-6) ** 2 * grown
    return [factor * c + shrunk * g for g, c in zip(gradient, change, strict=True)]


def _updates(trajectory: Trajectory) -> list[list[int]]:
    """Return the batches of each step of the optimiser."""
    found: list[list[int]] = [[]]
    for step in range(len(trajectory.batches)):
        found[-1].append(step)
        if trajectory.updates is None or trajectory.updates[step]:
            found.append([])
    assert not found[-1]
    return found[:-1]


def _members(trajectory: Trajectory, step: int) -> np.ndarray:
    row = trajectory.batches[step]
    return row[row >= 0]


def _fetched(recipe: Recipe, dataset: Any, trajectory: Trajectory, step: int) -> Any:
    seed_everything(derived_seed(recipe.seed, "data", step))
    batch = fetch(recipe, dataset, _members(trajectory, step))
    return to_device(batch, torch.device("cpu"), torch.float64)


def _divisors(
    recipe: Recipe, batches: Sequence[Any], trajectory: Trajectory, steps: Sequence[int]
) -> list[float]:
    """Return what the sum of each batch's losses is divided by in the loss of their step."""
    weights = [recipe.weights(batch) for batch in batches]
    if weights[0] is not None:
        return [float(sum(w.sum() for w in weights))] * len(batches)
    return [float(len(_members(trajectory, step)) * len(batches)) for step in steps]


def _plus(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a if b is None else b if a is None else a + b


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


def _begun(trajectory: Trajectory, vector: np.ndarray | None) -> list[torch.Tensor | None]:
    """Return a vector of the optimiser that training began with, by parameter; None where there was none."""
    there, parts = trajectory.checkpoint(0).has_momentum, []
    for entry, has in zip(trajectory.parameters, there, strict=True):
        if vector is None or not has:
            parts.append(None)
            continue
        here = slice(entry.start, entry.start + math.prod(entry.shape))
        parts.append(torch.from_numpy(vector[here].astype(np.float64)).view(entry.shape))
    return parts


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
            full = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
            before = found.get(int(member))  # a sample may be in a batch twice
            found[int(member)] = (
                full if before is None else [a + b for a, b in zip(before, full, strict=True)]
            )
    return found


def _freeze_statistics(module: Any, args: tuple[torch.Tensor, ...]) -> None:
    """Make a BatchNorm layer an affine map with this batch's mean and biased variance."""
    x = args[0].detach()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    module.running_mean = x.mean(axes)
    module.running_var = x.var(axes, unbiased=False)
    module.eval()
