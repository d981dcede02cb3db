"""The fidelity benchmark runs at a tiny size, and its task is the one it says."""

from __future__ import annotations

import numpy as np

from benchmarks import fidelity
from benchmarks.digits_mlp import DigitsMLP


def test_the_task_is_the_one_described():
    recipe = DigitsMLP()
    train, test = recipe.train_dataset(), recipe.test_dataset()
    assert sum(p.numel() for p in recipe.model().parameters()) == 2410
    assert (len(train), len(test)) == (1000, 200)
    assert recipe.epochs * -(-len(train) // recipe.batch_size) == 300
    assert len(recipe.noisy_labels(train)[0]) == 100
    assert np.unique(recipe.labels(test)).tolist() == list(range(10))


def test_it_runs(tmp_path):
    tiny = {"hessians": ("none", "exact"), "train_size": 60, "test_size": 8, "epochs": 2}
    tiny |= {"ranks": (), "subsets": 4, "fractions": (0.5, 0.9)}
    result = fidelity.run({**fidelity.SIZES, **tiny}, tmp_path)
    scores = [line for line in result.lines if line.unit == "LDS"]
    assert [line.what for line in scores][:2] == ["hydra, 50% kept", "hydra-exact, 50% kept"]
    assert scores[-1].value > 0.5
    assert all(line.met is None for line in scores)  # goals are those of the full sizes
