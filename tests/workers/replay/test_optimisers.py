"""Every optimiser with what surrounds its step, against autograd through the whole training and dense forms."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.exact import ExactRows
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.replay.projection import FastProducts
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn

from tests import oracle
from tests.recipes import Small, gaussian

COUPLED = Compute(dtype="float64", device="cpu", batch_norm="coupled")
DOUBLE = Compute(dtype="float64", device="cpu")
OPTIMISERS = ("sgd", "adamw", "adam")
SURROUNDINGS = ("groups", "late", "one-cycle")
TRACKED = np.array([0, 3, 8, 12])


class _Late(nn.Module):
    """Its second head takes part in some batches of the training, its third in none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.late, self.never = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        out = self.head(hidden)
        # A batch says by its first column whether the second head is used: no state, the same in a replay.
        return out + self.late(hidden) if not self.training or float(x[0, 0]) > 0 else out


class Stepped(Small):
    """13 samples in batches of 4, so the last one is smaller, and so is the last step of 3 batches."""

    epochs, batch_size, seed, scheduler_interval = 2, 4, 5, "step"
    shape: tuple[int, ...] = (4,)

    def __init__(
        self, kind: str = "adamw", clip: float | None = None, accumulate: int = 1, around: str = "groups"
    ) -> None:
        self.kind, self.clip_grad_norm, self.accumulate, self.around = kind, clip, accumulate, around

    def arguments(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "clip": self.clip_grad_norm,
            "accumulate": self.accumulate,
            "around": self.around,
        }

    def model(self) -> nn.Module:
        if self.around == "late":
            return _Late()
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

    def train_dataset(self) -> Any:
        return gaussian(13, self.shape, self.classes, 1)

    def test_dataset(self) -> Any:
        return gaussian(5, self.shape, self.classes, 2)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        weights = [p for p in model.parameters() if p.ndim > 1]
        biases = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": weights, "weight_decay": 0.2}, {"params": biases, "lr": 0.04}]
        if self.kind == "sgd":
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.05)
        kind = torch.optim.AdamW if self.kind == "adamw" else torch.optim.Adam
        groups[1] |= {"betas": (0.8, 0.9), "eps": 1e-3}
        return kind(groups, lr=0.03, betas=(0.85, 0.95), weight_decay=0.05)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        if self.around != "one-cycle":
            return None
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8, cycle_momentum=True)


def recorded(recipe: Any, tmp_path: Any, compute: Compute = DOUBLE, every: int | None = None) -> Any:
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri, every).run()
    return open_trajectory(uri)


def directions(dimension: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, dimension))


def rows_of(sink: Any, recipe: Any, trajectory: Any, compute: Compute, tracked: Any = TRACKED) -> np.ndarray:
    replay = Replay(Training(recipe, compute), trajectory, np.asarray(tracked), sink).run()
    rows = replay.numpy(0, len(tracked)).copy()
    replay.close()
    return rows


CASES = [Stepped(*case) for case in itertools.product(OPTIMISERS, (None, 0.3), (1, 3), SURROUNDINGS)]


def named(recipe: Stepped) -> str:
    clipping = "clipped" if recipe.clip_grad_norm else "whole"
    return f"{recipe.kind}-{clipping}-{recipe.accumulate}-{recipe.around}"


