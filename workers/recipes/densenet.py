"""DenseNet for 32 x 32 images, the bottleneck and compression variant (DenseNet-BC)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution; the result is appended to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def _transition(channels: int, reduced: int) -> nn.Sequential:
    """Return the layer between blocks: fewer channels, half the height and width."""
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, reduced, 1, bias=False), nn.AvgPool2d(2)
    )


class DenseNet40(nn.Sequential):
    """DenseNet-BC (Huang et al. 2017) of 40 layers: (B, 3, 32, 32) to (B, 10), 176,122 parameters.

    Growth 12; three blocks of six bottleneck layers (1x1 to 48 channels, then 3x3 to 12); 24
    channels after the first convolution; transitions halve the channels. This is the variant whose
    count is the HyDRA paper's; DenseNet-40 without bottlenecks has about one million parameters.
    Convolutions start from He's normal distribution, as in the authors' code; no dropout.
    """

    def __init__(self, classes: int = 10, growth: int = 12, layers_per_block: int = 6) -> None:
        """Build the network; depth is ``3 * 2 * layers_per_block + 4``."""
        channels = 2 * growth
        stages: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for block in range(3):
            for _ in range(layers_per_block):
                stages.append(_DenseLayer(channels, growth))
                channels += growth
            if block < 2:
                stages.append(_transition(channels, channels // 2))
                channels //= 2
        stages += [
            *(nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(channels, classes),
        ]
        super().__init__(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
