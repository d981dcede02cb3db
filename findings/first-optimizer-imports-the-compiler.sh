#!/usr/bin/env bash
# torch 2.13.0 (CPU): the first optimiser of a process imports torch.compile's whole stack, though nothing is compiled.
#
# `import torch` leaves torch._dynamo, torch._inductor and sympy out. Making a plain torch.optim.SGD brings them in: add_param_group is wrapped
# by a decorator that imports torch._dynamo on its first call. A process that only trains so pays about as much processor time for its
# first optimiser as for importing torch (2.6 s beside 2.7 s here): every worker of a pool, every command, every subprocess of a test.
#
# Seen on 28 November 2026:   SGD adds torch._dynamo, torch._inductor, sympy and 823 modules in all (torch itself: 1114)
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" - <<'PY'
import sys

import torch

stack = ("torch._dynamo", "torch._inductor", "sympy")
before = set(sys.modules)
weight = torch.nn.Parameter(torch.zeros(2))
between = len(sys.modules)
torch.optim.SGD([weight], lr=0.1)
added = set(sys.modules) - before
brought = [name for name in stack if name in added]
print(
    f"torch {torch.__version__}: after import torch {[name for name in stack if name in before] or 'none'} of {', '.join(stack)}; "
    f"SGD adds {', '.join(brought)} and {len(added)} modules in all (torch itself: {len(before)})"
)
assert not set(stack) & before and between == len(before) and brought == list(stack) and len(added) > 500, "the behaviour has changed"
PY