@pytest.mark.parametrize("recipe", CASES, ids=named)
def test_exact_forms_equal_autograd_and_the_fast_form_its_formula(recipe: Stepped, tmp_path: Any) -> None:
    trajectory = recorded(recipe, tmp_path)
    assert (trajectory.clip_factor is not None) == (recipe.clip_grad_norm is not None)
    if trajectory.clip_factor is not None:
        assert (
            trajectory.clip_factor[trajectory.updates if recipe.accumulate > 1 else slice(None)] < 1
        ).mean() > 0.5
    assert (trajectory.active is not None) == (recipe.around == "late")
    if recipe.around == "one-cycle":
        moving = trajectory.momentum if recipe.kind == "sgd" else trajectory.beta1
        assert len(np.unique(moving)) >= 3
    vectors = directions(len(trajectory.checkpoint(0).weights))
    unrolled = oracle.unrolled(recipe, trajectory, TRACKED)
    assert np.abs(unrolled.weights.detach().numpy() - trajectory.checkpoint(-1).weights).max() < 1e-13
    right = unrolled.along(vectors)
    assert np.isfinite(right).all()
    forward = vectors @ rows_of(ExactRows, recipe, trajectory, COUPLED).T
    assert np.abs(forward - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()
    back = Adjoint(Training(recipe, COUPLED), trajectory, TRACKED, vectors).run().contributions()
    assert np.abs(-13 * back - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()
    dense = oracle.dense(recipe, trajectory, TRACKED)
    assert np.abs(dense.weights - trajectory.checkpoint(-1).weights).max() < 1e-13
    assert np.abs(dense.loss - trajectory.loss).max() < 1e-13
    fast = rows_of(FastRows, recipe, trajectory, DOUBLE)
    assert oracle.relative_error(fast, dense.hypergradient) < oracle.DENSE_FLOAT64


class Sampled(Stepped):
    """Samples twice in a batch, in one epoch and not in the other, or never; sums of losses over weights."""

    epochs = 7  # max_steps ends before

    def __init__(self, kind: str, max_steps: int = 5) -> None:
        super().__init__(kind, 0.3, 2, "groups")
        self.max_steps = max_steps

    def arguments(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_steps": self.max_steps}

    def order(self, epoch: int, generator: torch.Generator) -> list[int]:
        drawn = torch.randint(13, (7,), generator=generator).tolist()
        return [3, 0, 3, 3, *drawn, 8] if epoch else [8, *drawn, 12, 12, 3]

    def weights(self, batch: Any) -> torch.Tensor:
        return 1.0 + batch[1]

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return (1.0 + targets) * F.cross_entropy(model(inputs), targets, reduction="none")


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_repeated_and_left_out_samples_weights_and_a_number_of_steps(kind: str, tmp_path: Any) -> None:
    recipe = Sampled(kind)
    trajectory = recorded(recipe, tmp_path, every=2)
    assert int(trajectory.updates.sum()) == 5
    twice = [row for row in trajectory.batches if len(set(row[row >= 0])) < (row >= 0).sum()]
    assert len(twice) > 2
    of_all = trajectory.batches[trajectory.batches >= 0]
    assert len({0, 3, 8, 12} & set(of_all)) == 4
    sums = [
        sum(1.0 + recipe.train_dataset()[int(m)][1] for m in row if m >= 0) for row in trajectory.batches[:2]
    ]
    assert trajectory.divisor[:2] == pytest.approx(float(sum(sums)), rel=1e-15)
    vectors = directions(len(trajectory.checkpoint(0).weights))
    right = oracle.unrolled(recipe, trajectory, TRACKED).along(vectors)
    forward = vectors @ rows_of(ExactRows, recipe, trajectory, COUPLED).T
    assert np.abs(forward - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()
    back = Adjoint(Training(recipe, COUPLED), trajectory, TRACKED, vectors).run().contributions()
    assert np.abs(-13 * back - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()
    dense = oracle.dense(recipe, trajectory, TRACKED)
    assert np.abs(dense.loss - trajectory.loss).max() < 1e-13
    fast = rows_of(FastRows, recipe, trajectory, DOUBLE)
    assert oracle.relative_error(fast, dense.hypergradient) < oracle.DENSE_FLOAT64
    products = Replay(
        Training(recipe, DOUBLE), trajectory, TRACKED, partial(FastProducts, targets_QD=vectors)
    )
    found = -13 * products.run().contributions()
    products.close()
    assert np.abs(found - vectors @ dense.hypergradient.T).max() < 1e-12 * np.abs(found).max()


class Made(Stepped):
    """An optimiser made with an option of its implementation."""

    def __init__(self, kind: str, option: str | None) -> None:
        super().__init__(kind, None, 1, "one-cycle")
        self.option = option

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        made = super().optimizer(model)
        groups = [
            {k: v for k, v in g.items() if k not in ("foreach", "fused", "decoupled_weight_decay")}
            for g in made.param_groups
        ]
        return type(made)(groups, **({} if self.option is None else {self.option: True}))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_every_implementation_is_replayed_as_it_is(kind: str, dtype: str, tmp_path: Any) -> None:
    """A replay is held against the record's digests; foreach has the bits of the loop."""
    compute, last = Compute(dtype=dtype, device="cpu"), {}
    for option in (None, "foreach", "fused"):
        recipe = Made(kind, option)
        trajectory = recorded(recipe, tmp_path / str(option), compute)
        replay = Replay(Training(recipe, compute), trajectory, TRACKED, FastRows)
        assert any(g.get(option) for g in replay.training.optimizer.param_groups) == (option is not None)
        rows = replay.run().numpy(0, len(TRACKED))
        replay.close()
        assert replay.done == len(trajectory.loss) == trajectory.digest_step[-1]
        last[option] = trajectory.checkpoint(-1).weights
        right = oracle.dense(recipe, trajectory, TRACKED).hypergradient
        limit = oracle.DENSE_FLOAT64 if dtype == "float64" else oracle.DENSE_FLOAT32
        assert oracle.relative_error(rows, right) < limit
    assert np.array_equal(last["foreach"], last[None])
    assert last["fused"] == pytest.approx(last[None], rel=1e-4, abs=1e-6)


def test_settings_are_recorded_by_group_and_step(tmp_path: Any) -> None:
    class Moving(Stepped):
        def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
            return _Moves(optimizer)

    recipe = Moving("adamw")
    trajectory = recorded(recipe, tmp_path)
    steps = len(trajectory.loss)
    assert trajectory.eps[:, 0] == pytest.approx(1e-8 * 2.0 ** np.arange(steps))
    assert trajectory.eps[:, 1] == pytest.approx(1e-3 * 2.0 ** np.arange(steps))
    assert trajectory.beta2[:, 0] == pytest.approx(1 - 0.05 * 0.9 ** np.arange(steps))
    assert trajectory.weight_decay[:, 1] == pytest.approx(0.05 + 0.01 * np.arange(steps))
    assert np.unique(trajectory.learning_rate, axis=0).tolist() == [[0.03, 0.04]]
    vectors = directions(len(trajectory.checkpoint(0).weights))
    right = oracle.unrolled(recipe, trajectory, TRACKED).along(vectors)
    forward = vectors @ rows_of(ExactRows, recipe, trajectory, COUPLED).T
    assert np.abs(forward - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()
    dense = oracle.dense(recipe, trajectory, TRACKED)
    fast = rows_of(FastRows, recipe, trajectory, DOUBLE)
    assert oracle.relative_error(fast, dense.hypergradient) < oracle.DENSE_FLOAT64


class _Moves(torch.optim.lr_scheduler.LRScheduler):
    """Moves eps, beta2 and decay of every group at every step."""

    def get_lr(self) -> list[float]:
        for group in self.optimizer.param_groups if self.last_epoch else ():
            beta1, beta2 = group["betas"]
            group["betas"], group["eps"] = (beta1, 1 - 0.9 * (1 - beta2)), 2 * group["eps"]
            group["weight_decay"] += 0.01
        return [group["lr"] for group in self.optimizer.param_groups]
