#!/usr/bin/env bash
# torch 2.13.0 (CPU): one seed, two masks: F.dropout of a transposed tensor under torch.func and without it.
#
# Eagerly, dropout draws its mask in the memory order of the input. Under torch.func (vjp, jvp, vmap) it is
# decomposed, and draws in the order of the indices. For contiguous inputs that is the same mask from the same seed; for
# transposed ones (attention heads, seq-first layers) it is another, so a derivative taken by torch.func is that of another
# network than the one that ran, though the generator was put back.
#
# Seen on 28 November 2026:   same mask: contiguous True, transposed False
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" - <<'PY'
import torch
import torch.nn.functional as F
from torch.func import vjp


def values(x, functional):
    torch.manual_seed(1)
    if functional:
        return vjp(lambda y: F.dropout(y, 0.5, True), x)[0]
    return F.dropout(x, 0.5, True)


whole = torch.ones(6, 8)
turned = torch.ones(8, 6).T
same = {name: torch.equal(values(x, True), values(x, False)) for name, x in (("contiguous", whole), ("transposed", turned))}
print(f"torch {torch.__version__}: same mask: contiguous {same['contiguous']}, transposed {same['transposed']}")
assert same == {"contiguous": True, "transposed": False}, "the behaviour has changed"
PY
