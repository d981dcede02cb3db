"""A run that an earlier version left half-finished: it opens, is judged, and goes on to the same numbers.

``tests/data/kept_run.tar.gz`` was made by version 0.1.0 before rooms had sub-rooms: two seeds and three shards of
the fast form, EKFAC with classes for targets, two estimators; then some manifests were removed.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from hydra_pipe.pipeline.analysis.status import status
from threadpoolctl import threadpool_limits

from hydra_pipe import Run, RunSpec, attribute, open_run, run, verify
from tests.bits import digests, environment
from tests.kept_recipe import Kept

DATA = Path(__file__).parents[1] / "data"
KEPT = json.loads((DATA / "kept_run.json").read_text())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with tarfile.open(DATA / "kept_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def go_on(place: Path) -> Run:
    def spec(**fields: object) -> RunSpec:
        fixed = {"executor": "serial", "device": "cpu", "threads": 1, "out": str(place)}
        return RunSpec(recipe=Kept(), **fixed, **fields)  # type: ignore[arg-type]

    with threadpool_limits(1):
        run(spec(shards=3, seeds=2))
        options = {
            "curvature_samples": 24,
            "curvature_core": 0,
            "curvature_flat": 0,
        }  # as versions before had it
        run(spec(hessian="ekfac", mode="adjoint", targets="classes", **options))
        return attribute(str(place), {"relatif": {"damping": 0.5}}, Kept(), executor="serial")


def test_it_opens_and_says_what_is_missing(place):
    opened = open_run(place)
    found = status(opened)
    assert found["state"] == "partial"
    assert found["methods"] == {
        "hydra": "partial",
        "gradient-dot": "complete",
        "hydra-seeds2": "complete",
        "relatif": "partial",
        "hydra-ekfac-classes": "complete",  # its tables are; that its targets are not is a problem
    }
    assert found["seeds"] == [{"seed": 12, "state": "complete"}]
    assert opened.samples("gradient-dot").num_rows == 24
    assert opened.averages("hydra-seeds2") == [11, 12]
    problems = verify(opened).problems
    assert [line.replace(str(place), "RUN") for line in problems] == KEPT["problems"]


@pytest.mark.skipif(KEPT["environment"] != environment(), reason="bits hold for another torch or CPU")
def test_it_goes_on_to_the_same_numbers(place):
    finished = go_on(place)
    assert status(finished)["state"] == "complete"
    assert verify(finished).ok
    assert digests(place) == KEPT["digests"]
