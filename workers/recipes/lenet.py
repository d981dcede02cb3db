"""LeNet-5 with ReLU."""

from __future__ import annotations

from torch import nn


class LeNet5(nn.Sequential):
    """LeNet-5 (LeCun et al. 1998) with ReLU for tanh: (B, 1, 28, 28) to (B, 10), 61,706 parameters."""

    def __init__(self, classes: int = 10) -> None:
        """Build the network for ``classes`` classes."""
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, classes),
        )
