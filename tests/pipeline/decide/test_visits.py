"""Detectors that read the record: against definitions written out sample by sample; and what runs without visits are told."""

from __future__ import annotations

import itertools
import math
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hydra_pipe.pipeline.decide.case import Case, Options
from hydra_pipe.pipeline.decide.passes import Passes
from hydra_pipe.pipeline.decide.scorers import SCORERS
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.plan import kept_visits
from hydra_pipe.pipeline.plan.plan import make_plan
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.pipeline.verify.contents import Contents
from hydra_pipe.pipeline.verify.contents_visits import visits as check_visits
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.arrays import StoredArray
from hydra_pipe.storage.errors import HydraError, IncompleteStage, InputError, SpecMismatch
from hydra_pipe.storage.visits import Visits
from torch.utils.data import TensorDataset

from tests.forging import vouch
from tests.recipes import Small

NAMES = ("margin", "loss", "final-loss", "early-loss", "forgetting", "variability", "confident")
KEPT_RUN = Path(__file__).parents[2] / "data" / "kept_run.tar.gz"


def small(out: object, **fields: Any) -> RunSpec:
    given: dict[str, Any] = {
        "recipe": "digits",
        "recipe_args": {"train_size": 150, "test_size": 4, "label_noise": 0.2, "noise_kind": "symmetric"},
        "epochs": 7,
        "batch_size": 20,
        "track": "10:150",
        "executor": "serial",
        "device": "cpu",
        "threads": 1,
        "mode": "adjoint",
        "targets": "mean",
        "out": str(out),
    }
    return RunSpec(**{**given, **fields})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("visits") / "r"
    run(small(found))
    return found


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place, tmp_path / "copy"))


def case_of(opened: Any, tracked: Any, given: Any) -> Case:
    return Case(
        run=opened,
        tracked=np.asarray(tracked),
        given=np.asarray(given),
        method=None,
        selecting=None,
        passes=Passes(opened),
        options=Options(),
    )


@pytest.fixture
def case(place: Path) -> Case:
    opened = open_run(place)
    samples = opened.samples("hydra-mean")
    return case_of(opened, samples["train_index"].to_numpy(), samples["label"].to_numpy().astype(np.int64))


def made(
    loss: Any, margin: Any = None, other: Any = None, probability: Any = None, given: Any = None
) -> Case:
    def array(values: Any) -> Any:
        return None if values is None else np.asarray(values, dtype=np.float32)

    found = Visits(
        loss=array(loss),
        margin=array(margin),
        other=None if other is None else np.asarray(other, dtype=np.int16),
        probability=array(probability),
        loss_dtype="float32",
    )
    n = found.loss.shape[1]
    stub = SimpleNamespace(uri="some/run", visits=lambda: found)
    return case_of(stub, np.arange(n), np.zeros(n, dtype=np.int64) if given is None else given)


def naive(name: str, case: Case) -> list[float]:
    """Return the suspicions by their definitions, a sample at a time."""
    visits = case.run.visits()
    assert visits is not None
    assert visits.margin is not None
    found = []
    for i in case.tracked:
        losses = [float(value) for value in visits.loss[:, i]]
        margins = [float(value) for value in visits.margin[:, i]]
        own = [math.exp(-value) for value in losses]
        mean = sum(own) / len(own)
        if name == "margin":
            found.append(-sum(margins) / len(margins))
        elif name == "loss":
            found.append(sum(losses) / len(losses))
        elif name == "final-loss":
            found.append(losses[-1])
        elif name == "early-loss":
            found.append(sum(1 - p for p in own[:5]) / len(own[:5]))
        elif name == "variability":
            found.append(math.sqrt(sum((p - mean) ** 2 for p in own) / len(own)))
        else:
            events = sum(a > 0 >= b for a, b in itertools.pairwise(margins))
            lower = sum(
                float(m) > sum(margins) / len(margins)
                for m in visits.margin[:, case.tracked].astype(float).mean(0)
            )
            found.append((events if max(margins) > 0 else len(margins)) + lower / case.n)
    return found


