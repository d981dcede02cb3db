"""MobileNetV2 for 32 x 32 images."""

from __future__ import annotations

from torch import Tensor, nn

_STAGES = (
    # expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # 2 for 224 x 224 images
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution without bias and its batch normalisation."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class _InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [*_convolution(inputs, hidden), nn.ReLU6()]
        layers += [*_convolution(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        layers += _convolution(hidden, outputs)
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Sequential):
    """MobileNetV2 (Sandler et al. 2018), width 1: (B, 3, 32, 32) to (B, 10), 2,236,682 parameters.

    Layers and initialisation as in the paper and torchvision, dropout 0.2 before the classifier.
    Only the strides of the first convolution and of the second stage are 1 instead of 2, as is usual
    for 32 x 32 images; strides have no parameters.
    """

    def __init__(self, classes: int = 10) -> None:
        """Build the network for ``classes`` classes."""
        channels = 32
        stages: list[nn.Module] = [*_convolution(3, channels, 3), nn.ReLU6()]
        for expansion, outputs, blocks, first_stride in _STAGES:
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                stages.append(_InvertedResidual(channels, outputs, expansion, stride))
                channels = outputs
        stages += [*_convolution(channels, 1280), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        stages += [nn.Dropout(0.2), nn.Linear(1280, classes)]
        super().__init__(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
