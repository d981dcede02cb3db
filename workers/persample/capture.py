"""What each layer saw and what came back to it, caught while the training step runs as always.

Forward hooks note a layer's input; a hook on its output tensor notes the loss gradient there. The
hooks return nothing and change nothing, so the step has the same bits with and without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...storage.errors import RecipeError
from .rules import Prepare, Rule, rule_for


class Call:
    """One call of one layer: ``x_B`` its input, ``d_B`` the loss gradient at its output or None.

    ``shape`` is that of the output, known before any gradient is.
    """

    __slots__ = ("d_B", "module", "name", "shape", "version", "x_B")

    def __init__(self, name: str, module: nn.Module, x_B: Tensor, shape: torch.Size) -> None:
        self.name, self.module, self.x_B, self.shape = name, module, x_B, shape
        self.version = x_B._version
        self.d_B: Tensor | None = None


class Capture:
    """Hooks on every layer that has a rule and owns a trainable parameter.

    Args:
        model: The model being trained.
        wanted: Parameters (by name) whose per-sample gradients are to come from rules.
    """

    def __init__(self, model: nn.Module, wanted: Mapping[int, str]) -> None:
        self.calls: list[Call] = []
        self.listening = False
        self.rules: dict[nn.Module, tuple[Rule, Prepare | None]] = {}
        self._handles = []
        for name, module in model.named_modules():
            found = rule_for(module)
            owned = any(id(p) in wanted for p in module.parameters(recurse=False))
            if found and owned:
                self.rules[module] = found
                hook = self._hook(name or type(module).__name__)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.listening or not isinstance(output, Tensor) or not output.requires_grad:
                return
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor):
                return
            with torch._C.DisableTorchFunction():  # the losses may be computed where detach does nothing
                call = Call(name, module, x.detach(), output.shape)
            self.calls.append(call)

            def keep(gradient: Tensor) -> None:
                if self.listening:
                    call.d_B = gradient.detach()

            output.register_hook(keep)

        return hook

    @contextmanager
    def listen(self) -> Iterator[list[Call]]:
        """Catch the calls of one forward and backward pass."""
        self.calls = []
        self.listening = True
        try:
            yield self.calls
        finally:
            self.listening = False

    def take(self) -> list[Call]:
        """Return the calls caught since ``listen`` and let go of them.

        Raises:
            RecipeError: A layer's input was overwritten in place after the layer saw it.
        """
        calls, self.calls = self.calls, []
        for call in calls:
            if call.d_B is not None and call.x_B._version != call.version:
                raise RecipeError(
                    f"the input of layer {call.name!r} was changed in place after the layer saw it; "
                    "use the out-of-place operation there"
                )
        return calls

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def pause(self) -> None:
        """Stop noting gradients while something else runs a backward pass."""
        self.listening = False

    def resume(self) -> None:
        """Go on noting gradients."""
        self.listening = True
