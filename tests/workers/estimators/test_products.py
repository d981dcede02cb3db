"""Products of all training samples with targets that are no sample's gradient, beside those that are."""

from __future__ import annotations

import numpy as np
import torch
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.estimators.fixed import FixedWeights
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests.recipes import Small

DOUBLE = Compute(dtype="float64", device="cpu")


def test_tiles_of_one_kind_change_no_bit_of_another_kind_and_all_are_right(tmp_path):
    """Gradients of single samples are outer products, which a tile may be taken apart by; noise is not."""
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(Small(), DOUBLE), uri).run()
    fixed = FixedWeights(Training(Small(), DOUBLE), open_trajectory(uri))
    everyone = np.arange(45)
    rows = fixed.rows(fixed.training.dataset, everyone)
    outer = rows[:8] * 3.0
    noise = torch.randn(5, rows.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = fixed.products(everyone, torch.cat([outer, noise]))
    assert torch.allclose(both, torch.cat([outer, noise]) @ rows.T, rtol=1e-12, atol=1e-14)
    assert torch.equal(both[:8], fixed.products(everyone, outer))
    assert torch.equal(both[8:], fixed.products(everyone, noise))
    again = fixed.rows(fixed.training.dataset, everyone)
    assert torch.equal(again, rows)  # the engine of rows is back
    fixed.close()
