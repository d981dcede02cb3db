"""BatchNorm layers together, and one forward pass with two backward ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hydra_pipe.workers.persample.channels import (
    Spread,
    channel_rows,
    moments_of,
    switchable,
    switched_statistics,
)
from hydra_pipe.workers.persample.reference import constant_statistics, vjp
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training import training as module
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.recipes import BatchNormed
from tests.workers.replay.test_hypergradients import recorded

DOUBLE = Compute(dtype="float64", device="cpu")


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (5, 3, 4, 2)])
def test_rows_of_several_layers_are_those_of_autograd(shape):
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=True)]
    if len(shape) == 4:
        layers = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    layers = [layer.double() for layer in layers]
    inputs = [torch.randn(shape, dtype=torch.float64) * 3 + 7 for _ in layers]
    moments = [moments_of(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    spread = Spread(moments).over(shape[0], {})
    for layer, x, own in zip(layers, inputs, spread, strict=True):
        with constant_statistics(layer):
            y = layer(x)
        d = torch.randn_like(y)
        losses = (d * y).flatten(1).sum(1)
        right = vjp(losses, [layer.weight, layer.bias], torch.arange(shape[0]))
        for found, wanted in zip(channel_rows(x, d, own), right, strict=True):
            assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_a_step_is_what_it_is_unwatched_and_its_rows_those_of_a_second_forward_pass(tmp_path, monkeypatch):
    recipe = BatchNormed()
    trajectory = recorded(recipe, tmp_path, DOUBLE)
    found, passes = {}, []
    plain = Training._second_pass
    monkeypatch.setattr(Training, "_second_pass", lambda *a: (passes.append(a[1]), plain(*a))[1])
    for way in (True, False):
        monkeypatch.setattr(module, "switchable", (lambda model, way=way: way and switchable(model)))
        replay = Replay(Training(recipe, DOUBLE), trajectory, np.arange(44), FastRows)
        found[way] = replay.run().numpy(0, 44).copy()  # the digests hold every step against the record
        replay.close()
        assert len(passes) == (0 if way else len(trajectory.loss))
    assert np.abs(found[True] - found[False]).max() <= 1e-12 * np.abs(found[False]).max()


def test_both_backward_passes_have_the_bits_of_plain_ones():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4, momentum=None)
    )
    other = copy.deepcopy(model)
    x = torch.randn(6, 2, 5, 5)
    other(x).square().sum().backward()
    with switched_statistics(model) as statistics:
        value = model(x).square().sum()
        statistics.hold()
        with statistics.moving():
            value.backward(retain_graph=True)
        held = torch.autograd.grad(value, model[0].weight)[0]
    for mine, plain in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, plain.grad)
    for mine, plain in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, plain)
    with constant_statistics(other):
        right = torch.autograd.grad(other(x).square().sum(), other[0].weight)[0]
    assert (held - right).abs().max() <= 1e-5 * right.abs().max()


def test_a_forward_pass_that_is_repeated_for_the_rows_moves_no_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other = copy.deepcopy(model)
    x = torch.randn(6, 3)
    checkpoint(other, x, use_reentrant=False).square().sum().backward()
    with switched_statistics(model) as statistics:
        value = checkpoint(model, x, use_reentrant=False).square().sum()
        statistics.hold()
        with statistics.moving():
            value.backward(retain_graph=True)
        torch.autograd.grad(value, model[0].weight)
    for mine, plain in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, plain)


def test_a_forward_pass_of_ones_own_is_not_switched():
    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) * 2

    assert switchable(nn.Sequential(nn.BatchNorm1d(3)))
    assert not switchable(nn.Sequential(nn.BatchNorm1d(3), Own(3)))
    assert switchable(nn.Sequential(Own(3)).eval())
