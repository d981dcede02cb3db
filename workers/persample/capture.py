"""What each layer saw and what came back to it, caught while the training step runs as always.

Forward hooks note a layer's input; a hook on its output tensor notes the loss gradient there. The
hooks return nothing and change nothing, so the step has the same bits with and without them. Layers that
apply several linear maps themselves (attention, recurrent nets) are caught as these; see ``applied``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...storage.errors import RecipeError
from . import recurrent
from .applied import Projections, linear_noted
from .rules import AppliedLinear, Prepare, Rule, rule_for

Form = Literal["first", "second", "lent"]
"""Where the batch of a call is: on its first axis, on its second, or nowhere: see ``lent``."""


class Call:
    """One call of one layer: ``x_B`` its input, ``d_B`` the loss gradient at its output or None.

    ``shape`` is that of the output, known before any gradient is; ``moments`` what a BatchNorm layer normalised with,
    where its node tells.
    """

    __slots__ = ("d_B", "form", "module", "moments", "name", "shape", "version", "x_B")

    def __init__(self, name: str, module: nn.Module, x_B: Tensor, shape: torch.Size, form: Form = "first"):
        self.name, self.module, self.x_B, self.shape, self.form = name, module, x_B, shape, form
        self.version = x_B._version
        self.d_B: Tensor | None = None
        self.moments: tuple[Tensor, Tensor] | None = None

    def covers(self, size: int) -> bool:
        """Whether the batch, of ``size`` samples, is where it ought to be."""
        if self.form == "lent":
            return True
        axis = slice(1, 2) if self.form == "second" else slice(1)
        return self.x_B.shape[axis] == (size,) == self.shape[axis]


def transposed(call: Call) -> Call | None:
    """Return a call with its second axis as the batch, or None where it has none."""
    if call.d_B is None or call.x_B.ndim < 2 or call.d_B.ndim < 2:
        return None
    other = Call(call.name, call.module, call.x_B.transpose(0, 1), call.shape)
    other.d_B = call.d_B.transpose(0, 1)
    return other


def lent(call: Call, calls: list[Call]) -> Call | None:
    """Return the call of a table of positions with the gradients that each sample has there, or None.

    Rows of an Embedding that every sample of the batch shares ((L, E) or (1, L, E)) are added to what a
    sample has alone, such as its tokens' rows: their gradients, sample by sample, are those of that.
    """
    if call.d_B is None or not isinstance(call.module, nn.Embedding):
        return None
    d, x = call.d_B, call.x_B
    if d.ndim == 3 and len(d) == 1:
        d, x = d[0], x.reshape(1, -1)[0]
    if d.ndim != 2 or x.ndim != 1:
        return None
    for other in calls:
        if other.module is call.module or not isinstance(other.module, nn.Embedding) or other.d_B is None:
            continue
        given = other.d_B
        if given.shape[1:] == d.shape and bool((given.sum(0) - d).abs().max() <= 1e-3 * d.abs().max()):
            found = Call(call.name, call.module, x.expand(len(given), len(x)), call.shape)
            found.d_B = given
            return found
    return None


class _Rolled:
    """One call of a recurrent layer, and the calls of its products, which are filled in once it has gradients."""

    def __init__(self, module: nn.RNNBase, x_LBI: Tensor, state: recurrent.State, calls: dict[str, Call]):
        self.module, self.x_LBI, self.state, self.calls = module, x_LBI, state, calls
        self.d: dict[int, Tensor] = {}

    def keep(self, k: int, d: Tensor) -> None:
        """Note the gradient at the outputs (0) or at a part of the last state."""
        self.d[k] = d.transpose(0, 1) if k == 0 and self.module.batch_first else d

    def fill(self) -> None:
        """Give the products what they saw and the loss gradients at them."""
        if not self.d:
            return
        last = tuple(self.d.get(k) for k in range(1, 1 + len(self.state)))
        found = recurrent.gradients(self.module, self.x_LBI, self.state, self.d.get(0), last)
        for name, call in self.calls.items():
            call.x_B, call.d_B = found[name]
            call.version = call.x_B._version


class Capture:
    """Hooks on every layer that has a rule and owns a trainable parameter.

    Args:
        model: The model being trained.
        wanted: Parameters (by id) whose per-sample gradients are to come from rules, with the form of the calls
            that they come from.

    Attributes:
        calls: Of the layers, since ``listen``.
        ends: Where in the graph their outputs are.
        rules: Of the layers that are followed.
    """

    def __init__(self, model: nn.Module, wanted: Mapping[int, Form]) -> None:
        self.calls: list[Call] = []
        self.ends: list[GradientEdge] = []
        self.listening = False
        self.rules: dict[nn.Module, tuple[Rule, Prepare | None]] = {}
        self.forms: dict[nn.Module, Form] = {}
        self._rolled: list[_Rolled] = []
        self._handles: list[Any] = []
        self._running: dict[nn.Module, AbstractContextManager[None]] = {}
        inner: set[nn.Module] = set()
        for name, module in model.named_modules():
            name = name or type(module).__name__
            forms = [wanted[id(p)] for p in module.parameters(recurse=False) if id(p) in wanted]
            if isinstance(module, nn.MultiheadAttention):
                forms += [wanted[id(p)] for p in module.out_proj.parameters() if id(p) in wanted]
                inner.add(module.out_proj)  # never called itself
            if not forms or module in inner:
                continue
            assert len({*forms}) == 1, name
            if isinstance(module, nn.MultiheadAttention):
                self._follow_attention(name, module)
            elif recurrent.known(module):
                assert isinstance(module, nn.RNNBase)
                self._follow_recurrent(name, module)
            elif found := rule_for(module):
                self.rules[module], self.forms[module] = found, forms[0]
                hook = self._hook(name)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _stand_in(self, part: AppliedLinear) -> None:
        found = rule_for(part)
        assert found is not None
        self.rules[part], self.forms[part] = found, "first"

    def _note(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> Call:
        call = Call(name, module, x, output.shape, self.forms[module])
        self.calls.append(call)
        return call

    def _keep(self, output: Tensor, take: Callable[[Tensor], None]) -> None:
        def keep(gradient: Tensor) -> None:
            if self.listening:
                take(gradient.detach())

        self.ends.append(get_gradient_edge(output))
        output.register_hook(keep)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.listening or not isinstance(output, Tensor) or not output.requires_grad:
                return
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor):
                return
            with torch._C.DisableTorchFunction():  # the losses may be computed where detach does nothing
                call = self._note(name, module, x.detach(), output)
                call.moments = getattr(output.grad_fn, "moments", None)
            self._keep(output, lambda d: setattr(call, "d_B", d))

        return hook

    def _follow_attention(self, name: str, module: nn.MultiheadAttention) -> None:
        projections = Projections(module)
        for part in projections.parts.values():
            self._stand_in(part)

        def note(
            part: AppliedLinear, x_B: Tensor, output: Tensor, batch_first: Callable[[Tensor], Tensor]
        ) -> None:
            with torch._C.DisableTorchFunction():
                call = self._note(name, part, x_B, batch_first(output.detach()))
            self._keep(output, lambda d: setattr(call, "d_B", batch_first(d)))

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = projections.batch_of(args, kwargs)
            if self.listening and batch is not None:
                self._running[module] = linear_noted(projections, batch, note)
                self._running[module].__enter__()

        def after(module: nn.Module, *_: Any) -> None:
            running = self._running.pop(module, None)
            if running is not None:
                running.__exit__(None, None, None)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _follow_recurrent(self, name: str, module: nn.RNNBase) -> None:
        parts = {}
        for weight, bias in recurrent.halves(module):
            own = module._parameters
            matrix = own[weight]
            assert matrix is not None
            parts[weight] = AppliedLinear(matrix, None if bias is None else own[bias])
            self._stand_in(parts[weight])

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = (*args, *kwargs.values())
            if not self.listening or not isinstance(given[0], Tensor) or given[0].ndim != 3:
                return
            if module.dropout and module.training and module.num_layers > 1:
                return  # what the kernel dropped between its layers is not known
            ends = [output[0], *(output[1] if isinstance(output[1], tuple) else (output[1],))]
            if not ends[0].requires_grad:
                return
            with torch._C.DisableTorchFunction():
                x = given[0].detach()
                x_LBI = x.transpose(0, 1) if module.batch_first else x
                state = recurrent.begun(module, x_LBI, given[1] if len(given) > 1 else None)
                x_B = x_LBI.transpose(0, 1)
                calls = {key: self._note(name, part, x_B, x_B) for key, part in parts.items()}
            rolled = _Rolled(module, x_LBI, tuple(s.detach() for s in state), calls)
            self._rolled.append(rolled)

            for k, end in enumerate(ends):
                self._keep(end, partial(rolled.keep, k))

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    @contextmanager
    def listen(self) -> Iterator[list[Call]]:
        """Catch the calls of one forward and backward pass."""
        self.calls, self.ends, self._rolled = [], [], []
        self.listening = True
        try:
            yield self.calls
        finally:
            self.listening = False
            self.ends = []
            for running in self._running.values():  # of a forward pass that failed
                running.__exit__(None, None, None)
            self._running.clear()

    def take(self) -> list[Call]:
        """Return the calls caught since ``listen``, batch first, and let go of them.

        Raises:
            RecipeError: A layer's input was overwritten in place after the layer saw it.
        """
        calls, self.calls = self.calls, []
        rolled, self._rolled = self._rolled, []
        late = [call for one in rolled if one.d for call in one.calls.values()]
        for call in calls:
            if (call.d_B is not None or call in late) and call.x_B._version != call.version:
                raise RecipeError(
                    f"the input of layer {call.name!r} was changed in place after the layer saw it; "
                    "use the out-of-place operation there"
                )
        for one in rolled:
            one.fill()
        for call in calls:
            _widen(call)
        return [_formed(call, calls) for call in calls]

    def forget(self) -> None:
        """Let go of the calls caught so far: the pass that they are of is not the one that counts."""
        self.calls.clear()
        self._rolled.clear()

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def walk(self, value: Tensor) -> None:
        """Run a backward pass from ``value`` down to what the layers returned, and to no parameter."""
        if self.ends:
            torch.autograd.grad(value, self.ends, allow_unused=True)

    def pause(self) -> None:
        """Stop noting gradients while something else runs a backward pass."""
        self.listening = False

    def resume(self) -> None:
        """Go on noting gradients."""
        self.listening = True


def _widen(call: Call) -> None:
    """Give what a layer saw under autocast the type of its parameters: products need one type."""
    wanted = next((p.dtype for p in call.module.parameters(recurse=False)), None)
    if wanted is None:
        return
    if call.x_B.is_floating_point() and call.x_B.dtype != wanted:
        call.x_B = call.x_B.to(wanted)
    if call.d_B is not None and call.d_B.dtype != wanted:
        call.d_B = call.d_B.to(wanted)


def _formed(call: Call, calls: list[Call]) -> Call:
    """Return a call with the batch on its first axis, where its form says how."""
    if call.form == "second":
        return transposed(call) or call
    if call.form == "lent":
        return lent(call, calls) or call
    return call
