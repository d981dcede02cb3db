"""What else moves weights or gradients than the optimiser's own step is refused by name."""

from __future__ import annotations

import types

import pytest
import torch
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.odd_recipes import Odd
from tests.recipes import TRACEABLE

DOUBLE = Compute(dtype="float64", device="cpu")


def record(recipe, tmp_path, compute=DOUBLE):
    return Recorder(Training(recipe, compute), str(tmp_path / "trajectory.zarr")).run()


class PreHook(Odd):
    def optimizer(self, model):
        found = super().optimizer(model)
        found.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 0.2) and None)
        return found


class PostHook(Odd):
    def optimizer(self, model):
        found = super().optimizer(model)
        found.register_step_post_hook(lambda *_: None)
        return found


class GradientHook(Odd):
    def optimizer(self, model):
        for parameter in model.parameters():
            parameter.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return super().optimizer(model)


class AccumulateHook(Odd):
    def model(self):
        model = super().model()
        model[0].bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5) and None)
        return model


class Patched(Odd):
    def optimizer(self, model):
        found = super().optimizer(model)
        right = found.step

        def step(self, closure=None):
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            return right()

        found.step = types.MethodType(step, found)
        return found


class Accumulating(Odd):
    def optimizer(self, model):
        found = super().optimizer(model)
        found.zero_grad = lambda set_to_none=True: None
        return found


class Foreign(Odd):
    def optimizer(self, model):
        temperature = nn.Parameter(torch.ones(()))
        return torch.optim.SGD([*model.parameters(), temperature], lr=0.1)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (PreHook, "the optimizer has a step_pre_hook \\(PreHook.optimizer.<locals>.<lambda>\\)"),
        (PostHook, "the optimizer has a step_post_hook"),
        (GradientHook, "parameter '0.weight' has a gradient hook"),
        (AccumulateHook, "parameter '0.bias' has a gradient hook"),
        (Patched, "step\\(\\) was replaced \\(Patched.optimizer.<locals>.step\\)"),
        (Accumulating, "zero_grad\\(\\) was replaced"),
        (Foreign, "holds a parameter of shape \\(\\) that is not the model's"),
    ],
)
def test_what_changes_the_update_is_refused_before_training(kind, said):
    with pytest.raises(RecipeError, match=said):
        Training(kind(), DOUBLE)


def test_global_hooks_are_refused():
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        with pytest.raises(RecipeError, match="global step_post_hook"):
            Training(Odd(), DOUBLE)
    finally:
        handle.remove()


class _Clamped(nn.Module):
    """Clips its own weights in the forward pass, where no hook shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        if self.training:
            self.fc.weight.data.clamp_(-0.3, 0.3)
        return self.fc(x)


class Clamped(Odd):
    def model(self):
        return _Clamped()


class HookedLater(Odd):
    """The hook comes with the scheduler."""

    def scheduler(self, optimizer):
        optimizer.register_step_post_hook(lambda *_: None)


class _Lookahead(LambdaLR):
    def step(self, *arguments):
        super().step(*arguments)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.data.mul_(0.99)


class Lookahead(Odd):
    def scheduler(self, optimizer):
        return _Lookahead(optimizer, lambda _epoch: 1.0)


class _Restarts(LambdaLR):
    def step(self, *arguments):
        super().step(*arguments)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()


class Restarts(Odd):
    momentum = 0.9

    def scheduler(self, optimizer):
        return _Restarts(optimizer, lambda _epoch: 1.0)


class LookaheadByStep(Lookahead):
    scheduler_interval = "step"


class _Released(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 3)
        self.register_buffer("t", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            if int(self.t) >= 3:
                self.body.requires_grad_(True)
            self.t += 1
        return self.head(torch.tanh(self.body(x)))


class Released(Odd):
    def model(self):
        return _Released()


class _Frozen(_Released):
    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(True)

    def forward(self, x):
        if self.training and int(self.t) >= 3:
            self.body.requires_grad_(False)
        self.t += 1
        return self.head(torch.tanh(self.body(x)))


class Frozen(Odd):
    def model(self):
        return _Frozen()


class _Replaced(_Released):
    def forward(self, x):
        if self.training and int(self.t) == 3:
            self.body.weight = nn.Parameter(self.body.weight.detach().clone(), requires_grad=False)
        self.t += self.training
        return self.head(torch.tanh(self.body(x)))


class Replaced(Odd):
    def model(self):
        return _Replaced()


class _Grown(_Released):
    def forward(self, x):
        if self.training and int(self.t) == 3:
            self.more = nn.Linear(3, 3).double()
        self.t += self.training
        out = self.head(torch.tanh(self.body(x)))
        return self.more(out) if hasattr(self, "more") else out


class Grown(Odd):
    def model(self):
        return _Grown()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Clamped, "step 0 moved parameter 'fc.weight' elsewhere than SGD does"),
        (HookedLater, "step_post_hook"),
        (Lookahead, "scheduler.step\\(\\) changed the weights or momentum after step 2"),
        (Restarts, "scheduler.step\\(\\) changed the weights or momentum after step 2"),
        (LookaheadByStep, "scheduler.step\\(\\) changed the weights or momentum after step 0"),
        (Released, "parameter 'body.weight' began to require gradients at step 3 of 6"),
        (Frozen, "parameter 'body.weight' stopped requiring gradients at step 3 of 6"),
        (Replaced, "parameter 'body.weight' was replaced or removed by step 3 of 6"),
        (Grown, "parameter 'more.weight' was added by step 3 of 6"),
    ],
)
def test_what_changes_on_the_way_is_refused_by_step_and_name(kind, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        record(kind(), tmp_path)
    assert not list(tmp_path.iterdir())


class _Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.center = nn.Linear(6, 3), torch.zeros(3)

    def forward(self, x):
        z = self.fc(x)
        if self.training:
            self.center = 0.9 * self.center + 0.1 * z.detach().mean(0)
        return z - self.center.to(z)


class Remembering(Odd):
    def model(self):
        return _Remembering()


def test_a_state_in_plain_attributes_is_refused(tmp_path):
    with pytest.raises(
        RecipeError,
        match=r"keeps a state in plain attributes, or moves frozen parameters; register_buffer\(\) them",
    ):
        record(Remembering(), tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", TRACEABLE, ids=lambda k: k.__name__)
def test_no_setting_of_sgd_is_taken_for_something_else(kind, dtype, tmp_path):
    found = record(kind(), tmp_path, Compute(dtype=dtype, device="cpu"))
    assert found["checked_steps"] >= min(16, Training(kind(), DOUBLE).steps)


def test_a_group_with_learning_rate_zero_is_released_later(tmp_path):
    """What the message proposes for a body that is trained later."""

    class Later(Odd):
        epochs = 4

        def optimizer(self, model):
            return torch.optim.SGD(
                [{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1
            )

        def scheduler(self, optimizer):
            return LambdaLR(optimizer, [lambda epoch: float(epoch >= 2), lambda _epoch: 1.0])

    assert record(Later(), tmp_path)["checked_steps"] == 12
