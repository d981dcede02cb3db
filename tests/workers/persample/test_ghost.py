"""Products with targets without gradients: those of gradients that were formed, for every way of calling a layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.workers.persample import ghost
from hydra_pipe.workers.persample.engine import PerSampleGradients
from hydra_pipe.workers.persample.ghost import GhostProducts, convolved
from hydra_pipe.workers.persample.targets import TargetTile, multiples, outer_factors
from hydra_pipe.workers.persample.ways import always_vjp
from hydra_pipe.workers.recursion.clipping import Clip
from hydra_pipe.workers.training.training import Compute, Training
from hydra_pipe.workers.training.trials import tried_ways
from torch import nn

from tests.layer_recipes import CASES, recipe_of
from tests.recipes import BatchNormed, Small

DOUBLE = Compute(dtype="float64", device="cpu")
REFUSED = {"torch.nn.utils.weight_norm", "checkpoint, use_reentrant=True"}
ALIKE = ("compile", "dropout", "sdpa")
"""Cases with the same layers as others."""
POSITIONS = ([0, 1, 2, 3], [0, 2])


class Made:
    """A recipe's first step, taken anew for each way to look at it."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.layout = Training(recipe, DOUBLE).layout
        self.ways = tried_ways(Training(recipe, DOUBLE))

    def step(self, positions, make):
        training = Training(self.recipe, DOUBLE)
        engine, found = make(training), []
        watch = engine.watch(torch.tensor(positions), lambda _start, block: found.append(block.clone()))
        training.step(0, next(iter(training.loader())), watch)
        engine.close()
        return torch.cat(found)

    def rows(self, positions):
        return self.step(positions, lambda t: PerSampleGradients(t.recipe, t.model, t.layout, self.ways))

    def products(self, positions, targets, *, scales=None, weights=None, clip=None, tile=2):
        def make(training):
            engine = GhostProducts(
                training.recipe, training.model, training.layout, self.ways,
                targets_QD=targets, tile=tile, weighed=weights is not None,
            )  # fmt: skip
            engine.scales = scales or engine.scales
            engine.weigh(weights)
            if clip:
                engine.clips(clip.gradient, clip.share, clip.factor)
            self.tiles = engine.tiles
            return engine

        return self.step(positions, make)


@pytest.fixture(scope="module")
def made():
    kept = {}

    def get(case):
        if any(name in case for name in ("GPT-2", "BERT", "Llama")):
            pytest.importorskip("transformers")
        if case not in kept:
            kept[case] = Made(recipe_of(case))
        return kept[case]

    return get


def draw(*shape):
    return torch.from_numpy(np.random.default_rng(len(shape)).standard_normal(shape))


def close(found, right):
    assert found.shape == right.shape
    assert float((found - right).abs().max()) <= 1e-12 * float(right.abs().max())


@pytest.mark.parametrize(
    "case", sorted(c for c in CASES.keys() - REFUSED if not any(word in c for word in ALIKE))
)
def test_they_are_the_products_with_rows(case, made):
    one = made(case)
    rows = one.rows(POSITIONS[0])
    targets = torch.cat([draw(3, one.layout.dimension), rows[:2]])  # the last are what test samples have
    scales = [0.5 + i % 3 for i in range(len(one.layout.entries))]
    each = one.layout.column_groups([2 * s for s in scales]).double() / 2
    for positions in POSITIONS:
        right = (rows[positions] * each) @ targets.T
        close(one.products(positions, targets, scales=scales), right)


@pytest.mark.parametrize(
    "case", ["MultiheadAttention", "LSTM", "channels_last", "EmbeddingBag, sum", "GPT-2, mask"]
)
@pytest.mark.parametrize("count", [1, 40])
def test_few_and_many_targets_clipping_and_weights(case, count, made):
    one = made(case)
    rows, targets = one.rows(POSITIONS[0]), draw(count, one.layout.dimension)
    weights = draw(one.layout.dimension).abs()
    gradient = rows.mean(0)
    norm = float(gradient.norm())
    clip = Clip(gradient=gradient, norm=norm, factor=0.5)
    scales = [0.0 if i == 1 else 1.0 for i in range(len(one.layout.entries))]
    each = one.layout.column_groups([int(s) for s in scales]).double()
    clipped = clip.map_(rows.clone())
    for positions in POSITIONS:
        given = {"scales": scales, "tile": 64}
        close(one.products(positions, targets, **given), (rows[positions] * each) @ targets.T)
        found = one.products(positions, targets, clip=clip, **given)
        close(found, (clipped[positions] * each) @ targets.T)
        found = one.products(positions, targets, clip=clip, weights=weights, **given)
        close(found, (clipped[positions] * each * weights) @ targets.T)


