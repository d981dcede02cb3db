"""Second moments without rows: what the rows themselves give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.data.batches import fetch, to_device
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate
from hydra_pipe.workers.ekfac.eigenbasis import Eigenbasis
from hydra_pipe.workers.ekfac.eigengradients import EigenGradients
from hydra_pipe.workers.ekfac.moments import Moments
from hydra_pipe.workers.persample.trials import choose_ways
from hydra_pipe.workers.training.fixed_pass import fixed_pass
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests.recipes import Attention, Images, Sequences, Small

DOUBLE = Compute(dtype="float64", device="cpu")


@pytest.mark.parametrize("kind", [Small, Images, Sequences, Attention], ids=lambda k: k.__name__)
@pytest.mark.parametrize("scaled", [False, True])
def test_they_are_those_of_the_rows(kind, scaled, tmp_path):
    recipe = kind()
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, DOUBLE), uri).run()
    blocks = (
        CurvatureEstimate(Training(recipe, DOUBLE), open_trajectory(uri), checkpoints=1, core=0).run().blocks
    )
    training = Training(recipe, DOUBLE)
    training.model.eval()
    batch = to_device(fetch(recipe, training.dataset, np.arange(20)), training.device, training.dtype)
    layout = training.layout
    ways = choose_ways(recipe, training.model, layout, batch, constant=True)
    basis = Eigenbasis(blocks, layout, torch.float64, torch.device("cpu"), None)
    scale = np.exp(np.random.default_rng(0).standard_normal(layout.dimension)) if scaled else None
    given = (recipe, training.model, layout, ways, basis, scale)
    coordinates = torch.arange(0, layout.dimension, 3)

    def passed(engine, sink):
        with fixed_pass(training, engine, batch, 20) as found:
            found.rows(sink)
        engine.close()

    rows = torch.zeros(20, layout.dimension, dtype=torch.float64)
    passed(EigenGradients(*given), lambda start, block: rows[start : start + len(block)].copy_(block))
    some = torch.zeros(20, len(coordinates), dtype=torch.float64)
    passed(
        EigenGradients(*given, coordinates),
        lambda start, block: some[start : start + len(block)].copy_(block),
    )
    assert torch.allclose(some, rows[:, coordinates], rtol=1e-12, atol=1e-14)
    moments = Moments(*given, coordinates)
    passed(moments, lambda _start, _block: None)
    squares, products = moments.take()
    assert np.allclose(squares, (rows**2).mean(0).numpy(), rtol=1e-10, atol=1e-16)
    assert np.allclose(products, (some.T @ some).numpy() / 20, rtol=1e-10, atol=1e-14)
