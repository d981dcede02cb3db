"""The benchmarks run at tiny sizes, and the dense form they compare with computes the same numbers."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipes.cifar10 import Cifar10
from hydra_pipe.workers.recipes.densenet import DenseNet40
from hydra_pipe.workers.recipes.mnist import FashionMnist
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.training import Compute
from rich.console import Console

from benchmarks import (
    approximation,
    cases,
    detect,
    detectors,
    guards,
    hessian,
    memory,
    operators,
    peers,
    plans,
    reduce,
    replay,
    report_page,
    segments,
    speedup,
    startup,
    storage,
)
from benchmarks.__main__ import main, parse
from benchmarks.cases import Clothes, Photographs, Prefetched, record
from benchmarks.dense import DenseAlgorithm
from benchmarks.report import Result
from benchmarks.timing import ratio, take_turns
from tests.oracle import DENSE_FLOAT32, relative_error


def test_the_dense_form_gives_the_hypergradients_of_replay(tmp_path):
    recipe = Clothes(train_size=40, test_size=4, epochs=2, batch_size=16)
    compute = Compute(threads=1, device="cpu")
    batches, trajectory = record(recipe, compute, tmp_path)
    dense = DenseAlgorithm(Prefetched(recipe, compute, batches))
    for step, batch in enumerate(batches):
        dense.step(step, batch)
    dense.close()
    follow = Replay(Prefetched(recipe, compute, batches), trajectory, np.arange(40), FastRows)
    rows = follow.run().numpy(0, 40)
    assert relative_error(rows, dense.rows()) < DENSE_FLOAT32


def test_turns_alternate_and_the_warm_up_is_dropped():
    calls = []
    taken = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(v) for v in taken.values()] == [2, 2]
    assert ratio([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_a_goal_is_judged_by_the_median():
    result = Result(name="x", sizes={})
    result.add("fine", [1.9, 2.0, 2.1], "x", at_most=2)
    result.add("missed", [59.0], "%", at_least=60)
    result.add("free", [1.0], "s")
    result.add("noisy", [1.0, 2.0, 9.0], "x", at_most=2)
    assert [line.met for line in result.lines] == [True, False, None, None]
    assert result.lines[-1].note == "too noisy to judge"


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Random images, as where the files are missing: unpacking 60,000 real ones takes seconds each time."""

    def missing(recipe, part):
        raise RecipeError("not here")

    for kind in (FashionMnist, Cifar10):
        monkeypatch.setattr(kind, "_part", missing)
    monkeypatch.setattr(cases, "MADE_UP", 2000)


TINY = {
    "replay": (
        replay,
        {
            **replay.QUICK,
            "samples": 192,
            "threads": 1,
            "growth": (192,),
            "dense_steps": 1,
            "epochs": 2,
            "epochs_samples": 64,
            "shards": 2,
            "forms": 1,
        },
    ),
    "guards": (guards, guards.QUICK),
    "hessian": (hessian, {**hessian.QUICK, "samples": 8, "batch": 4}),
    "speedup": (
        speedup,
        {**speedup.QUICK, "samples": 8, "batch": 4, "tracked": (2,), "targets": (1,)},
    ),
    "operators": (
        operators,
        {**operators.QUICK, "models": ("LeNet-5",), "samples": 128, "recorded": 128},
    ),
    "plans": (plans, {**plans.QUICK, "samples": 64}),
    "reduce": (reduce, {**reduce.QUICK, "shapes": ((64, 20, 100),), "threads": 1, "rounds": 1}),
    "detect": (detect, {**detect.QUICK, "samples": 200, "tests": 20, "detectors": (("harm",),)}),
    "detectors": (detectors, detectors.QUICK),
    "report_page": (report_page, {**report_page.QUICK, "samples": 200, "tests": 20, "rows": (20,)}),
    "segments": (segments, {**segments.QUICK, "samples": 128, "epochs": 1, "units": 2, "sharded": 0}),
    "storage": (storage, {"rows": 16, "columns": 100, "tile": (20, 10), "rounds": 1}),
    "startup": (startup, {**startup.QUICK, "rounds": 1}),
}


@pytest.mark.parametrize("name", TINY)
def test_it_runs(name, tmp_path, monkeypatch):
    module, sizes = TINY[name]
    monkeypatch.setattr(Photographs, "model", lambda recipe: DenseNet40(layers_per_block=1))  # 10 layers
    result = module.run(sizes, tmp_path)
    assert result.name == name
    assert result.lines
    # What is fitted to differences of times this short may come out as anything.
    seen = [line for line in result.lines if name != "speedup" or line.what.startswith("measured")]
    assert all(line.value > 0 or "host reads" in line.what for line in seen)


