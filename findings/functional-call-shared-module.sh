#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.func.functional_call leaves the tensors it was given in a module that lies under two names.
#
# A layer that a model holds twice (ALBERT-like sharing: Sequential(a, layer, act, layer)) is one module with two names.
# functional_call swaps the given tensors in under both and puts "the originals" back, which the second swap took from the first:
# after the call the layer's weight is the plain tensor that was passed in, and no longer the model's Parameter. named_parameters()
# still lists the name; the optimiser goes on with a Parameter that nothing uses, and gradients of it are None. Sharing the
# Parameter between two different modules, or calling one module twice under one name, is restored as documented.
#
# Seen on 27 November 2026:   two names: restored False, type Tensor; one name called twice: restored True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" - <<'PY'
import torch
from torch import nn
from torch.func import functional_call


class Once(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def restored(model, layer):
    before = layer.weight
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    functional_call(model, given, (torch.ones(1, 3),))
    return layer.weight is before, type(layer.weight).__name__


first, second = nn.Linear(3, 3), nn.Linear(3, 3)
two, kind = restored(nn.Sequential(first, nn.Tanh(), first), first)
one, _ = restored(Once(second), second)
print(f"torch {torch.__version__}: two names: restored {two}, type {kind}; one name called twice: restored {one}")
assert not two and kind == "Tensor" and one, "the behaviour has changed"
PY
