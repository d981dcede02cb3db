"""What is kept of a row: chosen parameters, folded ones, and what that does to inner products."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import SpecError
from hydra_pipe.storage.trajectory import ParameterEntry
from hydra_pipe.workers.model.row_map import Folds, RowMap

SHAPES = {"body.0.weight": (30, 20), "body.0.bias": (30,), "head.weight": (4, 30), "head.bias": (4,)}
D = 600 + 30 + 120 + 4


def entries() -> list[ParameterEntry]:
    found, start = [], 0
    for name, shape in SHAPES.items():
        found.append(ParameterEntry(name=name, shape=shape, group=0, start=start))
        start += int(np.prod(shape))
    return found


def made(layers=None, project=None, seed=0) -> RowMap:
    found = RowMap.of(entries(), layers, project, seed)
    assert found is not None
    return found


def rows(count: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, D))


def by_hand(kept: RowMap, row: np.ndarray) -> np.ndarray:
    """As the documentation tells it, from what the store says of itself."""
    told, found = kept.told(), []
    starts = {entry.name: entry.start for entry in entries()}
    for parameter in told["parameters"]:
        name, size, k = parameter["name"], parameter["size"], parameter["kept"]
        values = row[starts[name] : starts[name] + size]
        if k == size:
            found.append(values)
            continue
        seed = hashlib.sha256(f"{told['seed']}/{name}".encode()).digest()[:16]
        words = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(-(-size // 64))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8))[:size]
        out = np.zeros(k)
        for a in range(size):
            out[a % k] += values[a] if bits[a] else -values[a]
        found.append(out)
    return np.concatenate(found)


def test_rows_are_what_the_documentation_says_of_them():
    kept = made(project=120, seed=7)
    assert kept.columns <= 120
    assert [part.folded for part in kept.parts] == [True, False, True, False]
    block = rows(3)
    found = kept.apply(block)
    np.testing.assert_allclose(found, [by_hand(kept, row) for row in block], atol=1e-12)
    spans = {entry.name: (entry.start, entry.shape) for entry in kept.kept_entries()}
    assert spans["body.0.bias"] == (kept.parts[0].kept, (30,))
    np.testing.assert_array_equal(found[:, kept.parts[1].span], block[:, 600:630])
    for k, entry in enumerate(entries()):
        one = block[0, entry.start : entry.start + kept.parts[k].size]
        np.testing.assert_allclose(kept.apply_part(k, one), found[0, kept.parts[k].span], atol=1e-12)


def test_a_row_has_the_same_bits_whatever_comes_with_it():
    kept, block = made(project=100), rows(16).astype(np.float32)
    whole = kept.apply(block)
    np.testing.assert_array_equal(kept.apply(block[5:8]), whole[5:8])
    np.testing.assert_array_equal(block, rows(16).astype(np.float32))


def test_blocks_may_have_other_columns():
    kept, block = made(layers=["head", "body.0.weight"], project=90), rows(4)
    place = [0, None, 600, 720]
    given = torch.from_numpy(np.delete(block, np.s_[600:630], axis=1))
    found = Folds(kept, torch.float64, torch.device("cpu"), place).apply_(given)
    np.testing.assert_array_equal(found.numpy(), kept.apply(block))


def test_inner_products_are_kept_in_expectation_and_as_exactly_as_promised():
    left, right = rows(1)[0], rows(1, seed=6)[0]
    right = right + 0.3 * left
    products = []
    for seed in range(400):
        kept = made(layers=["body.0.weight"], project=61, seed=seed)
        a, b = kept.apply(np.stack([left, right]))
        products.append(float(a @ b))
    x, y = left[:600], right[:600]
    spread = np.sqrt(((x @ x) * (y @ y) + (x @ y) ** 2) / kept.columns)
    assert kept.columns == 61
    assert abs(np.mean(products) - x @ y) < 4 * spread / np.sqrt(400)
    assert 0.7 * spread < np.std(products) < 1.15 * spread


def test_layers_are_chosen_by_patterns():
    assert made(layers=["head"]).columns == 124
    assert made(layers=["*.bias"]).columns == 34
    both = made(layers=["head.weight", "body.?.bias"])
    block = rows(2)
    expanded = both.expand(both.apply(block))
    np.testing.assert_array_equal(expanded[:, 600:750], block[:, 600:750])
    assert not expanded[:, :600].any()
    assert RowMap.of(entries(), None, None, 0) is None


@pytest.mark.parametrize(
    ("layers", "project", "text"),
    [
        (["tail.*"], None, r"layers 'tail\.\*': fits no parameter of the model; it has body\.0\.weight"),
        (None, D, f"project {D}: a row has {D} numbers .*leave it out, or use a smaller number"),
        (["head"], 130, "project 130: a row has 124 numbers"),
        (None, 3, "project 3: 4 parameters are kept, each in at least one number; use 4 or more"),
    ],
)
def test_what_cannot_be_is_refused(layers, project, text):
    with pytest.raises(SpecError, match=text):
        RowMap.of(entries(), layers, project, 0)
