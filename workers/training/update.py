"""The update must be the one the recursion differentiates: what else moves weights or gradients is refused.

Hooks and a patched ``step`` are seen when training is built; what is done elsewhere (in a forward
pass, by a scheduler, between two steps) shows where the weights after a step are not what the recorded
settings make of the weights, gradients and momentum before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ...storage.errors import RecipeError
from ..recursion.families import family_of, family_or_sgd

MOVES = 1e-3
"""How far a weight may be from its prediction, relative to the parameter's largest move: rounding."""

PLAIN = "remove it: only the optimizer's own step is followed"


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimiser whose update is not that of its class.

    Raises:
        RecipeError: Its class or an option has no rule, or hooks or a patched ``step`` change what it does.
    """
    family_of(optimizer)
    check_hooks(optimizer, model)


def check_owned(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse parameters that the optimiser trains and the model does not have.

    Raises:
        RecipeError: Names their group and shape.
    """
    own = {id(p) for p in model.parameters()}
    for k, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in own and p.requires_grad:
                raise RecipeError(
                    f"group {k} of the optimizer holds a parameter of shape {tuple(p.shape)} that is not the model's, so "
                    "its training would not be followed; register it on the model and build the optimizer from that"
                )


def check_hooks(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse hooks on the optimiser and on parameters, and a ``step`` that was put in its place.

    Raises:
        RecipeError: Names the hook.
    """
    for name in ("step", "zero_grad"):
        found = vars(optimizer).get(name)
        if found is not None and not hasattr(found, "_wrapped_by_lr_sched"):
            raise RecipeError(f"the optimizer's {name}() was replaced ({_named(found)}); {PLAIN}")
    hooks: dict[str, Any] = {
        "step_pre_hook": optimizer._optimizer_step_pre_hooks,
        "step_post_hook": optimizer._optimizer_step_post_hooks,
        "global step_pre_hook": _global_optimizer_pre_hooks,
        "global step_post_hook": _global_optimizer_post_hooks,
    }
    for kind, found in hooks.items():
        for hook in found.values():
            raise RecipeError(
                f"the optimizer has a {kind} ({_named(hook)}), which may change the update; {PLAIN}"
            )
    for name, parameter in model.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            for hook in (getattr(parameter, kind) or {}).values():
                raise RecipeError(
                    f"parameter {name!r} has a gradient hook ({_named(hook)}), which may change the update; {PLAIN}"
                )


def _named(hook: Callable[..., Any]) -> str:
    return getattr(hook, "__qualname__", None) or type(hook).__name__


class TrainableSet:
    """What requires gradients must stay what it was when training was built.

    Args:
        model: The model as the optimiser was built for it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._all = list(model.named_parameters())
        self._flags = [p.requires_grad for _name, p in self._all]

    def check(self, step: int, steps: int) -> None:
        """Compare the flags; cheap enough for every step.

        Raises:
            RecipeError: Names the step and the parameter.
        """
        for (name, p), before in zip(self._all, self._flags, strict=True):
            if p.requires_grad != before:
                how = "stopped requiring" if before else "began to require"
                raise RecipeError(
                    f"parameter {name!r} {how} gradients at step {step} of {steps}, and what is trained must stay the same; "
                    "let it require gradients from the start (a group with learning rate 0 keeps it still), or never"
                )

    def check_identity(self, step: int, steps: int) -> None:
        """Compare the parameters themselves.

        Raises:
            RecipeError: One came, went or was replaced; names the step and the parameter.
        """
        now = {name: id(p) for name, p in self.model.named_parameters()}
        for name, p in self._all:
            if now.pop(name, None) != id(p):
                raise RecipeError(
                    f"parameter {name!r} was replaced or removed by step {step} of {steps}, so the optimizer holds another; "
                    "build all layers in model()"
                )
        for name in now:
            raise RecipeError(
                f"parameter {name!r} was added by step {step} of {steps}, and the optimizer does not know it; "
                "build all layers in model()"
            )


class UpdateCheck:
    """Holds one step against the formula of its optimiser.

    Args:
        optimizer: The optimiser.
        names: Of its parameters that the model trains, by id.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
        self.optimizer, self.names = optimizer, names
        self.family = family_or_sgd(optimizer)  # refused when training was built, if it has no rule
        self._before: list[tuple[dict[str, Any], nn.Parameter, Tensor, dict[str, Any]]] = []

    @torch.no_grad()
    def before(self) -> None:
        """Note weights and the optimiser's state; to be called before the first forward pass of a step."""
        self._before = []
        for group in self.optimizer.param_groups:
            settings = _settings(group)
            for p in group["params"]:
                if id(p) in self.names:
                    state = self.optimizer.state.get(p, {})
                    kept = {key: v.clone() if isinstance(v, Tensor) else v for key, v in state.items()}
                    self._before.append((settings, p, p.detach().clone(), kept))

    def settle(self) -> None:
        """Note the settings again; to be called before a step of a loop that moves them after its forward pass."""
        current = {id(p): _settings(group) for group in self.optimizer.param_groups for p in group["params"]}
        self._before = [(current[id(p)], p, weight, state) for _old, p, weight, state in self._before]

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Compare the weights with what the settings make of what was noted and of the (clipped) gradients.

        Raises:
            RecipeError: Names the step and the parameter.
        """
        looked = [one for one in self._before if one[1].grad is not None and one[1].numel()]
        if not looked:
            return
        kept = [weight for _settings, _p, weight, _state in looked]
        moves = [self.family.moved(settings, w, p.grad, state) for settings, p, w, state in looked]  # type: ignore[arg-type]
        off = torch._foreach_sub(kept, [p.detach() for _settings, p, _weight, _state in looked])
        torch._foreach_add_(off, moves)
        now = [p.detach() for _settings, p, _weight, _state in looked]
        # One number is read: each would make the host wait.
        largest, move, before, after = (
            torch.stack([norm.double() for norm in torch._foreach_norm(values, torch.inf)])
            for values in (off, moves, kept, now)
        )
        rounding = 8 * max(torch.finfo(p.dtype).eps for p in now) * torch.maximum(before, after)
        over = largest > MOVES * move + rounding
        if not bool(over.any()):
            return
        k = over.tolist().index(True)
        raise RecipeError(
            f"step {step} moved parameter {self.names[id(looked[k][1])]!r} elsewhere than {type(self.optimizer).__name__} does (off by {float(largest[k]):.1e}; its "
            f"largest move is {float(move[k]):.1e}): something else changes weights or gradients; {PLAIN}"
        )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
