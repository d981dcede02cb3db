#!/usr/bin/env bash
# torch 2.13.0 (CPU, float32): forward mode through GroupNorm raises where its input is channels_last.
#
# torch.nn.GroupNorm takes a channels_last input, and so does its backward pass. torch.func.jvp and torch.autograd.forward_ad raise
# "view size is not compatible with input tensor's size and stride": the formula of its tangent views where it would have to reshape.
# BatchNorm2d does not. x.contiguous() before the layer helps.
#
# Seen on 28 November 2026:   channels_last: GroupNorm: vjp -34.8893, jvp raises; BatchNorm2d: vjp and jvp -18.1708; GroupNorm, contiguous: jvp -34.8893
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" - <<'PY'
import torch
from torch import nn
from torch.func import jvp, vjp

torch.manual_seed(0)
x, v = (torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))


def forward(layer, x, v):
    """Return the tangent of a sum over what the layer gives, or the error."""
    try:
        return f"{float(jvp(lambda x: (layer(x) ** 3).sum(), (x,), (v,))[1].detach()):.4f}"
    except RuntimeError as error:
        return str(error).partition(" (")[0]


def backward(layer, x, v):
    out, pull = vjp(lambda x: (layer(x) ** 3).sum(), x)
    return f"{float((pull(torch.ones_like(out))[0] * v).sum().detach()):.4f}"


seen = {"GroupNorm": nn.GroupNorm(2, 4), "BatchNorm2d": nn.BatchNorm2d(4).eval()}
found = {name: (backward(layer, x, v), forward(layer, x, v)) for name, layer in seen.items()}
plain = forward(seen["GroupNorm"], x.contiguous(), v.contiguous())
print(f"torch {torch.__version__}: channels_last: " + "; ".join(f"{n}: vjp {b}, jvp {f}" for n, (b, f) in found.items())
      + f"; GroupNorm, contiguous: jvp {plain}")
assert found["GroupNorm"][1].startswith("view size is not compatible"), "the behaviour has changed"
assert found["BatchNorm2d"][0] == found["BatchNorm2d"][1] and found["GroupNorm"][0] == plain, "the behaviour has changed"
PY
