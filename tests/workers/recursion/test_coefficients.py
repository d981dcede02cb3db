"""Coefficients and phi against the recursion done with torch.optim.SGD itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.workers.recursion.coefficients import Settings, coefficients, phi

CASES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "both": {"momentum": 0.9, "weight_decay": 0.1},
    "dampening": {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
}


def trained(options, rates, momenta, source):
    """Final weight of one scalar parameter whose gradient at step t is source[t]."""
    w = torch.nn.Parameter(torch.tensor([source[-1]], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=1.0, **options)
    for t, rate in enumerate(rates):
        group = optimizer.param_groups[0]
        group["lr"] = float(rate)
        if options.get("momentum"):
            group["momentum"] = float(momenta[t])
        w.grad = torch.tensor([source[t]], dtype=torch.float64)
        optimizer.step()
    return w.item()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gap", [False, True], ids=["momentum", "momentum pauses"])
def test_matches_the_optimiser(name, gap):
    options = CASES[name]
    steps = 9
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.05, 0.4, steps)
    momenta = rng.uniform(0.5, 0.95, steps)
    if gap:  # momentum 0 leaves PyTorch's buffer untouched, and the first use is never damped
        momenta[[0, 4]] = 0.0
    if options.get("nesterov") and gap:
        options = {**options}
    settings = Settings(
        learning_rate=rates[:, None],
        momentum=momenta[:, None] * bool(options.get("momentum")),
        weight_decay=np.full((steps, 1), options.get("weight_decay", 0.0)),
        dampening=np.full((steps, 1), options.get("dampening", 0.0)),
        nesterov=np.full((steps, 1), options.get("nesterov", False)),
    )
    c = coefficients(settings)[:, 0]
    for t in range(steps):
        source = np.zeros(steps + 1)
        source[t] = 1.0
        assert trained(options, rates, momenta, source) == pytest.approx(c[t], rel=1e-13, abs=1e-16)
    source = np.zeros(steps + 1)
    source[-1] = 1.0
    assert trained(options, rates, momenta, source) == pytest.approx(phi(settings)[0], rel=1e-13)
