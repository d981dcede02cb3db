"""LSTM, GRU and RNN layers step by step: what the fused kernels hide, in plain operations.

Letters: B samples, L steps, I inputs and H states of a layer; z numbers before the gates (4 H, 3 H or H a step).

    gi = x W_ih^T + b_ih        gh = h W_hh^T + b_hh
    LSTM  i, f, o = sigma(gi + gh), g = tanh(gi + gh);  c <- f c + i g,  h <- o tanh(c)
    GRU   r, z = sigma(gi + gh),  n = tanh(gi_n + r gh_n);  h <- (1 - z) n + z h
    RNN   h <- tanh or relu (gi + gh)

Two uses. Products with the Hessian: the fused kernels lack forward mode or a second derivative, by dtype and device. And
per-sample gradients: with d gi and d gh known, each weight's gradient is that of a Linear layer seen at L
positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""(h,) or (h, c) of all layers and directions, (layers * directions, B, H) each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Half:
    """One of the two products of a direction of a layer, over all steps.

    Attributes:
        name: Of its weight: ``weight_ih_l0``.
        seen: What it was multiplied with, (L, B, I or H).
        made: What came out, a tensor (L, B, z) or one (B, z) a step.
    """

    name: str
    seen: Tensor
    made: Tensor | list[Tensor]


def known(module: nn.Module) -> bool:
    """Whether a layer is one that is known here, its weights its own parameters."""
    if not isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)) or module.proj_size:
        return False
    return all(module._parameters.get(weight) is not None for weight, _bias in halves(module))


def halves(module: nn.RNNBase) -> list[tuple[str, str | None]]:
    """Return (weight, bias) of every product of a layer, by name."""
    return [
        (f"weight_{kind}{suffix}", f"bias_{kind}{suffix}" if module.bias else None)
        for suffix in _suffixes(module)
        for kind in ("ih", "hh")
    ]


def _suffixes(module: nn.RNNBase) -> list[str]:
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{layer}{way}" for layer in range(module.num_layers) for way in ways]


def begun(module: nn.RNNBase, x_LBI: Tensor, given: Any) -> State:
    """Return the state a layer begins with: the given one, or zeros."""
    if given is not None:
        return tuple(given) if isinstance(given, (tuple, list)) else (given,)
    count = module.num_layers * (2 if module.bidirectional else 1)
    zeros = torch.zeros(count, x_LBI.shape[1], module.hidden_size, dtype=x_LBI.dtype, device=x_LBI.device)
    return (zeros, zeros) if isinstance(module, nn.LSTM) else (zeros,)


def unrolled(
    module: nn.RNNBase, x_LBI: Tensor, state: State, parameters: dict[str, Tensor] | None = None
) -> tuple[Tensor, State, list[Half]]:
    """Run a layer step by step.

    Args:
        module: An LSTM, GRU or RNN without projections.
        x_LBI: Its input, (L, B, I).
        state: What it begins with.
        parameters: In place of its own.

    Returns:
        The outputs (L, B, directions * H), the last state, and every product in the order of ``halves``.
    """
    own = dict(module.named_parameters(recurse=False)) if parameters is None else parameters
    made: list[Half] = []
    last: list[State] = []
    outputs: list[Tensor] = []
    seen, ways = x_LBI, 2 if module.bidirectional else 1
    for k, suffix in enumerate(_suffixes(module)):
        backwards = k % ways == 1
        gi = F.linear(seen, own[f"weight_ih{suffix}"], own.get(f"bias_ih{suffix}"))
        weight, bias = own[f"weight_hh{suffix}"], own.get(f"bias_hh{suffix}")
        now = tuple(part[k] for part in state)
        hidden: list[Tensor] = []
        before: list[Tensor] = []
        recurrent: list[Tensor] = []
        for t in reversed(range(len(gi))) if backwards else range(len(gi)):
            before.append(now[0])
            recurrent.append(F.linear(now[0], weight, bias))
            now = _step(module, gi[t], recurrent[-1], now)
            hidden.append(now[0])
        outputs.append(torch.stack(hidden[::-1] if backwards else hidden))
        last.append(now)
        made.append(Half(name=f"weight_ih{suffix}", seen=seen, made=gi))
        made.append(Half(name=f"weight_hh{suffix}", seen=torch.stack(before), made=recurrent))
        if len(outputs) == ways:
            seen = torch.cat(outputs, -1) if ways > 1 else outputs[0]
            outputs = []
            if module.dropout and k + 1 < module.num_layers * ways:
                seen = F.dropout(seen, module.dropout, module.training)
    return seen, tuple(torch.stack(parts) for parts in zip(*last, strict=True)), made


def _step(module: nn.RNNBase, gi: Tensor, gh: Tensor, now: State) -> State:
    if isinstance(module, nn.LSTM):
        i, f, g, o = (gi + gh).chunk(4, -1)
        c = torch.sigmoid(f) * now[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if isinstance(module, nn.GRU):
        (ir, iz, inner), (hr, hz, hn) = gi.chunk(3, -1), gh.chunk(3, -1)
        z = torch.sigmoid(iz + hz)
        n = torch.tanh(inner + torch.sigmoid(ir + hr) * hn)
        return ((1 - z) * n + z * now[0],)
    z = gi + gh
    return (torch.relu(z) if module.nonlinearity == "relu" else torch.tanh(z),)


def forward(module: nn.RNNBase, x: Any, hx: Any = None) -> Any:
    """Stand in for the layer's own ``forward``, in plain operations where its input is a batch of tensors."""
    if not isinstance(x, Tensor) or x.ndim != 3:
        return type(module).forward(module, x, hx)
    first = x.transpose(0, 1) if module.batch_first else x
    outputs, last, _ = unrolled(module, first, begun(module, first, hx))
    if module.batch_first:
        outputs = outputs.transpose(0, 1)
    return outputs, last if isinstance(module, nn.LSTM) else last[0]


def gradients(
    module: nn.RNNBase, x_LBI: Tensor, state: State, d_out: Tensor | None, d_last: tuple[Tensor | None, ...]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what every product of a layer saw and the loss gradient at it, (B, L, .) each, by weight.

    Args:
        module: The layer, at the weights it ran with.
        x_LBI: Its input.
        state: What it began with.
        d_out: Loss gradient at its outputs, (L, B, directions * H); None: zero.
        d_last: At its last state.
    """
    own = {name: p.detach().requires_grad_() for name, p in module.named_parameters(recurse=False)}
    with torch.enable_grad():
        outputs, last, made = unrolled(module, x_LBI.detach(), tuple(s.detach() for s in state), own)
        ends = [(outputs, d_out), *zip(last, d_last, strict=True)]
        ends = [(value, d) for value, d in ends if d is not None]
        wanted = [
            piece for half in made for piece in (half.made if isinstance(half.made, list) else [half.made])
        ]
        found = iter(
            torch.autograd.grad([v for v, _ in ends], wanted, [d for _, d in ends], allow_unused=True)
        )
    out = {}
    for half in made:
        pieces = half.made if isinstance(half.made, list) else [half.made]
        parts = [torch.zeros_like(piece) if d is None else d for piece, d in zip(pieces, found, strict=False)]
        d_LBZ = torch.stack(parts) if isinstance(half.made, list) else parts[0]
        out[half.name] = (half.seen.detach().transpose(0, 1), d_LBZ.transpose(0, 1))
    return out
