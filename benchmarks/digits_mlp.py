"""The task of the fidelity measurements: small enough to be retrained hundreds of times.

    hydra-pipe run benchmarks/digits_mlp.py:DigitsMLP --hessian exact --mode adjoint --out runs/fidelity
    hydra-pipe evaluate runs/fidelity benchmarks/digits_mlp.py:DigitsMLP

1,000 digits (8 x 8 pixels) of which 10% have a wrong label, a network of 64-32-10 units with tanh
(2,410 parameters), SGD with momentum, 300 steps of 50 samples; 200 test samples with right labels.
"""

from __future__ import annotations

from hydra_pipe.workers.recipes.digits import Digits
from torch import nn


class DigitsMLP(Digits):
    """Digits on a small network that is smooth in its weights, with 10% wrong labels."""

    NAME = "digits-mlp"

    epochs = 15
    batch_size = 50
    seed = 0
    lr = 0.03
    momentum = 0.9
    weight_decay = 1e-4
    label_noise = 0.1
    train_size = 1000
    test_size = 200

    def __init__(self, *, label_noise: float = 0.1, **common: object) -> None:
        """Take the options of the digits recipe; a tenth of the labels is wrong unless said otherwise."""
        super().__init__(label_noise=label_noise, **common)

    def model(self) -> nn.Module:
        """Return the network, 64*32 + 32 + 32*10 + 10 = 2,410 parameters."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
