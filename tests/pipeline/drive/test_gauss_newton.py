"""Runs whose vectors are carried by Gauss-Newton products and by mixtures: made, checked, and refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.pipeline.analysis.trust_lines import trust_lines
from hydra_pipe.pipeline.drive import preflight
from hydra_pipe.pipeline.verify.deep import verify_deep
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import RecipeError, SpecError, SpecMismatch

from hydra_pipe import RunSpec, open_run, run
from tests.recipes import BatchNormed, Small

GAUSS_NEWTON, MIXED = "hydra-gauss-newton", "hydra-mixed"


def spec(recipe, out, **changes):
    values = {"executor": "serial", "device": "cpu", "dtype": "float64", "track": 10, "shards": 2, **changes}
    return RunSpec(recipe=recipe, out=str(out), **values)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One forward, one adjoint: with both of them, BatchNorm's statistics are differentiated through."""
    out = tmp_path_factory.mktemp("gauss-newton") / "run"
    run(spec(BatchNormed(), out, hessian="gauss-newton"))
    run(spec(BatchNormed(), out, hessian="mixed", curvature_share=0.25, mode="adjoint"))
    return out


def contributions(out, method):
    table = open_run(out).contributions(method).to_table().to_pandas()
    return table.sort_values(["test_index", "train_index"])["contribution"].to_numpy()


def test_the_dense_reference_says_the_same(made):
    found = verify_deep(open_run(made), BatchNormed())
    assert found.ok, found.problems
    checks = {(check.method, check.check): check for check in found.checks}
    for name in ("hypergradients", "forward = adjoint"):
        check = checks[GAUSS_NEWTON, name]
        assert check.values > 0
        assert check.deviation < 1e-13 < check.limit
    check = checks[MIXED, "contributions (adjoint = forward)"]
    assert check.deviation < 1e-13 < check.limit
    assert not any("not covered" in note for note in found.notes)
    assert verify(open_run(made)).ok


def test_the_share_matters_and_stands_in_the_run(made, tmp_path):
    document = json.loads((made / "run.json").read_text())
    assert document["methods"][MIXED]["options"] == {"share": 0.25}
    assert document["methods"][GAUSS_NEWTON]["options"] == {}
    half = run(spec(BatchNormed(), tmp_path / "half", hessian="mixed", mode="adjoint", shards=1))
    exact = run(spec(BatchNormed(), tmp_path / "half", hessian="exact", mode="adjoint", shards=1))
    mixed = contributions(made, MIXED)
    apart = [
        np.abs(mixed - other).max() / np.abs(mixed).max()
        for other in (
            contributions(half.uri, MIXED),
            contributions(exact.uri, "hydra-exact"),
            contributions(made, GAUSS_NEWTON),
        )
    ]
    assert min(apart) > 1e-4
    with pytest.raises(SpecMismatch, match=r"options: stored \{'share': 0.25\}, asked \{'share': 0.5\}"):
        run(spec(BatchNormed(), made, hessian="mixed", mode="adjoint"))


def test_the_summary_says_what_stands_in_the_hessians_place(made):
    trust = open_run(made).noted.trust
    (line,) = [line for line in trust_lines(trust[GAUSS_NEWTON]) if line.startswith("products")]
    assert line.startswith(
        "products: the Gauss-Newton matrix of what the model returns in the Hessian's place"
    )
    (line,) = [line for line in trust_lines(trust[MIXED]) if line.startswith("products")]
    assert line.startswith("products: 0.25 of the Hessian and 0.75 of the Gauss-Newton matrix")
    assert not any("agree with differences of the gradient" in line for line in trust_lines(trust[MIXED]))


def test_coarser_targets_shards_and_stages_go_as_in_the_exact_form(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "ENOUGH", 1)  # its own products are looked at before
    one = run(spec(Small(), tmp_path / "a", hessian="gauss-newton", dtype="float32", shards=1))
    noted = open_run(one.uri).noted.entry(GAUSS_NEWTON).preflight
    assert noted is not None
    assert noted.skipped is None
    assert noted.rest["peak"] >= 1.0
    three = run(spec(Small(), tmp_path / "b", hessian="gauss-newton", dtype="float32", shards=3))
    assert np.array_equal(one.hypergradients(GAUSS_NEWTON)[:], three.hypergradients(GAUSS_NEWTON)[:])
    name = f"{GAUSS_NEWTON}-classes"
    run(
        spec(
            Small(),
            tmp_path / "a",
            hessian="gauss-newton",
            dtype="float32",
            mode="adjoint",
            targets="classes",
        )
    )
    rows = open_run(one.uri).contributions(name).to_table().num_rows
    assert rows == 10 * 3


def test_what_has_no_meaning_is_refused_by_name(made):
    with pytest.raises(SpecError, match="exact_rank 3: only hessian='ekfac' is corrected"):
        spec(Small(), "x", hessian="gauss-newton", exact_rank=3)
    with pytest.raises(SpecError, match=r"curvature_share 1: must be a number from 0.01 to 0.99"):
        spec(Small(), "x", hessian="mixed", curvature_share=1)
    words = ["compare", str(made), "--every", "1", "--methods", GAUSS_NEWTON]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert f"{GAUSS_NEWTON} cannot be followed over training" in refused.stderr


class Beside(Small):
    def losses(self, model, batch):
        return super().losses(model, batch) + 1e-3 * model[0].weight.square().sum()


def test_losses_that_read_parameters_are_refused_before_anything_is_kept(tmp_path):
    with pytest.raises(RecipeError, match=r"parameter .0\.weight. reaches the losses otherwise"):
        run(spec(Beside(), tmp_path / "r", hessian="gauss-newton", mode="adjoint"))
    assert open_run(tmp_path / "r").methods() == []