def test_the_speedup_is_extrapolated_by_its_cost_model():
    sizes = {**speedup.SIZES, "samples": 192, "tracked": (4, 8), "targets": (1, 4)}
    plain, step, visit, product = 2.0, 5.0, 0.25, 6.0  # seconds; 3 steps
    taken = {
        "plain": [3 * plain],
        "fast 4": [3 * step + 4 * visit],
        "fast all": [3 * step + 192 * visit],
        "exact last": [3 * plain + 8 * visit],
        "exact 8": [3 * plain + 8 * (visit + 2 * product)],
        "adjoint 4": [4 * 3 * 7.0],
    }
    result = Result(name="speedup", sizes=sizes)
    speedup.extrapolate(result, sizes, taken, 3)
    found = {line.what: line.value for line in result.lines}
    fast = 625 * step + 20_000 * visit
    exact = 625 * plain + 20_000 * (visit + 312 * product)
    assert found["fitted: one product of the exact form / plain step"] == pytest.approx(product / plain)
    assert found["extrapolated: fast"] == pytest.approx(fast / 3600)
    assert found["extrapolated: exact forward"] == pytest.approx(exact / 3600)
    assert found["extrapolated: exact forward / fast"] == pytest.approx(exact / fast)
    assert found["extrapolated: adjoint, one target"] == pytest.approx(625 * 7 / 3600)


def test_memory_asks_three_processes(tmp_path, monkeypatch):
    asked = []

    def answer(what, given):
        asked.append(what)
        return {"predicted": 100e6, "buffers": 10e6, "tracked": 5, "peak": 110e6}

    monkeypatch.setattr(memory, "from_worker", answer)
    result = memory.run(memory.QUICK, tmp_path)
    assert asked == ["plan", "record", "replay"]
    assert result.lines[-1].value == pytest.approx(1.1)
    assert result.lines[-1].met


def test_peers_that_are_missing_are_told_and_the_others_measured(tmp_path, monkeypatch):
    assert peers.version_of("hydra-pipe")
    assert peers.version_of("no-such-package-at-all") is None
    monkeypatch.setattr(peers, "version_of", lambda name: None)
    fast = {name: form for name, form in peers.FORMS.items() if name.startswith("fast") and "few" not in name}
    monkeypatch.setattr(peers, "FORMS", fast)
    peers._unpacked.cache_clear()
    result = peers.run({**peers.QUICK, "samples": 96, "tests": 5, "epochs": 1}, tmp_path)
    peers._unpacked.cache_clear()
    found = {line.what: line for line in result.lines}
    for name in ("captum", "kronfluence"):
        assert np.isnan(found.pop(name).value)
    assert all(line.value > 0 for line in found.values())
    (agreement,) = (line for what, line in found.items() if what.endswith("Spearman"))
    assert agreement.met
    assert found["fast, adjoint, all test samples / plain training"].goal == "≤ 1.5"


def test_the_figures_of_the_paper(tmp_path):
    pytest.importorskip("matplotlib")
    small = {"ekfac": False, "samples": 64, "track": 3, "tests": 2, "depth": 3}
    sizes = {**approximation.QUICK, **small, "figures": str(tmp_path / "pictures")}
    result = approximation.run(sizes, tmp_path)
    measured = {line.what: line.value for line in result.lines}
    assert measured["hydra against hydra-exact: error of the hypergradients"] > 0
    assert measured["hydra against hydra-exact: Spearman of C(i)"] <= 1
    assert "influence-lissa against hydra-exact-raw-decay: wrong signs of C(i)" in measured
    assert {path.suffix for path in (tmp_path / "pictures").iterdir()} == {".png"}
    recipe = approximation.Shortened(train_size=100)
    assert len(recipe.validation_dataset()) == 20
    assert recipe.scheduler(recipe.optimizer(recipe.model())).factor == 0.5


def test_the_command_writes_json_and_shows_a_table(tmp_path):
    out = io.StringIO()
    sizes = ["--size", "rows=8", "--size", "columns=50", "--size", "tile=(8, 4)", "--size", "rounds=1"]
    main(["storage", *sizes, "--results", str(tmp_path)], Console(file=out, width=150))
    written = json.loads((tmp_path / "storage.json").read_text())
    assert written["sizes"]["rows"] == 8
    assert set(written["machine"]) >= {"processor", "cores", "torch"}
    assert {"date", "lines", "load_before_and_after"} <= set(written)
    assert "GB/s" in out.getvalue()


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit):
        parse(["speed"])
