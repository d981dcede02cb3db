"""The conservation law where rows leave something out: clipped steps, Adam, accumulation, samplers, late parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.verify.conservation import conservation, judged
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import ConservationBroken
from hydra_pipe.workers.recursion.clipping import Clip
from hydra_pipe.workers.replay.buffers import HypergradientBuffers
from hydra_pipe.workers.replay.fast import StepScales
from hydra_pipe.workers.replay.projection import FastProducts
from torch import nn

from tests.end_to_end.support import serial
from tests.workers.replay.test_optimisers import Sampled, Stepped

CASES = {
    "clipped": Stepped("sgd", 0.3),
    "clipped-late": Stepped("sgd", 0.3, 3, "late"),
    "sampled": Sampled("sgd"),
    "adamw": Stepped("adamw"),
    "adam-coupled": Stepped("adam", 0.3, 3, "one-cycle"),
    "adamw-late": Stepped("adamw", 0.3, 3, "late"),
    "adam-sampled": Sampled("adam"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_holds_the_law_and_verify_finds_it_held(name: str, tmp_path: Path) -> None:
    dtype = "float32" if name in ("adamw", "sampled", "adamw-late") else "float64"
    found = serial(tmp_path / "run", CASES[name], dtype=dtype, shards=3)
    noted = found.info["trust"]["hydra"]["law"]
    assert noted["checked"]
    assert noted["error"] <= noted["limit"] < (1e-3 if dtype == "float32" else 1e-10)
    law = verify(found).conservation
    assert law["ok"]
    assert [g["group"] for g in law["groups"]] == [0, 1]
    assert max(g["error"] for g in law["groups"]) < (1e-5 if dtype == "float32" else 1e-13)


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return serial(tmp_path_factory.mktemp("adamw") / "run", Stepped("adamw", 0.3), dtype="float64", shards=3)


def test_the_law_finds_a_wrong_row_of_adamw(adamw: Any) -> None:
    store = adamw.hypergradient_store("hydra")
    rows = store.read(0, store.rows).astype(np.float64)
    assert judged(adamw, rows.sum(0)) == conservation(adamw)
    assert judged(adamw, rows.sum(0))["ok"]
    for wrong in (rows.sum(0) + 0.01 * rows[3], rows.sum(0) - rows[5], rows.sum(0) * 1.001):
        found = judged(adamw, wrong)
        assert found["applicable"]
        assert not found["ok"]


def test_shards_that_noted_no_rest_are_said(adamw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra_pipe.pipeline.verify import conservation as law

    right = law.values_of

    def without(kind: Any, manifest: Any) -> Any:
        values = right(kind, manifest)
        del values.law["rest"]
        return values

    monkeypatch.setattr(law, "values_of", without)
    assert verify(adamw).conservation == {
        "applicable": False,
        "reason": "the shards did not note what clipping or Adam leave out of the hypergradients",
    }


def test_wrong_rows_of_adamw_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = HypergradientBuffers.add

    def add(self: Any, rows: Any, block: Any, scale: Any) -> None:
        block[:, -3:] *= 1.01  # of the last bias
        right(self, rows, block, scale)

    monkeypatch.setattr(HypergradientBuffers, "add", add)
    with pytest.raises(ConservationBroken, match=r"parameter '2\.bias' \(off by .*use --per-sample vjp"):
        serial(tmp_path / "run", Stepped("adamw", 0.3), dtype="float64")


@pytest.mark.parametrize("what", ["look-ahead", "preconditioner", "clipping"])
def test_a_wrong_factor_of_a_step_ends_the_run(what: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Coefficients come from behind and the law from the front: one that is wrong shows."""
    if what == "look-ahead":
        right = StepScales.coefficient
        monkeypatch.setattr(
            StepScales, "coefficient", lambda self, step: right(self, step) * (1.01 if step == 2 else 1.0)
        )
    elif what == "preconditioner":
        met = StepScales.meet

        def meet(self: Any, step: int, moment: Any) -> None:
            met(self, step, moment)
            self.preconditioner = self.preconditioner * 1.01

        monkeypatch.setattr(StepScales, "meet", meet)
    else:
        monkeypatch.setattr(Clip, "map_", lambda self, changes: changes)
    with pytest.raises(ConservationBroken):
        serial(tmp_path / "run", Stepped("adamw", 0.3), dtype="float64")


def test_products_of_adamw_hold_it_and_wrong_ones_end_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    found = serial(tmp_path / "right", Sampled("adamw"), mode="adjoint")
    assert found.info["trust"]["hydra"]["law"] == {"checked": True}
    right = FastProducts.add

    def add(self: Any, rows: Any, block: Any) -> None:
        right(self, rows, block * (1 + 0.01 * rows).unsqueeze(1))

    monkeypatch.setattr(FastProducts, "add", add)
    with pytest.raises(ConservationBroken, match="the contributions of all samples to target"):
        serial(tmp_path / "wrong", Sampled("adamw"), dtype="float64", mode="adjoint")


class Shifted(Stepped):
    """A parameter whose gradient is rounding and nothing else, which Adam makes as large as all others."""

    def model(self) -> nn.Module:
        return _Shifted()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        kind = torch.optim.SGD if self.kind == "sgd" else torch.optim.AdamW
        return kind(model.parameters(), lr=0.1)


class _Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.shift = nn.Linear(4, 3), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shift  # a softmax does not see it


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_gradients_that_are_rounding_alone_do_not_break_it(kind: str, tmp_path: Path) -> None:
    found = serial(tmp_path / "run", Shifted(kind), shards=2)
    place = [e.name for e in found.trajectory().parameters].index("shift")
    moved = abs(found.trajectory().checkpoint(-1).weights[found.trajectory().parameters[place].start])
    assert moved > (1e-9 if kind == "sgd" else 1e-3)
    assert found.info["trust"]["hydra"]["law"]["checked"]
    assert verify(open_run(found.uri)).ok
