#!/usr/bin/env bash
# torch 2.13.0 (CPU): functional_call and non-reentrant activation checkpointing: the recomputation uses other weights.
#
# torch.func.functional_call puts the given tensors into a module for the time of the call. A layer under
# torch.utils.checkpoint(use_reentrant=False) is computed again when the gradient is taken: after the call has returned,
# with the module's OWN parameters. The loss is that of the given weights, the gradient silently is not: no error,
# and torch's check of recomputed tensors looks at shapes and types alone. Taking the gradient inside the call is right,
# and so is a twin module that holds the weights.
#
# Seen on 28 November 2026:   losses equal True; gradients off by 0.79 of the largest entry
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" - <<'PY'
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, saves):
        super().__init__()
        self.saves = saves
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        if self.saves:
            return checkpoint(self.layers, x, use_reentrant=False).sum()
        return self.layers(x).sum()


torch.manual_seed(0)
saving, plain = Block(True).double(), Block(False).double()
x = torch.randn(5, 4, dtype=torch.float64)
given = {name: torch.randn_like(p).requires_grad_() for name, p in saving.named_parameters()}


def gradient(model):
    loss = functional_call(model, given, (x,))
    return loss.item(), torch.autograd.grad(loss, list(given.values()))


(loss, found), (same, right) = gradient(saving), gradient(plain)
off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right))
print(f"torch {torch.__version__}: losses equal {loss == same}; gradients off by {off:.2f} of the largest entry")
assert loss == same and off > 1e-3, "the behaviour has changed"
PY
