"""The blend of two forms against the forms themselves, each made on its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hydra_pipe.storage.errors import SpecError
from hydra_pipe.workers import estimators
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.training.training import Compute, Training

from tests.recipes import Plain
from tests.workers.estimators.test_estimators import TRACKED, Case, worst


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(Plain(), tmp_path_factory.mktemp("blend"))


@pytest.fixture(scope="module")
def forms(case):
    """Contributions of the exact form, the mixed one at a share of 0.3, and EKFAC without a core."""

    def made(form, **more):
        training = Training(
            case.recipe, replace(compute, batch_norm="coupled" if "share" in more else "constant")
        )
        targets = case.targets().gradient
        back = make_replay(form, "adjoint", training, case.trajectory, TRACKED, targets=targets, **more)
        found = back.run().contributions()
        back.close()
        return found

    compute = Compute(dtype="float64", device="cpu")
    estimate = CurvatureEstimate(Training(case.recipe, compute), case.trajectory, samples=40, core=0)
    return (
        made("hydra-exact", share=1.0),
        made("hydra-exact", share=0.3),
        made("hydra-ekfac", curvature=estimate.run()),
    )


def test_at_the_ends_it_is_one_of_the_forms(case, forms):
    exact, mixed, ekfac = forms
    assert worst(case.find("blend", weight=1, share=1, samples=40, core=0).values, exact) < 1e-12
    assert worst(case.find("blend", weight=1, share=0.3, samples=40, core=0).values, mixed) < 1e-12
    assert worst(case.find("blend", weight=0, samples=40, core=0).values, ekfac) < 1e-12
    assert min(worst(mixed, exact), worst(ekfac, exact), worst(mixed, ekfac)) > 1e-3


def test_between_them_neither_drowns_the_other(case, forms):
    """Each counts by its weight, however large its contributions are."""
    _, mixed, ekfac = forms
    found = case.find("blend", weight=0.25, share=0.3, samples=40, core=0)
    a, b = mixed.std(1, keepdims=True), ekfac.std(1, keepdims=True)
    right = (0.25 * mixed / a + 0.75 * ekfac / b) * (0.25 * a + 0.75 * b)
    assert worst(found.values, right) < 1e-12
    assert found.notes["sizes"] == pytest.approx([np.median(a), np.median(b)])


def test_a_target_that_nothing_moves_has_no_contributions(case):
    targets = case.targets()
    still = replace(targets, gradient=np.zeros_like(targets.gradient))
    assert (case.find("blend", targets=still, samples=40, core=0).values == 0).all()


@pytest.mark.parametrize(
    "options",
    [{"weight": 1.5}, {"weight": "half"}, {"share": -0.1}, {"share": 0.001}, {"samples": 0}, {"core": 2.5}],
    ids=str,
)
def test_wrong_options_are_refused(options):
    (key,) = options
    with pytest.raises(SpecError, match=f"option {key} is .*; use "):
        estimators.make("blend", options)
