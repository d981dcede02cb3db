"""The preflight: what it warns of, what it costs, what it leaves behind, and what stops a run."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.pipeline.drive import preflight
from hydra_pipe.pipeline.drive.preflight import settings_preflight
from hydra_pipe.pipeline.executors.events import Note, UnitFinished, UnitSkipped
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import NonFiniteTangents
from hydra_pipe.workers.recursion.coefficients import coefficients, recorded_settings
from hydra_pipe.workers.recursion.forms import EKFAC, FORWARD
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.training.training import Compute, Training

from hydra_pipe import RunSpec, open_run, run
from tests.recipes import Small, TwoGroups
from tests.workers.reference.test_growth import Waves, Wild


def spec(recipe, out, **changes):
    values = {"executor": "serial", "device": "cpu", "shards": 2, "mode": "adjoint", **changes}
    return RunSpec(recipe=recipe, out=str(out), **values)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(preflight, "ENOUGH", 1)


def notes(heard):
    return [event.message for event in heard if isinstance(event, Note)]


# ---------------------------------------------------------------- the exact form


@pytest.mark.parametrize("mode", ["forward", "adjoint"])
def test_growing_tangents_are_warned_of_and_tame_ones_are_not(tmp_path, mode, always):
    heard = []
    few = {"hessian": "exact", "mode": mode, "track": "6", "test": "4"}
    done = run(spec(Wild(), tmp_path / "wild", **few), observer=heard.append)
    (warning,) = [text for text in notes(heard) if text.startswith("warning: ")]
    for words in (
        "exact tangents grow",
        "of 48",
        "use --dtype float64, a lower learning rate or fewer epochs",
    ):
        assert words in warning
    entry = open_run(done.uri).info["methods"]["hydra-exact"]["preflight"]
    assert f"warning: {entry['warnings'][0]}" == warning
    assert entry["peak"] > 1e4
    assert entry["deviation"] < entry["limit"] < entry["rounding"]
    assert status(done)["warnings"] == [f"hydra-exact: {entry['warnings'][0]}"]
    assert done.summary()["warnings"] == status(done)["warnings"]
    assert status(done)["state"] == "complete"
    assert verify(done).ok
    shown = CliRunner().invoke(main, ["status", done.uri]).stdout
    assert "warning: hydra-exact: exact tangents grow" in shown
    tame = []
    done = run(spec(Small(), tmp_path / "tame", **few), observer=tame.append)
    assert not [text for text in notes(tame) if text.startswith("warning: ")]
    assert open_run(done.uri).info["methods"]["hydra-exact"]["preflight"]["warnings"] == []


def test_it_is_a_unit_that_resumes_and_comes_first(tmp_path, always, monkeypatch):
    heard = []
    place = spec(Small(), tmp_path / "r", hessian="exact")
    run(place, observer=heard.append)
    stages = [event.stage for event in heard if isinstance(event, UnitFinished)]
    assert stages.index("hydra-exact/preflight") == stages.index("hydra-exact/adjoint") - 1
    manifest = open_run(place.out).directory.manifest("hydra-exact/preflight", "preflight")
    before = manifest.values["growth"]
    open_run(place.out).directory.drop("hydra-exact/adjoint", "targets-00000")
    again = []
    done = run(place, observer=again.append)
    assert "hydra-exact/preflight" in {e.stage for e in again if isinstance(e, UnitSkipped)}
    assert done.info["methods"]["hydra-exact"]["preflight"]["growth"] == before
    names = [stage["stage"] for stage in status(done)["stages"]]
    assert names.index("hydra-exact/preflight") < names.index("hydra-exact/adjoint")


def test_it_is_left_out_where_little_follows(tmp_path):
    done = run(spec(Small(), tmp_path / "r", hessian="exact"))
    entry = done.info["methods"]["hydra-exact"]["preflight"]
    assert "fewer than 128 vectors follow" in entry["skipped"]
    assert "hydra-exact/preflight" not in done.directory.stages()
    assert preflight.ENOUGH == 128


def test_it_is_not_done_after_the_stage(tmp_path, monkeypatch):
    run(spec(Small(), tmp_path / "r", hessian="exact"))
    monkeypatch.setattr(preflight, "ENOUGH", 1)
    done = run(spec(Small(), tmp_path / "r", hessian="exact"))
    assert "hydra-exact/preflight" not in done.directory.stages()


def test_directions_are_asked_too(tmp_path, always):
    done = run(spec(Small(), tmp_path / "r", hessian="ekfac", exact_rank=3))
    assert done.info["methods"]["hydra-ekfac-rank3"]["preflight"]["growth"] > 0
    assert done.info["methods"]["hydra-ekfac"]["preflight"]["largest_coefficient"] > 0
    assert verify(done).ok


@pytest.mark.parametrize("mode", ["forward", "adjoint"])
def test_overflow_stops_the_run_early_and_names_the_step(tmp_path, mode, always):
    heard = []
    with pytest.raises(NonFiniteTangents, match=r"after step \d+ of 36 .*a lower learning rate"):
        run(spec(Waves(), tmp_path / "r", hessian="exact", mode=mode), observer=heard.append)
    assert {e.stage for e in heard if isinstance(e, UnitFinished)} == {"record", "test-gradients"}
    assert open_run(tmp_path / "r").methods() == []


@pytest.mark.parametrize("mode", ["forward", "adjoint"])
def test_overflow_is_never_stored_without_preflight_either(tmp_path, mode):
    with pytest.raises(NonFiniteTangents, match=r"after step \d+ of 36"):
        run(spec(Waves(), tmp_path / "r", hessian="exact", mode=mode))
    found = open_run(tmp_path / "r")
    stage = f"hydra-exact/{'replay' if mode == 'forward' else 'adjoint'}"
    assert set(found.directory.units(stage)) <= {"index"}


def test_contributions_beyond_what_they_are_stored_in_are_not_stored(tmp_path, always):
    """In float64 the tangents are finite; the tables hold float32."""
    heard = []
    place = spec(Waves(), tmp_path / "r", hessian="exact", dtype="float64", test="3")
    with pytest.raises(NonFiniteTangents, match=r"a contribution of size \d\.\de\+\d+ is beyond float32"):
        run(place, observer=heard.append)
    (warning,) = notes(heard)
    assert "exact tangents grow" in warning
    assert "--dtype" not in warning
    found = open_run(tmp_path / "r")
    assert found.info["methods"]["hydra-exact"]["preflight"]["peak"] > 1e38
    assert found.methods() == []


# ---------------------------------------------------------------- settings alone


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "r"
    return run(spec(TwoGroups(), place), stages=["record"]).trajectory()


def changed(trajectory, **arrays):
    settings = dataclasses.replace(recorded_settings(trajectory), **arrays)
    return dataclasses.replace(trajectory, **arrays, coefficient=coefficients(settings))


def test_ordinary_settings_are_no_cause_for_warnings(trajectory):
    found = settings_preflight(trajectory, "float32")
    assert found.warnings == ()
    share = 45 / (trajectory.batches >= 0).sum(1)
    right = (np.abs(trajectory.coefficient) * share[:, None]).max()
    assert found.rest["largest_coefficient"] == pytest.approx(right)


def test_a_cosine_schedule_to_zero_is_no_cause_either(trajectory):
    steps = len(trajectory.loss)
    rate = np.tile(0.05 * (1 + np.cos(np.pi * np.arange(steps) / steps))[:, None], 2)
    assert settings_preflight(changed(trajectory, learning_rate=rate), "float32").warnings == ()


def test_coefficients_that_forget_whole_epochs_are_warned_of(trajectory):
    """A decay of 5 at rate 0.1 halves what is remembered at every step, six a epoch."""
    decay, inertia = np.full((18, 2), 9.0), np.zeros((18, 2))
    found = changed(trajectory, weight_decay=decay, momentum=inertia, learning_rate=np.full((18, 2), 0.1))
    (warning,) = settings_preflight(found, "float32").warnings
    assert "coefficients of 1 of 3 epochs are below 1.2e-07 of the largest" in warning
    assert "--dtype float64, a smaller weight decay or learning rate" in warning
    assert settings_preflight(found, "float64").warnings == ()


def test_coefficients_beyond_the_dtype_stop_the_run(trajectory):
    steps = np.ones((18, 2))
    found = changed(trajectory, weight_decay=400 * steps, learning_rate=steps, momentum=0 * steps)
    with pytest.raises(NonFiniteTangents, match=r"the coefficient of step \d+ of 18 is beyond float32"):
        settings_preflight(found, "float32")
    assert settings_preflight(found, "float64").rest["largest_coefficient"] > 1e38
    found = changed(trajectory, weight_decay=1e30 * steps, learning_rate=steps, momentum=0 * steps)
    with pytest.raises(NonFiniteTangents, match="is beyond float64"):
        settings_preflight(found, "float64")


class Steep(Small):
    """Steps so long that most of the curvature is beyond what they bear."""

    def optimizer(self, model):
        import torch

        return torch.optim.SGD(model.parameters(), lr=20.0)


def test_clipped_eigenvalues_are_a_note_that_is_kept(tmp_path):
    heard = []
    done = run(spec(Steep(), tmp_path / "r", hessian="ekfac"), observer=heard.append)
    entry = done.info["methods"]["hydra-ekfac"]["preflight"]
    curvature = done.directory.path("curvature", "method=hydra-ekfac.zarr")
    from hydra_pipe.storage.curvature import read_curvature

    training = Training(Steep(), Compute(device="cpu"))
    stored = read_curvature(curvature)
    replay = make_replay(EKFAC, FORWARD, training, done.trajectory(), np.arange(2), curvature=stored)
    cut = stored.eigenvalues > replay.sink.coefficients.bent.eigenvalues.numpy()
    assert entry["clipped_eigenvalues"] == cut.any(0).sum() > 0
    (warning,) = notes(heard)
    assert f"{entry['clipped_eigenvalues']:,} of 53 eigenvalues of the curvature are beyond" in warning
    document = json.loads(CliRunner().invoke(main, ["status", done.uri, "--format", "json"]).stdout)
    assert document["warnings"] == [f"hydra-ekfac: {entry['warnings'][0]}"]
