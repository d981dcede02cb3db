"""Training under autocast: every form follows it, to what 16 bits leave; and nothing is silently held against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.pipeline.opened_run import open_run

from tests.end_to_end.support import cli, serial
from tests.recipes import Small


class Rounded(Small):
    """The small recipe in bfloat16, with small steps, so that the two trainings stay close."""

    epochs, rounded = 2, True

    def __init__(self, rounded=True):
        self.rounded = rounded

    def arguments(self):
        return {"rounded": self.rounded}

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.05)

    def losses(self, model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.rounded):
            scores = model(batch[0])
        return F.cross_entropy(scores.float(), batch[1], reduction="none")


def matrix(run):
    table = (
        run.contributions().to_table().sort_by([("test_index", "ascending"), ("train_index", "ascending")])
    )
    return table["contribution"].to_numpy().reshape(12, 45)


@pytest.mark.parametrize(
    "given",
    [{}, {"mode": "adjoint"}, {"hessian": "ekfac"}, {"hessian": "exact", "mode": "adjoint"}],
    ids=["fast", "fast-adjoint", "ekfac", "exact-adjoint"],
)
def test_contributions_are_those_of_full_precision_to_what_sixteen_bits_leave(given, tmp_path):
    found, right = (matrix(serial(tmp_path / str(kind), Rounded(kind), **given)) for kind in (True, False))
    assert not np.array_equal(found, right)
    assert np.linalg.norm(found - right) <= 0.03 * np.linalg.norm(right)


def test_it_is_said_checked_and_not_held_against_float64(tmp_path):
    place = tmp_path / "run"
    run = serial(place, Rounded())
    assert open_run(run.uri).trajectory().attrs["autocast"] == ["bfloat16"]
    plain = cli("verify", run.uri)
    assert plain.exit_code == 0, plain.output
    deep = cli("verify", run.uri, "--deep")
    assert deep.exit_code == 1
    assert "was trained under autocast (bfloat16), whose rounding float64 does not follow" in deep.stderr
