"""Figures of a run, what is drawn on them, and the two scales of the paper's figure."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hydra_pipe.pipeline.analysis.found import found_curve
from hydra_pipe.pipeline.analysis.interclass import Interclass, interclass
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.storage.errors import IncompleteStage, InputError
from sklearn.metrics import roc_auc_score

from tests.builders import NOISY, Built
from tests.pipeline.decide.reported import detect


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return open_run(Built(tmp_path_factory.mktemp("plots") / "digits").build().uri)


def test_the_extremes_are_bars(run):
    figure = run.plot_top(3, test=3)
    bars = [bar.get_width() for axis in figure.axes for bar in axis.patches]
    expected = run.top(3, test=3)["contribution"].to_pylist()
    expected += run.top(3, test=3, harmful=True)["contribution"].to_pylist()
    assert np.allclose(bars, expected)
    assert figure.axes[0].get_yticklabels()[0].get_text().startswith("#")


def test_classes_are_drawn_raw_and_on_both_scales(run):
    figure = run.plot_interclass()
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(images) == 3
    raw = run.interclass()["contribution"].to_numpy().reshape(3, 3)
    assert np.allclose(images[0], raw)
    assert len(run.plot_interclass(scale="code").axes) == 2
    with pytest.raises(InputError, match="raw, paper, code"):
        run.plot_interclass(scale="log")


def test_the_scales_are_those_of_text_and_code():
    values = np.array([[2.0, -1.0], [-0.5, 3.0]])
    found = Interclass(train_classes=[0, 1], test_classes=[0, 1], values=values)
    assert found.scaled("paper")[0, 0] == pytest.approx(2 / np.sqrt(1.0 * 1.5))
    centred = (values - values.mean()) / values.std()
    size = np.sqrt(np.linalg.norm(centred[0]) * np.linalg.norm(centred[:, 1]))
    assert found.scaled("code")[0, 1] == pytest.approx(centred[0, 1] / size)
    negative = Interclass(train_classes=[0], test_classes=[0, 1], values=np.array([[-2.0, 1.0]]))
    assert np.isnan(negative.scaled("paper")[0, 1])
    assert np.isfinite(negative.scaled("code")).all()
    same = Interclass(train_classes=[0], test_classes=[0], values=np.array([[4.0]]))
    assert same.scaled("code").tolist() == [[0.0]]


def test_the_stored_scale_is_the_text_s(run):
    found = interclass(run)
    assert found is not None
    assert found.train_classes == [0, 1, 2]


def test_contributions_are_a_histogram(run):
    for given, count in (({}, 20), ({"test": 3}, 20), ({"train": 4}, 6)):
        axis = run.plot_contributions(**given).axes[0]
        assert sum(bar.get_height() for bar in axis.patches) == count
    with pytest.raises(InputError, match="give one"):
        run.plot_contributions(test=3, train=4)
    for given in ({"test": 2}, {"train": 99}, {"test": 2**40}):
        with pytest.raises(InputError, match="is not in"):
            run.plot_contributions(**given)


def test_the_curve_of_a_detection_is_drawn(tmp_path):
    built = Built(tmp_path / "r").build()
    run = open_run(built.uri)
    with pytest.raises(IncompleteStage, match="no detection"):
        run.plot_curve()
    detect(run)
    axis = run.plot_curve("margin").axes[0]
    line = axis.lines[0]
    assert line.get_ydata()[2] == 1  # the two wrong ones come first
    assert "AUROC 1.000" in line.get_label()
    assert NOISY[0].tolist() == [3, 7]


def test_a_ranking_is_measured_as_scikit_learn_does():
    draw = np.random.default_rng(0)
    wrong = draw.choice(200, 30, replace=False)
    scores = draw.normal(size=200) + np.isin(np.arange(200), wrong)
    found = found_curve(np.argsort(-scores), wrong.tolist())
    assert found is not None
    assert found.auroc == pytest.approx(roc_auc_score(np.isin(np.arange(200), wrong), scores))
    assert found.recall[0.1] == np.isin(np.argsort(-scores)[:20], wrong).sum() / 30
    assert found_curve(np.arange(5), []) is None
    assert found_curve(np.arange(5), range(5)) is None


def test_a_run_whose_labels_are_right_has_no_curve(run, monkeypatch):
    monkeypatch.setattr(type(run), "noisy", lambda self: None)
    with pytest.raises(InputError, match="no label is known to be wrong"):
        run.plot_curve()


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"hydra-pipe\[plots\]"):
        run.plot_top(2)


def test_labels_are_needed_for_classes(tmp_path):
    built = Built(tmp_path / "bare")
    built.train_label[:], built.test_label[:] = -1, -1
    built.build()
    with pytest.raises(InputError, match="no class labels"):
        open_run(built.uri).plot_interclass()
