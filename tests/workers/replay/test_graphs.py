"""Which steps of a replay are captured, and that captured work has the bits it had: with a stand-in for a graph, on a CPU."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.persample import engine
from hydra_pipe.workers.replay import graphs
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.replay.projection import FastProducts
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from tests.recipes import BatchNormed, Images, Sequences, Small, TwoGroups

CPU = Compute(device="cpu", graphs="auto")
TRACKED = [0, 1, 5, 17, 18, 40, 43]


class Again:
    """Does the work once more where a graph would be given."""

    def __init__(self, _device=None):
        self.captured = 0

    def beside(self):
        return nullcontext()

    def capture(self, work):
        self.captured += 1
        return work


class Failing(Again):
    def capture(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors")


class Drawing(Again):
    def capture(self, work):
        random.random()
        return work


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """All rows of a batch, as on an accelerator; steps may be captured on a CPU."""
    plain = engine.PerSampleGradients.__init__

    def accelerated(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self._accelerated = self._at_once = True

    monkeypatch.setattr(engine.PerSampleGradients, "__init__", accelerated)
    use(monkeypatch, Again)


def use(monkeypatch, capturer):
    monkeypatch.setattr(graphs, "CAPTURERS", {"cpu": capturer})


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    made = {}

    def of(kind):
        if kind not in made:
            uri = str(tmp_path_factory.mktemp(kind.__name__) / "trajectory.zarr")
            Recorder(Training(kind(), CPU), uri).run()
            made[kind] = open_trajectory(uri)
        return made[kind]

    return of


def replayed(kind, trajectory, compute=CPU, sink=FastRows):
    replay = Replay(Training(kind(), compute), trajectory, np.asarray(TRACKED), sink)
    rows = replay.run().numpy(0, len(TRACKED)).copy()
    replay.close()
    return rows, replay


@pytest.mark.parametrize("kind", [Small, Images, BatchNormed, TwoGroups], ids=lambda k: k.__name__)
def test_captured_steps_have_the_bits_they_had(kind, records, monkeypatch):
    trajectory = records(kind)
    rows, replay = replayed(kind, trajectory)
    told = replay.told()["ways"]
    shapes = len(set((trajectory.batches >= 0).sum(1).tolist()))
    tracked = np.isin(trajectory.batches, TRACKED).any(1).sum()
    assert told["captured_steps"] >= tracked - graphs.WARM * shapes > 0
    assert "why_not" not in told
    assert replay.graphs.capturer.captured >= 1
    use(monkeypatch, Failing)
    plainly, replay = replayed(kind, trajectory)
    assert replay.told()["ways"]["captured_steps"] == 0
    assert np.array_equal(rows, plainly)


def test_what_cannot_be_captured_is_taken_as_ever_and_said(records, monkeypatch, caplog):
    trajectory = records(Images)
    use(monkeypatch, Failing)
    _rows, replay = replayed(Images, trajectory)
    assert (
        replay.told()["ways"]["why_not"] == "RuntimeError: operation not permitted when stream is capturing"
    )
    assert "not captured as CUDA graphs: RuntimeError" in caplog.text
    use(monkeypatch, Drawing)
    _rows, replay = replayed(Images, trajectory)
    assert replay.graphs.why == "the losses draw random numbers of the host"


def test_gradients_by_other_passes_are_named(records):
    _rows, replay = replayed(Sequences, records(Sequences))
    assert replay.graphs.why.startswith("gradients of ")
    assert replay.graphs.why.endswith("come by other passes than the step's own")
    assert replay.graphs.taken == 0


def test_a_graph_that_changes_from_step_to_step_is_not_captured(records, monkeypatch):
    trajectory = records(Images)
    forms = iter(range(1000))
    monkeypatch.setattr(engine, "form_of", lambda *_: next(forms))
    _rows, replay = replayed(Images, trajectory)
    assert replay.graphs.why == "the graph of the losses has another form from step to step"


def test_only_sums_of_rows_by_plain_steps_are_captured(records, monkeypatch):
    trajectory = records(Images)
    training = Training(Images(), CPU)
    targets = np.zeros((1, training.layout.dimension), dtype=np.float32)
    products = FastProducts(training, trajectory, 3, targets)
    assert "FastProducts is not captured" in graphs.why_not(training, products)
    products.engine.close()
    rows = FastRows(training, trajectory, 3)
    assert graphs.why_not(training, rows) is None
    monkeypatch.setattr(training, "max_norm", 1.0)
    assert "clipping" in graphs.why_not(training, rows)
    monkeypatch.undo()
    monkeypatch.setattr(rows._scales.steps, "looks", True)
    assert "preconditioner" in graphs.why_not(training, rows)
    monkeypatch.undo()
    monkeypatch.setattr(rows.engine, "tile", 1)
    assert "too large for one block" in graphs.why_not(training, rows)
    monkeypatch.undo()
    monkeypatch.setattr(rows.buffers, "home", torch.device("meta"))
    assert "host memory" in graphs.why_not(training, rows)
    rows.engine.close()


def test_too_many_shapes_end_it(records, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 0)
    _rows, replay = replayed(Images, records(Images))
    assert replay.graphs.why == "batches have more than 0 shapes"


def test_off_and_a_cpu_capture_nothing(records, monkeypatch):
    trajectory = records(Images)
    _rows, replay = replayed(Images, trajectory, replace(CPU, graphs="off"))
    assert replay.graphs is None
    assert replay.sink.spare is None
    monkeypatch.undo()
    assert graphs.graphs_of(Training(Images(), CPU), None) is None
    assert set(graphs.CAPTURERS) == {"cuda"}
