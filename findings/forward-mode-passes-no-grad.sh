#!/usr/bin/env bash
# torch 2.13.0 (CPU, float32): torch.no_grad stops torch.func.grad and not torch.func.jvp; detach stops both.
#
# For f(x) = (x - t(x))^2 with t computed under torch.no_grad, torch.func.grad takes t as a constant (its documentation says so)
# and torch.func.jvp does not, alone or under vmap. With t(x).detach() both do. So <grad(f), v> and jvp(f, v), the same
# number in any textbook, differ as soon as a target, a threshold or a teacher is computed under no_grad. The page of torch.no_grad says that it
# does not apply to forward mode; nothing on the page of torch.func.jvp does.
#
# Seen on 27 November 2026:   no_grad: grad -0.5821, jvp 0.5301, vmap(jvp) 0.5301; detach: grad -0.5821, jvp -0.5821
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$place/env/bin/python" - <<'PY'
import torch
from torch.func import grad, jvp, vmap


def under_no_grad(x):
    with torch.no_grad():
        t = x.sin() * 2
    return (x - t) ** 2


def detached(x):
    return (x - (x.sin() * 2).detach()) ** 2


x, v = torch.tensor(0.3), torch.tensor(1.0)
constant = float(2 * (x - 2 * x.sin()))
through = constant * float(1 - 2 * x.cos())
seen = {
    "no_grad": (float(grad(under_no_grad)(x)), float(jvp(under_no_grad, (x,), (v,))[1]),
                float(vmap(lambda u: jvp(under_no_grad, (x,), (u,))[1])(v[None])[0])),
    "detach": (float(grad(detached)(x)), float(jvp(detached, (x,), (v,))[1])),
}
print(f"torch {torch.__version__}: no_grad: grad {seen['no_grad'][0]:.4f}, jvp {seen['no_grad'][1]:.4f}, "
      f"vmap(jvp) {seen['no_grad'][2]:.4f}; detach: grad {seen['detach'][0]:.4f}, jvp {seen['detach'][1]:.4f}")


def near(found, right):
    return abs(found - right) < 1e-5


assert near(seen["no_grad"][0], constant) and all(near(d, constant) for d in seen["detach"]), "the behaviour has changed"
assert near(seen["no_grad"][1], through) and near(seen["no_grad"][2], through), "the behaviour has changed"
PY
