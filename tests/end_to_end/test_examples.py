"""The paper's LeNet-5 on Fashion-MNIST, a corner of it, against the dense form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hydra_pipe.workers.recipes.loading import load_recipe

from tests import oracle
from tests.end_to_end.support import serial

IMAGES = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not IMAGES.is_dir(), reason=f"{IMAGES} is not there")
def test_fashion_mnist_lenet(tmp_path):
    arguments = {"train_size": 200, "test_size": 20, "data_dir": str(IMAGES)}
    tracked = [0, 3, 77, 150, 199]
    finished = serial(
        tmp_path / "run", "fashion-mnist", recipe_args=arguments, epochs=1, track=tracked, shards=2
    )
    recipe = load_recipe("fashion-mnist", arguments)
    recipe.epochs = 1
    right = oracle.dense(recipe, finished.trajectory(), tracked)
    assert oracle.relative_error(finished.hypergradients()[:], right.hypergradient) <= oracle.DENSE_FLOAT32
    gradients = oracle.test_gradients(recipe, right.model, range(20))
    expected = oracle.contributions(right.hypergradient, gradients, 200)
    rows = finished.contributions().to_table().to_pylist()
    found = np.zeros((5, 20))
    for row in rows:
        found[tracked.index(row["train_index"]), row["test_index"]] = row["contribution"]
    assert len(rows) == found.size
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    """Without Jupyter: its code cells, one after the other."""
    monkeypatch.chdir(tmp_path)
    held = json.loads(notebook.read_text(encoding="utf-8"))
    cells = [cell for cell in held["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)  # nothing stale
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{notebook.name}[{number}]", "exec"), names)  # noqa: S102
    page = (tmp_path / "decisions.html").read_text(encoding="utf-8")
    assert 'id="test-3"' in page
    assert 'id="decision"' in page


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["decisions.ipynb"]
