"""What a run checks by itself, says of itself, and refuses to go on with."""

from __future__ import annotations

import json

import pytest
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.storage.errors import ConservationBroken, EstimatorError, IncompleteStage
from hydra_pipe.workers.replay.buffers import HypergradientBuffers
from hydra_pipe.workers.replay.projection import FastProducts

from tests.end_to_end.support import cli, serial
from tests.odd_recipes import Field, Mining, Spectral, Weighted
from tests.recipes import BatchNormed, Small, TwoGroups


def trust(run, method="hydra"):
    return run.info["trust"][method]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", [Small, TwoGroups, Mining])
def test_a_complete_run_holds_the_law(kind, dtype, tmp_path):
    found = serial(tmp_path / "run", kind(), dtype=dtype, shards=3)
    law = trust(found)["law"]
    assert law["checked"]
    assert law["error"] <= law["limit"]
    assert law["error"] < (1e-13 if dtype == "float64" else 1e-5)
    assert trust(found)["ways"]["trials"] >= 3
    assert trust(found)["update"] >= min(16, found.info["steps"])
    lines = found.summary()["trust"]
    assert any(line.startswith("conservation law: holds") for line in lines)


def test_a_run_says_why_the_law_does_not_apply(tmp_path):
    some = serial(tmp_path / "some", Small(), track="10")
    assert "10 of 45 samples are tracked" in trust(some)["law"]["reason"]
    norm = serial(tmp_path / "norm", BatchNormed())
    assert trust(norm)["law"] == {"checked": False, "reason": "batch statistics are held constant"}
    exact = serial(tmp_path / "exact", Small(), hessian="exact", mode="adjoint", dtype="float64")
    assert trust(exact, "hydra-exact")["differences"] is True
    assert trust(exact, "hydra-exact")["field"] is None


def test_the_law_holds_for_every_target_of_the_fast_adjoint(tmp_path):
    found = serial(tmp_path / "run", Small(), mode="adjoint")
    assert trust(found)["law"] == {"checked": True}
    assert "conservation law: holds for every target" in found.summary()["trust"]


def test_slow_parameters_and_losses_that_see_each_other_are_said(tmp_path):
    found = serial(tmp_path / "run", Weighted(), dtype="float64")
    ways = trust(found)["ways"]
    assert ways["coupled"]
    assert "scale" in ways["vjp"]
    text = "\n".join(found.summary()["trust"])
    assert "training samples see each other in the losses" in text
    assert "test losses depend on the other samples of a batch: each was computed alone" in text


def test_wrong_rows_end_the_run_before_anything_is_reduced(tmp_path, monkeypatch):
    right = HypergradientBuffers.add

    def add(self, rows, block, scale):
        block[:, -3:] *= 1.01  # of the last bias
        right(self, rows, block, scale)

    monkeypatch.setattr(HypergradientBuffers, "add", add)
    with pytest.raises(ConservationBroken, match=r"parameter '2\.bias' \(off by .*use --per-sample vjp"):
        serial(tmp_path / "run", Small(), dtype="float64")
    found = open_run(str(tmp_path / "run"))
    assert found.methods() == []
    with pytest.raises(IncompleteStage):
        found.contributions()
    with pytest.raises(ConservationBroken):  # the same command says it again
        serial(tmp_path / "run", Small(), dtype="float64")
    monkeypatch.setattr(HypergradientBuffers, "add", right)
    again = serial(tmp_path / "run", Small(), dtype="float64", per_sample="vjp", overwrite=True)
    assert trust(again)["law"]["checked"]
    assert len(trust(again)["ways"]["vjp"]) == 4


def test_wrong_products_end_the_adjoint(tmp_path, monkeypatch):
    right = FastProducts.add

    def add(self, rows, block):
        right(self, rows, block * (1 + 0.01 * rows).unsqueeze(1))

    monkeypatch.setattr(FastProducts, "add", add)
    with pytest.raises(ConservationBroken, match="the contributions of all samples to target"):
        serial(tmp_path / "run", Small(), dtype="float64", mode="adjoint")


def test_the_command_line_shows_it(tmp_path):
    shown = cli("run", "digits", "--out", tmp_path / "run", "--executor", "serial", "--epochs", "1", "--quiet",
                "--set", "train_size=60", "--set", "test_size=20")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "trust:" in shown.stdout
    assert "conservation law: holds" in shown.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["trust"]["hydra"]["law"]["checked"]


def test_influence_functions_hold_their_hessian_against_differences(tmp_path):
    found = serial(tmp_path / "run", Field("rounded"), dtype="float64")
    with pytest.raises(
        EstimatorError, match=r"parameter 'f\.0\.weight' is not the derivative of its gradient"
    ):
        attribute(found.uri, {"influence-cg": {}}, Field("rounded"), executor="serial")
    plain = serial(tmp_path / "plain", Spectral(), dtype="float64")
    attribute(plain.uri, {"gradient-dot": {}}, Spectral(), executor="serial")
    assert "gradient-dot" in open_run(plain.uri).methods()