def test_test_samples_of_linear_layers_are_kept_as_factors_and_means_are_not(made):
    one = Made(Small())
    rows = one.rows(range(8))
    weights = [i for i, way in enumerate(one.ways.strategies) if way == "outer"]
    assert weights
    close(one.products(range(8), rows[:4], tile=4), rows @ rows[:4].T)
    (tile,) = one.tiles
    assert set(tile.factors) == set(tile.ratios) == set(weights)
    means = torch.stack([rows[:4].mean(0), rows[4:].mean(0)])
    close(one.products(range(8), means), rows @ means.T)
    assert not one.tiles[0].factors
    clip = Clip(gradient=rows.mean(0), norm=float(rows.mean(0).norm()), factor=0.7)
    close(one.products([1, 5], rows[:4], clip=clip), clip.map_(rows[[1, 5]].clone()) @ rows[:4].T)
    one.ways = always_vjp(one.layout)
    close(one.products([0, 3], rows[:4]), rows[[0, 3]] @ rows[:4].T)


def test_a_tile_has_the_same_bits_whatever_other_tiles_there_are():
    one = Made(Small())
    rows = one.rows(range(8))
    targets = torch.cat([rows.repeat(2, 1)[:5], draw(5, one.layout.dimension)])
    again = [one.products(range(8), targets[first:], tile=4)[:, -2:] for first in (0, 4, 8)]
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[0], again[2])


def test_factors_are_kept_only_where_they_are_the_gradient_to_rounding():
    d, x = draw(3, 4).float(), draw(3, 5).float()
    d[2], matrix = 0, torch.einsum("qo,qi->qoi", d, x)
    matrix[2] = 0
    left, right = outer_factors(matrix)
    assert torch.allclose(torch.einsum("oq,iq->qoi", left, right), matrix, rtol=1e-6)
    assert torch.allclose(
        multiples(3 * d[:2], left[:, :2]), 3 / x[:2].gather(1, x[:2].abs().argmax(1, True))[:, 0]
    )
    matrix[1, 2, 3] *= 1 + 1e-5
    assert outer_factors(matrix) is None
    assert multiples(d + 1e-5, left) is None
    layout = Training(Small(), DOUBLE).layout
    whole = TargetTile(draw(2, layout.dimension), layout)
    vector = draw(layout.dimension)
    parts = [vector[e.start : e.start + layout.size(i)].view(e.shape) for i, e in enumerate(layout.entries)]
    targets = torch.cat([part.flatten(1) for part in whole.parts], 1)
    close(whole.along(parts, [1.0] * len(parts)), targets @ vector)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 11)),
    "1x1": (nn.Conv2d(5, 2, 1), (5, 4, 4)),
    "1x1, stride": (nn.Conv2d(5, 2, 1, stride=2), (5, 5, 4)),
    "few channels": (nn.Conv2d(1, 2, 3, padding="same"), (1, 9, 9)),
    "many channels": (nn.Conv2d(6, 2, 3, padding=1, dilation=2), (6, 7, 7)),
    "grouped": (nn.Conv2d(6, 4, (2, 3), groups=2, stride=(1, 2)), (6, 7, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 6, 6)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "3d": (nn.Conv3d(2, 3, 2, padding=1, bias=False), (2, 3, 4, 3)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("window", [ghost.WINDOW_BYTES, 2000])
def test_gradients_of_convolutions_are_those_of_autograd(case, window, monkeypatch):
    monkeypatch.setattr(ghost, "WINDOW_BYTES", window)
    module, shape = CONVOLUTIONS[case]
    module.double()
    x = draw(5, *shape)
    out = module(x)
    d = torch.randn_like(out)
    right = [torch.autograd.grad((module(x[k : k + 1]) * d[k]).sum(), module.weight)[0] for k in range(5)]
    for form in (torch.contiguous_format, torch.channels_last if x.ndim == 4 else torch.contiguous_format):
        found = convolved(module, x.contiguous(memory_format=form), d.contiguous(memory_format=form))
        close(found, torch.stack(right))


def test_batch_normalisation_with_constant_statistics():
    one = Made(BatchNormed())
    rows, targets = one.rows(range(8)), draw(3, one.layout.dimension)
    for positions in (range(8), [1, 6]):
        close(one.products(positions, targets), rows[list(positions)] @ targets.T)


class Tables(Small):
    """Tokens of few and of many words, one table with padding."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words

    def arguments(self):
        return {"words": self.words}

    def train_dataset(self):
        drawn = torch.randint(0, self.words, (12, 5), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.TensorDataset(drawn, drawn.sum(1) % 3)

    def model(self):
        return nn.Sequential(
            nn.Embedding(self.words, 4, padding_idx=0),
            nn.Tanh(),
            nn.Linear(4, 7),
            nn.Flatten(),
            nn.Linear(35, 3),
        )

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("words", [3, 200])
@pytest.mark.parametrize("room", [ghost.ROW_BYTES, 600])
def test_tables_are_looked_up_where_words_are_many_and_memory_is_kept(words, room, monkeypatch):
    monkeypatch.setattr(ghost, "ROW_BYTES", room)
    one = Made(Tables(words))
    rows = one.rows(range(6))
    for count in (1, 5, 30):
        targets = draw(count, one.layout.dimension)
        close(one.products(range(6), targets, tile=64), rows @ targets.T)
