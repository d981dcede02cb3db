"""What a method depends on beyond the run, as a value and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hydra_pipe.pipeline.plan.compatibility import method_differences
from hydra_pipe.pipeline.reading.run_info import RunInfo
from hydra_pipe.pipeline.spec.groups import CurvatureSpec
from hydra_pipe.pipeline.spec.method_options import CURVATURE_FIELDS, CurvatureOptions
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.errors import CorruptStore


def test_ekfac_and_mixtures_have_options() -> None:
    for hessian in ("none", "exact", "gauss-newton"):
        assert CurvatureOptions.asked_by(CurvatureSpec(hessian=hessian)) == CurvatureOptions()  # type: ignore[arg-type]
    assert CurvatureOptions().to_json() == CurvatureOptions().as_fields() == {}
    found = CurvatureOptions.asked_by(CurvatureSpec(hessian="ekfac")).to_json()
    assert json.dumps(found) == '{"checkpoints": 5, "samples": 1024, "core": 256, "flat": 0.01}'
    given = CurvatureSpec(hessian="ekfac", curvature_at="0,40", curvature_core=0)
    found = CurvatureOptions.asked_by(given).to_json()
    assert json.dumps(found) == '{"at": [0, 40], "checkpoints": 5, "samples": 1024, "core": 0, "flat": 0.01}'
    mixed = CurvatureSpec(hessian="mixed", curvature_share=0.25)
    assert CurvatureOptions.asked_by(mixed).to_json() == {"share": 0.25}


@pytest.mark.parametrize("given", [{}, {"curvature_at": (0, 40)}, {"curvature_core": 0}])
def test_options_come_back_from_json_and_as_fields(given: dict[str, Any]) -> None:
    spec = CurvatureSpec(hessian="ekfac", **given)
    options = CurvatureOptions.asked_by(spec)
    stored = json.loads(json.dumps(options.to_json()))
    assert CurvatureOptions.from_json(stored, method="m") == options
    assert replace(CurvatureSpec(hessian="ekfac"), **options.as_fields()) == spec
    assert set(options.as_fields()) <= set(CURVATURE_FIELDS)


def test_options_from_before_there_was_a_floor_kept_all_eigenvalues() -> None:
    stored = {"checkpoints": 5, "samples": 4096, "core": 256}
    assert CurvatureOptions.from_json(stored, method="m").flat == 0.0
    assert CurvatureOptions.from_json({"share": 0.5}, method="m").flat is None


@pytest.mark.parametrize(
    "document",
    [
        {"damping": 3},
        {"core": "256"},
        {"core": -1},
        {"core": True},
        {"core": [1]},
        {"samples": None},
        {"at": 3},
        {"at": [0, "x"]},
        {"share": 1},
        {"share": 1.5},
        {"flat": 2.0},
        {"flat": 1},
    ],
)
def test_what_cannot_be_options_is_named(document: dict[str, Any]) -> None:
    ((name, value),) = document.items()
    with pytest.raises(CorruptStore) as caught:
        CurvatureOptions.from_json(document, method="hydra-ekfac")
    text = str(caught.value)
    assert f"option {name} {value!r} of method hydra-ekfac" in text
    assert "restore run.json" in text
    assert "\n" not in text


def test_options_are_a_mapping() -> None:
    with pytest.raises(CorruptStore, match=r"options \[3\] of method m are no JSON object; restore run.json"):
        CurvatureOptions.from_json([3], method="m")


def info(methods: dict[str, Any]) -> RunInfo:
    return RunInfo.from_json({"methods": methods}, "run.json")


def test_methods_of_one_form_share_their_options() -> None:
    spec = RunSpec(hessian="ekfac", mode="adjoint", targets="mean", curvature_at=(0, 5))
    stored = {"at": [0, 5], "checkpoints": 5, "samples": 1024, "core": 4, "flat": 0.01}
    methods = {"hydra-ekfac": {"state": "complete", "mode": "forward", "options": stored}}
    asked = {**stored, "core": 256}
    assert method_differences(spec, info(methods)) == [
        f"options: stored {stored}, asked {asked} (method hydra-ekfac-mean)"
    ]
    assert method_differences(replace(spec, curvature_core=4), info(methods)) == []
    assert method_differences(replace(spec, hessian="exact"), info(methods)) == []
    mixed = {"hydra-mixed": {"state": "complete", "mode": "adjoint", "options": {"share": 0.5}}}
    assert method_differences(
        RunSpec(hessian="mixed", mode="adjoint", curvature_share=0.25), info(mixed)
    ) == ["options: stored {'share': 0.5}, asked {'share': 0.25} (method hydra-mixed)"]
    methods["hydra-ekfac"]["state"] = "asked"  # binds nobody
    assert method_differences(spec, info(methods)) == []