@pytest.mark.parametrize("name", NAMES[:-1])
def test_detectors_are_their_definitions(name: str, case: Case) -> None:
    scores = SCORERS[name].score(case)
    np.testing.assert_allclose(scores.suspicion, naive(name, case), rtol=1e-9, atol=1e-12)
    assert scores.suggested.shape == (case.n,)
    assert (scores.suggested != case.given).all()
    if scores.quality is not None:
        assert ((scores.quality >= 0) & (scores.quality <= 1)).all()
        order = np.argsort(scores.suspicion)
        assert (np.diff(scores.quality[order]) <= 1e-12).all()
    assert scores.reason is not None
    assert len(scores.reason) == case.n


def test_confident_is_the_confident_joint(case: Case) -> None:
    visits = case.run.visits()
    assert visits is not None
    assert visits.probability is not None
    rows = visits.probability[case.tracked].astype(float)
    labels = case.given.tolist()
    classes = range(rows.shape[1])
    thresholds = [np.mean([row[k] for row, y in zip(rows, labels, strict=True) if y == k]) for k in classes]
    counts = np.zeros((len(classes), len(classes)))
    off = []
    for row, y in zip(rows, labels, strict=True):
        able = [k for k in classes if row[k] >= thresholds[k]]
        best = max(able, key=lambda k: row[k]) if able else None
        off.append(best is not None and best != y)
        if best is not None:
            counts[y, best] += 1
    wrong = sum(labels.count(k) * (1 - counts[k, k] / counts[k].sum()) for k in classes if counts[k].sum())
    scores = SCORERS["confident"].score(case)
    assert scores.notes == {"estimated_wrong": round(wrong), "off_diagonal": sum(off)}
    assert 0 < sum(off) < case.n
    assert np.array_equal(scores.suspicion >= 1, off)
    margin = [row[y] - max(row[k] for k in classes if k != y) for row, y in zip(rows, labels, strict=True)]
    np.testing.assert_allclose(scores.suspicion % 1, (1 - np.array(margin)) / 2, atol=1e-9)
    assert scores.quality is not None
    assert np.array_equal(
        np.argsort(scores.quality, kind="stable"), np.argsort(-scores.suspicion, kind="stable")
    )


def test_wrong_labels_are_found(case: Case) -> None:
    noisy = case.run.noisy()
    assert noisy is not None
    wrong = np.isin(case.tracked, noisy[0])
    for name in ("margin", "loss", "confident"):
        suspicion = SCORERS[name].score(case).suspicion
        above = (suspicion[wrong][:, None] > suspicion[~wrong]).mean()
        assert above > 0.75, name


def test_suggestions_without_probabilities_are_the_most_frequent_other_class() -> None:
    other = [[3, 1, -1], [2, 1, -1], [2, 0, -1], [3, 2, -1], [3, 1, -1]]
    scores = SCORERS["loss"].score(made(np.ones((5, 3)), np.ones((5, 3)), other))
    assert scores.suggested.tolist() == [3, 1, -1]


def test_forgetting_counts_never_learned_as_the_maximum_and_breaks_ties_by_margin() -> None:
    margin = np.array([[1, -1, 1, 1], [-1, -1, 1, 2], [1, -2, 1, 3], [-1, -1, 1, 4]], dtype=float)
    scores = SCORERS["forgetting"].score(made(np.ones((4, 4)), margin))
    assert np.floor(scores.suspicion).tolist() == [2, 4, 0, 0]
    assert scores.suspicion[2] > scores.suspicion[3]
    assert scores.notes["never_learned"] == 1
    assert scores.reason is not None
    assert scores.reason[:2] == ["forgotten 2 times in 4 visits", "never predicted right in 4 visits"]


def test_early_loss_takes_fewer_epochs_where_there_are_fewer() -> None:
    scores = SCORERS["early-loss"].score(made([[0.0, 1.0]]))
    np.testing.assert_allclose(scores.suspicion, [0, 1 - math.exp(-1)], atol=1e-7)
    assert scores.notes == {"epochs": 1}


def test_a_sample_without_margin_is_not_judged() -> None:
    margin = [[1.0, np.nan], [2.0, np.nan]]
    never_visited = made(margin, margin)
    for name in ("margin", "forgetting"):
        assert np.isnan(SCORERS[name].score(never_visited).suspicion).tolist() == [False, True]


