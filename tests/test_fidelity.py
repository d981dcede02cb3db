"""The fidelity benchmark runs at a tiny size, and its task is the one it says."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from benchmarks import fidelity
from benchmarks.__main__ import main
from benchmarks.clothes_lenet import ClothesConstant, ClothesCosine
from benchmarks.digits_mlp import DigitsAdamWClipped, DigitsMLP
from benchmarks.small_transformer import SmallTransformer

MAKE_DIAL = Path(__file__).parents[1] / "docs" / "images" / "make_dial.py"


def test_the_task_is_the_one_described():
    recipe = DigitsMLP()
    train, test = recipe.train_dataset(), recipe.test_dataset()
    assert sum(p.numel() for p in recipe.model().parameters()) == 2410
    assert (len(train), len(test)) == (1000, 200)
    assert recipe.epochs * -(-len(train) // recipe.batch_size) == 300
    assert len(recipe.noisy_labels(train)[0]) == 100
    assert np.unique(recipe.labels(test)).tolist() == list(range(10))
    adamw = DigitsAdamWClipped(seed=1)
    assert (len(adamw.test_dataset()), adamw.seed, adamw.clip_grad_norm) == (80, 1, 0.4)
    optimizer = adamw.optimizer(adamw.model())
    scheduler = adamw.scheduler(optimizer)
    rates = []
    for _step in range(300):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == rates[29] == 5e-3
    assert rates[0] < 2e-4
    assert rates[-1] < 1e-6


def test_goals_are_set_for_every_share():
    """The share is what the benchmark asks for, or no goal would ever be judged."""
    assert set(fidelity.GOALS) == {"hydra-exact", "hydra-ekfac"}
    ranks = {f"hydra-ekfac-rank{rank}" for rank in fidelity.SIZES["adamw_ranks"]}
    assert set(fidelity.ADAMW_GOALS) == {"hydra-exact", "hydra-ekfac", *ranks}
    for goals in (*fidelity.GOALS.values(), *fidelity.ADAMW_GOALS.values()):
        assert set(goals) == set(fidelity.SIZES["fractions"])


def test_the_dial_is_read_from_the_result_and_drawn(tmp_path):
    spec = importlib.util.spec_from_file_location("make_dial", MAKE_DIAL)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    result = json.loads(make.RESULT.read_text())
    shown = make.draw(result, tmp_path / "dial.png")
    assert (tmp_path / "dial.png").stat().st_size > 5000
    assert list(shown) == sorted(result["sizes"]["fractions"])
    for share, rows in shown.items():
        ranks = sorted(result["sizes"]["ranks"])
        assert [row[0] for row in rows] == [0, *ranks, result["sizes"]["test_size"]]
        lines = {line["what"]: line["value"] for line in result["lines"]}
        assert rows[-1][1] == lines[f"hydra-exact, {100 * share:g}% kept"]
        assert all(low <= score <= high for _, score, low, high in rows)


def test_the_less_smooth_tasks_are_the_ones_described():
    for kind, name in ((ClothesCosine, "clothes-cosine"), (ClothesConstant, "clothes-constant")):
        recipe = kind()
        assert (recipe.name, recipe.train_size, recipe.test_size) == (name, 3200, 64)
        assert recipe.epochs * -(-recipe.train_size // recipe.batch_size) == 200
        assert (recipe.lr, recipe.momentum, recipe.label_noise) == (0.02, 0.9, 0.1)
        assert kind(train_size=64).arguments()["train_size"] == 64
    optimizer = ClothesCosine().optimizer(nn.Linear(1, 1))
    scheduler = ClothesCosine().scheduler(optimizer)
    for _step in range(200):
        optimizer.step()
        scheduler.step()
    assert abs(optimizer.param_groups[0]["lr"]) < 1e-9


def test_the_language_model_foretells_characters():
    recipe = SmallTransformer(train_size=8, test_size=4)
    model, (text, follows) = recipe.model(), recipe.train_dataset().tensors
    assert sum(p.numel() for p in model.parameters()) == 28771
    assert text.shape == follows.shape == (8, 32)
    assert torch.equal(text[:, 1:], follows[:, :-1])
    assert recipe.losses(model, (text, follows)).shape == (8,)
    other = text.clone()
    other[:, 20:] = 0
    torch.testing.assert_close(model(text)[:, :20], model(other)[:, :20])  # it does not see what comes later
    rows = {tuple(row.tolist()) for row in text}
    assert not rows & {tuple(row.tolist()) for row in recipe.test_dataset().tensors[0]}


def test_it_runs(tmp_path):
    tiny = {"hessians": ("none", "exact"), "train_size": 60, "test_size": 8, "epochs": 2}
    tiny |= {"ranks": (), "subsets": 4, "fractions": (0.5, 0.9)}
    tiny |= {
        "tasks": ("digits", "adamw"),
        "adamw_hessians": ("ekfac", "exact"),
        "adamw_seeds": (0,),
        "adamw_ranks": (),
        "adamw_subsets": 4,
        "adamw_test_size": 8,
    }
    digits, adamw = fidelity.run({**fidelity.SIZES, **tiny}, tmp_path)
    assert (digits.name, adamw.name) == ("fidelity", "fidelity_adamw")
    scores = [line for line in digits.lines + adamw.lines if line.unit == "LDS"]
    assert [line.what for line in scores][:2] == ["hydra, 50% kept", "hydra-exact, 50% kept"]
    assert [line.what for line in scores][-1] == "AdamW, clipped, seed 0: hydra-exact, 90% kept"
    assert len(scores) == 12
    assert scores[-1].value > 0.5
    assert all(line.met is None for line in scores)  # goals are those of the full sizes


def test_a_benchmark_that_keeps_its_data_goes_on(tmp_path):
    """The second time nothing is trained, and the figures are the same."""
    words = ["fidelity", "--results", str(tmp_path / "results"), "--keep", str(tmp_path / "kept")]
    tiny = {"tasks": ("transformer",), "transformer_hessians": ("none",), "transformer_ranks": ()}
    tiny |= {"less_smooth_methods": ("blend",), "transformer_train_size": 48, "transformer_test_size": 4}
    tiny |= {"less_smooth_subsets": 3, "less_smooth_fractions": (0.5,)}
    for key, value in tiny.items():
        words += ["--size", f"{key}={value!r}"]
    found = []
    for _turn in range(2):
        main(words, Console(file=io.StringIO()))
        lines = json.loads((tmp_path / "results" / "fidelity_transformer.json").read_text())["lines"]
        found.append([line["value"] for line in lines if line["what"] != "one retraining"])
        made = sorted((tmp_path / "kept" / "fidelity" / "small-transformer").rglob("*.parquet"))
        times = [path.stat().st_mtime_ns for path in made if "/retrain/" in str(path)]
        found.append(times)
    assert found[:2] == found[2:]
    assert [line["what"] for line in lines][:2] == ["hydra, 50% kept", "blend, 50% kept"]
    assert len(found[1]) == 4
