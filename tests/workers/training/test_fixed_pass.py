"""Rows without a training step."""

from __future__ import annotations

import pytest
import torch
from hydra_pipe.workers.persample.engine import PerSampleGradients
from hydra_pipe.workers.training.fixed_pass import fixed_pass
from hydra_pipe.workers.training.training import Compute, Training
from hydra_pipe.workers.training.trials import tried_ways

from tests.recipes import BatchNormed, Images, Small


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed], ids=lambda k: k.__name__)
def test_rows_add_up_to_the_gradient_of_the_mean_and_nothing_moves(kind):
    training = Training(kind(), Compute(dtype="float64", device="cpu"))
    engine = PerSampleGradients(training.recipe, training.model, training.layout, tried_ways(training))
    before = training.state_digest()
    batch, size = next(iter(training.loader())), training.batch_size(0)
    rows = torch.empty(size, training.layout.dimension, dtype=torch.float64)

    def keep(start, block):
        rows[start : start + len(block)] = block

    with fixed_pass(training, engine, batch, size) as found:
        found.rows(keep)
    engine.close()
    assert found.losses_B.shape == (size,)
    assert training.unlike_sum(rows, found.whole, size) == []
    assert bool(rows.any(1).all())
    assert training.state_digest() == before
    assert all(parameter.grad is None for parameter in training.parameters)


def test_the_losses_may_be_computed_another_way():
    training = Training(Small(), Compute(dtype="float64", device="cpu"))
    engine = PerSampleGradients(training.recipe, training.model, training.layout, tried_ways(training))
    batch, size = next(iter(training.loader())), training.batch_size(0)
    with fixed_pass(training, engine, batch, size) as plain:
        pass
    with fixed_pass(training, engine, batch, size, lambda: 2 * training.losses(batch, size)) as twice:
        pass
    engine.close()
    assert torch.equal(twice.losses_B, 2 * plain.losses_B)