class FromOne(Small):
    """Labels 1 .. 3 of three outputs: label 1 is output 0, so what the record knows of output 1 is not of label 1."""

    def train_dataset(self) -> TensorDataset:
        inputs, targets = super().train_dataset().tensors
        return TensorDataset(inputs, targets + 1)

    def test_dataset(self) -> TensorDataset:
        inputs, targets = super().test_dataset().tensors
        return TensorDataset(inputs, targets + 1)

    def losses(self, model: Any, batch: Any) -> Any:
        return super().losses(model, (batch[0], batch[1] - 1))


class Numbered(FromOne):
    """The same, with labels() that number the outputs."""

    def labels(self, dataset: Any) -> Any:
        return dataset.tensors[1] - 1


def test_labels_that_are_no_outputs_have_no_margins(tmp_path: Path) -> None:
    given = {"executor": "serial", "device": "cpu", "mode": "adjoint", "targets": "mean", "track": "0:9"}
    case_by_labels = {}
    for recipe in (FromOne(), Numbered(), Small()):
        opened = run(RunSpec(recipe=recipe, out=str(tmp_path / type(recipe).__name__), **given))
        samples = opened.samples("hydra-mean")
        labels = samples["label"].to_numpy().astype(np.int64)
        case_by_labels[type(recipe)] = case_of(opened, samples["train_index"].to_numpy(), labels)
    for name in ("margin", "forgetting", "confident"):
        with pytest.raises(InputError, match="label y is not output y, which " + name):
            SCORERS[name].score(case_by_labels[FromOne])
        found, right = (SCORERS[name].score(case_by_labels[recipe]) for recipe in (Numbered, Small))
        np.testing.assert_array_equal(found.suspicion, right.suspicion)
    found, right = (SCORERS["loss"].score(case_by_labels[recipe]) for recipe in (FromOne, Small))
    np.testing.assert_array_equal(found.suspicion, right.suspicion)
    assert set(found.suggested) == {-1}  # the outputs' numbers are no labels
    # Those samples alone all have margins.
    case = case_by_labels[FromOne]
    below = np.flatnonzero(case.given < 3)
    with pytest.raises(InputError, match="label y is not output y"):
        SCORERS["margin"].score(case_of(case.run, case.tracked[below], case.given[below]))
    assert "margin +nan" not in str(SCORERS["joint"].score(case).reason)


