"""The built-in networks: parameter counts of the paper, shapes, gradients everywhere."""

from __future__ import annotations

import pytest
import torch
from hydra_pipe.workers.recipes.densenet import DenseNet40
from hydra_pipe.workers.recipes.digits import small_cnn
from hydra_pipe.workers.recipes.lenet import LeNet5
from hydra_pipe.workers.recipes.mobilenet import MobileNetV2
from torch import nn

NETWORKS = [
    pytest.param(small_cnn, 5_050, (1, 8, 8), id="digits"),
    pytest.param(LeNet5, 61_706, (1, 28, 28), id="lenet5"),
    pytest.param(DenseNet40, 176_122, (3, 32, 32), id="densenet40"),
    pytest.param(MobileNetV2, 2_236_682, (3, 32, 32), id="mobilenetv2"),
]


@pytest.mark.parametrize(("build", "count", "shape"), NETWORKS)
def test_parameter_count(build, count, shape):
    assert sum(p.numel() for p in build().parameters() if p.requires_grad) == count


@pytest.mark.parametrize(("build", "count", "shape"), NETWORKS)
def test_scores_and_a_gradient_for_every_parameter(build, count, shape):
    torch.manual_seed(0)
    model = build()
    scores = model(torch.rand(2, *shape))
    assert scores.shape == (2, 10)
    scores.logsumexp(1).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("build", "count", "shape"), NETWORKS)
def test_same_seed_same_weights(build, count, shape):
    vectors = []
    for _ in range(2):
        torch.manual_seed(3)
        vectors.append(nn.utils.parameters_to_vector(build().parameters()))
    assert torch.equal(*vectors)


@pytest.mark.parametrize(("build", "count", "shape"), NETWORKS)
def test_nothing_that_per_sample_hooks_stumble_over(build, count, shape):
    """No in-place activation overwrites what a hook keeps; no module is used at two places."""
    model = build()
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    calls: dict[nn.Module, int] = {}
    for module in model.modules():
        module.register_forward_hook(lambda m, _i, _o: calls.__setitem__(m, calls.get(m, 0) + 1))
    model(torch.rand(2, *shape))
    assert set(calls.values()) == {1}


def test_densenet_has_forty_layers():
    layers = [m for m in DenseNet40().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 40


def test_mobilenet_keeps_the_layers_of_the_paper():
    convolutions = [m for m in MobileNetV2().modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 52
    assert convolutions[0].out_channels == 32
    assert convolutions[-1].out_channels == 1280
    assert sum(m.groups > 1 for m in convolutions) == 17
