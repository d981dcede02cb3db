"""The fast way to Hessian products: taken where it is right, refused where it is not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.hessian import tiles as hessian_tiles
from hydra_pipe.workers.hessian.second_order import GraphedTangentTile, SecondOrder, TangentTile
from hydra_pipe.workers.hessian.tiles import TILE, HessianTiles, activation_bytes, block_width, tile_width
from hydra_pipe.workers.recipes.lenet import LeNet5
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.exact import ExactRows
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn

from tests import oracle
from tests.recipes import TRACEABLE, BatchNormed, Images, Small, TwoGroups, gaussian

EXACT = Compute(dtype="float64", device="cpu", batch_norm="coupled")
SINGLE = Compute(dtype="float32", device="cpu", batch_norm="coupled")


class Digits(Small):
    """LeNet-5, as in the benchmark."""

    epochs, batch_size, shape, classes = 1, 16, (1, 28, 28), 10

    def model(self):
        return LeNet5()


class _Cube(torch.autograd.Function):
    """Twice differentiable backwards, and without any rule for forward mode or batches."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, d):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * d


class _WrongCube(torch.autograd.Function):
    """The same with a forward-mode rule that is wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, d):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * d

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 2 * x**2 * tangent


class _Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


class NoRule(Small):
    function = _Cube

    def model(self):
        return nn.Sequential(nn.Linear(6, 5), _Module(self.function), nn.Linear(5, 3))

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class WrongRule(NoRule):
    function = _WrongCube


def training_of(recipe, compute=EXACT):
    return Training(recipe, compute)


def recorded(recipe, tmp_path, compute=EXACT):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri, None).run()
    return open_trajectory(uri)


def counted(monkeypatch, kind, method):
    """Count the calls of a method from here on."""
    calls = []
    right = getattr(kind, method)

    def count(self, directions, out):
        calls.append(len(directions) if directions.ndim == 2 else 1)
        return right(self, directions, out)

    monkeypatch.setattr(kind, method, count)
    return calls


@pytest.mark.parametrize("count", [1, 3, TILE])
@pytest.mark.parametrize("kind", [*TRACEABLE, Digits], ids=lambda k: k.__name__)
def test_both_ways_give_the_same_numbers(kind, count):
    training = training_of(kind())
    tiles = HessianTiles(training)
    assert tiles.refusal is None
    # The backward pass of GroupNorm must be recorded to have a derivative in forward mode.
    assert tiles.kind is (GraphedTangentTile if kind is Images else TangentTile)
    before = copy.deepcopy(training.model.state_dict())
    step = training.steps - 1
    (batch,) = list(training.loader(step, step + 1))
    vectors = torch.randn(count, training.layout.dimension, dtype=torch.float64)
    fast, slow = torch.empty_like(vectors), torch.empty_like(vectors)
    values = tiles.kind(training, step, batch).tile(vectors, fast)
    right = SecondOrder(training, step, batch).tile(vectors, slow)
    assert (fast - slow).abs().max() <= 1e-11 * slow.abs().max()
    assert (values - right).abs().max() <= 1e-11 * right.abs().max()
    after = training.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("compute", [EXACT, SINGLE], ids=["float64", "float32"])
def test_lenet_takes_the_fast_way(compute, tmp_path, monkeypatch):
    """Fails where the speed is silently lost."""
    recipe = Digits()
    trajectory = recorded(recipe, tmp_path, compute)
    vectors = np.random.default_rng(0).standard_normal((TILE + 1, len(trajectory.checkpoint(0).weights)))
    back = Adjoint(Training(recipe, compute), trajectory, np.arange(45), vectors.astype(compute.dtype))
    ahead = Replay(Training(recipe, compute), trajectory, np.arange(45), ExactRows)
    assert back.tiles.choice == ahead.sink.tiles.choice == f"{TILE} directions at a time"
    tiles = counted(monkeypatch, TangentTile, "tile")
    singles = counted(monkeypatch, SecondOrder, "apply")
    back.run()
    assert tiles == [TILE, 1] * 3
    tiles.clear()
    ahead.run()
    assert tiles == [TILE] * (2 + 4)  # 16 rows move in the second step, 32 in the third
    assert singles == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(NoRule, "torch.func fails: RuntimeError: "), (WrongRule, "differ from those of double backward")],
)
def test_operations_without_right_rules_fall_back_and_are_right(kind, reason, tmp_path, caplog):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path)
    tracked = np.array([0, 3, 17, 43])
    vectors = np.random.default_rng(0).standard_normal((3, len(trajectory.checkpoint(0).weights)))
    right = oracle.unrolled(recipe, trajectory, tracked).along(vectors)
    with caplog.at_level("INFO", logger="hydra_pipe.workers.hessian.tiles"):
        back = Adjoint(Training(recipe, EXACT), trajectory, tracked, vectors)
    assert reason in back.tiles.refusal
    assert f"one direction at a time, because {back.tiles.refusal}" in caplog.text
    ahead = Replay(Training(recipe, EXACT), trajectory, tracked, ExactRows)
    assert ahead.sink.tiles.refusal == back.tiles.refusal
    found = -back.run().contributions() * 45
    assert np.abs(found - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()
    forward = vectors @ ahead.run().numpy(0, 4).T
    assert np.abs(forward - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()


def test_batch_sizes_whose_rows_are_not_alone_go_one_by_one(monkeypatch):
    """Here the last batch of 5: products of odd sizes start at another alignment in every row."""
    training = training_of(TwoGroups(), SINGLE)
    monkeypatch.setattr(hessian_tiles, "dependence", lambda _training, _kind, _width: {5})
    tiles = HessianTiles(training, alone=True)
    assert tiles.refusal is None
    assert "one in batches of 5" in tiles.choice
    batches = list(training.loader(0, training.epoch_ends[0]))
    ways = [type(tiles.at(step, batch).way) for step, batch in enumerate(batches)]
    assert ways == [TangentTile] * 5 + [SecondOrder]
    assert HessianTiles(training).slow_sizes == set()


def test_large_activations_take_narrower_tiles_or_none(monkeypatch):
    training = training_of(Images())
    held = activation_bytes(training)
    batch = next(iter(training.loader()))
    outputs = 8 * (6 * 5 * 5 + 4 * 3 * 4) * 8  # two of the layers' outputs, 8 bytes each
    assert outputs < held < 10 * outputs
    for room, width in ((8, 8), (9, 8), (5, 5), (4, 4), (3.9, 1), (0, 1)):
        monkeypatch.setattr(hessian_tiles, "TANGENT_BYTES", int(room * hessian_tiles.HELD * held))
        assert tile_width(held) == width
    assert "4 directions at a time need" in HessianTiles(training).refusal
    vectors = torch.randn(7, training.layout.dimension, dtype=torch.float64)
    right = torch.empty_like(vectors)
    values = SecondOrder(training, 0, batch).tile(vectors, right)
    monkeypatch.setattr(hessian_tiles, "TANGENT_BYTES", 5 * hessian_tiles.HELD * held)
    for alone in (False, True):  # tiles of 5 and 2, the second padded or not
        out = torch.full_like(vectors, np.nan)
        found = HessianTiles(training, alone=alone).at(0, batch).tile(vectors, out)
        assert (out - right).abs().max() <= 1e-11 * right.abs().max()
        assert (found - values).abs().max() <= 1e-11 * values.abs().max()


def test_small_activations_take_wider_tiles(monkeypatch):
    near = hessian_tiles.NEAR_BYTES // hessian_tiles.HELD
    for activations, width in ((0, 64), (near // 64, 64), (near // 63, 32), (near // 9, 8), (near // 4, 8)):
        assert tile_width(activations) == width
    assert block_width(10**12) == TILE  # where directions go one at a time they are still carried together
    monkeypatch.setattr(hessian_tiles, "TANGENT_BYTES", 40 * hessian_tiles.HELD * 1000)
    assert tile_width(1000) == 32


def test_a_wide_tile_of_targets_is_right_and_its_bits_are_its_own(tmp_path):
    recipe = Small()
    trajectory = recorded(recipe, tmp_path)
    vectors = np.random.default_rng(0).standard_normal((70, len(trajectory.checkpoint(0).weights)))

    def carried(targets, tile):
        back = Adjoint(Training(recipe, EXACT), trajectory, np.arange(45), targets, tile=tile)
        assert back.tiles.width == tile
        return back.run().contributions()

    wide, narrow = carried(vectors, 64), carried(vectors, TILE)
    assert np.abs(wide - narrow).max() < 1e-11 * np.abs(narrow).max()
    assert np.array_equal(carried(vectors[64:], 64), wide[64:])  # another shard of whole tiles


def test_the_choice_leaves_weights_buffers_and_generators_alone():
    training = training_of(BatchNormed())
    before = copy.deepcopy(training.model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    HessianTiles(training, alone=True)
    assert torch.equal(torch.get_rng_state(), state)
    after = training.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_last_batch_is_tried_too(tmp_path):
    class Moody(Small):
        """Its losses do something else where the batch is small."""

        def losses(self, model, batch):
            found = super().losses(model, batch)
            return _Cube.apply(found) if len(found) == 5 else found

    tiles = HessianTiles(training_of(Moody()))
    assert tiles.kind is SecondOrder
    assert tiles.refusal.startswith("torch.func fails")


def test_a_step_that_no_trial_saw_goes_one_direction_at_a_time(tmp_path, caplog):
    class Moody(Small):
        """Its losses do something else where sample 13 is in the batch: neither the first nor the last."""

        def train_dataset(self):
            data = super().train_dataset()
            data.tensors[0][13, 0] = 50.0
            return data

        def losses(self, model, batch):
            found = super().losses(model, (torch.tanh(batch[0]), batch[1]))
            return _Cube.apply(found) if bool((batch[0][:, 0] > 40).any()) else found

    recipe = Moody()
    trajectory = recorded(recipe, tmp_path)
    first, last = trajectory.batches[0], trajectory.batches[5]
    assert 13 not in [*first, *last]
    tracked = np.array([0, 3, 13, 43])
    vectors = np.random.default_rng(0).standard_normal((3, len(trajectory.checkpoint(0).weights)))
    right = oracle.unrolled(recipe, trajectory, tracked).along(vectors)
    with caplog.at_level("INFO", logger="hydra_pipe.workers.hessian.tiles"):
        back = Adjoint(Training(recipe, EXACT), trajectory, tracked, vectors)
        found = -back.run().contributions() * 45
    assert back.tiles.kind is TangentTile
    assert "one direction at a time at step" in caplog.text
    assert np.abs(found - right).max() < oracle.EXACT_FLOAT64 * np.abs(right).max()


def test_rows_of_padding_count_as_constants():
    class Padded(Small):
        def model(self):
            return nn.Sequential(
                nn.Embedding(11, 6, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(30, 3)
            )

        def train_dataset(self):
            tokens = torch.randint(0, 11, (45, 5), generator=torch.Generator().manual_seed(1))
            return torch.utils.data.TensorDataset(tokens, gaussian(45, (1,), 3, 1).tensors[1])

    training = training_of(Padded())
    assert HessianTiles(training).refusal is None