def test_confident_holds_no_table_of_all_pairs_of_classes() -> None:
    classes = 30_000  # their square in float64 is 7 GB
    probability = np.zeros((4, classes), dtype=np.float32)
    for i, (own, taken) in enumerate([(0, 0), (0, 29_999), (29_999, 29_999), (29_999, 29_999)]):
        probability[i, own], probability[i, taken] = 0.3, 0.6
    tracemalloc.start()
    found = SCORERS["confident"].score(
        made(np.ones((1, 4)), np.ones((1, 4)), None, probability, np.array([0, 0, 29_999, 29_999]))
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000
    assert (found.notes["off_diagonal"], found.notes["estimated_wrong"]) == (1, 1)
    assert found.suggested[1] == 29_999


@pytest.mark.parametrize(
    ("name", "case", "words"),
    [
        ("forgetting", made([[1.0]], [[1.0]]), "trained for one epoch, and forgetting needs two or more"),
        ("variability", made([[1.0]]), "trained for one epoch, and variability needs two or more"),
        ("margin", made([[1.0]]), "has no margins, which margin needs"),
        ("confident", made([[1.0]]), "has no margins, which confident needs"),
        ("confident", made([[1.0]], [[1.0]]), "mean probabilities were too large to be kept"),
        (
            "confident",
            made([[1.0, 1.0]], [[1.0, 1.0]], None, [[0.9, 0.1], [0.4, 0.6]]),
            "1 class among the judged samples",
        ),
    ],
)
def test_what_cannot_be_judged_is_named_in_one_line(name: str, case: Case, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        SCORERS[name].score(case)
    assert len(str(caught.value).splitlines()) == 1


def test_the_detectors_have_their_order() -> None:
    assert [name for name in SCORERS if name in NAMES] == list(NAMES)
    assert {SCORERS[name].needs for name in NAMES} == {"record"}


def test_verify_finds_a_changed_visit(copy: Path) -> None:
    assert verify(open_run(copy)).ok

    def problems() -> list[str]:
        vouch(copy)
        contents = Contents(open_run(copy), lambda _done, _what: None)
        check_visits(contents)
        return contents.problems

    assert problems() == []
    for name, at, value, words in (
        ("loss", (3, 40), 0.01, "visits/loss: the mean over step"),
        ("loss", (2, 7), np.nan, "visits/loss: epoch 2, train_index 7 is not finite"),
        ("margin", (1, 5), np.nan, "visits/other: epoch 1, train_index 5 names class"),
        ("other", (1, 6), 10, "visits/other: epoch 1, train_index 6 names class 10"),
        ("probability", (8, 2), 0.7, "visits/probability: train_index 8 adds up to"),
    ):
        array = StoredArray.open(str(copy / "trajectory.zarr"), f"visits/{name}")
        values = array.read()
        kept = values[at]
        values[at] = kept + value if name in ("loss", "probability") else value
        array.write(0, values)
        assert [words in line for line in problems()] == [True], (name, problems())
        values[at] = kept
        array.write(0, values)
    assert problems() == []
    assert verify(open_run(copy)).ok


def test_visits_off_are_none_and_the_error_says_how_to_have_them(tmp_path: Path, case: Case) -> None:
    off = small(tmp_path / "off", visits="off")
    opened = run(off)
    assert opened.visits() is None
    assert opened.trajectory().epoch_digest == case.run.trajectory().epoch_digest
    without = case_of(opened, case.tracked, case.given)
    with pytest.raises(IncompleteStage) as caught:
        SCORERS["loss"].score(without)
    assert str(caught.value) == (
        f"{opened.uri} was recorded without visits; record it again with --visits on --overwrite"
    )
    run(small(tmp_path / "off"))  # nothing differs: visits are no part of the identity
    with pytest.raises(SpecMismatch, match="visits: stored none, asked 'on'"):
        run(small(tmp_path / "off", visits="on"))
    again = run(small(tmp_path / "off", visits="on", overwrite=True))
    assert np.array_equal(again.visits().loss, case.run.visits().loss)


def test_auto_keeps_visits_up_to_its_size_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 150 * 7 * 10 + 150 * 10 * 4
    planned = make_plan(small(tmp_path / "a")).as_dict()
    assert planned["disk"]["visits"] == size
    assert planned["memory"]["record worker"] > planned["memory"]["one process without buffers"]
    monkeypatch.setattr(kept_visits, "AUTO_BYTES", size - 1)
    assert make_plan(small(tmp_path / "a")).as_dict()["disk"]["visits"] == 0
    assert make_plan(small(tmp_path / "a", visits="on")).as_dict()["disk"]["visits"] == size
    said: list[str] = []
    opened = run(small(tmp_path / "a"), observer=lambda event: said.append(str(event)))
    assert opened.visits() is None
    assert any(f"7 epochs of 150 samples take {size:,} bytes" in line for line in said)


def test_every_seed_keeps_its_own(tmp_path: Path) -> None:
    opened = run(small(tmp_path / "r", seeds=2, epochs=2))
    (member,) = opened.members().values()
    own, others = opened.visits(), member.visits()
    assert own.loss.shape == others.loss.shape == (2, 150)
    assert not np.array_equal(own.loss, others.loss)


def test_a_run_of_before_opens_without_visits(tmp_path: Path) -> None:
    shutil.unpack_archive(KEPT_RUN, tmp_path, filter="data")
    info = min(tmp_path.rglob("run.json"), key=lambda path: len(path.parts))
    opened = open_run(info.parent)
    assert opened.visits() is None
    assert opened.trajectory().visits() is None
    with pytest.raises(HydraError, match="was recorded without visits"):
        SCORERS["margin"].score(case_of(opened, [0], [0]))
