"""What surrounds the steps of a run is said in words, and plain steps need none."""

from __future__ import annotations

import torch
from hydra_pipe.pipeline.analysis.trained_lines import trained_lines
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests.recipes import Small


class Surrounded(Small):
    epochs, accumulate, clip_grad_norm = 2, 4, 0.05

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    def losses(self, model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(batch[0])
        return torch.nn.functional.cross_entropy(scores.float(), batch[1], reduction="none") * (
            1.0 + batch[1]
        )

    def weights(self, batch):
        return 1.0 + batch[1]


def lines(recipe, place):
    uri = str(place / "trajectory.zarr")
    Recorder(Training(recipe, Compute()), uri).run()
    record = open_trajectory(uri)
    return record, trained_lines(record)


def test_steps_clipping_weights_and_autocast_are_said(tmp_path):
    record, said = lines(Surrounded(), tmp_path)
    factor = record.clip_factor[record.updates]
    assert said == [
        "training: 4 steps of AdamW, from 12 batches",
        f"clipped at norm 0.05: {(factor < 1).sum()} of 4 steps, to {factor.min():.2g} of the gradient at the least",
        "losses are sums over the weights of their step",
        "trained under autocast (bfloat16); second derivatives are those in float32",
    ]


def test_parameters_that_come_late_are_named(tmp_path):
    from tests.docs.test_bring import Gated

    class Late(Small):
        def model(self):
            return Gated()

    assert lines(Late(), tmp_path)[1] == [
        "parameters that were left out of some steps: 2, such as late.weight"
    ]


def test_plain_steps_need_no_words(tmp_path):
    assert lines(Small(), tmp_path)[1] == []
