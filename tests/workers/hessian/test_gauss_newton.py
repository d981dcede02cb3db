"""Products with the Gauss-Newton matrix: right against an explicit J^T H J, refused where they mean nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.determinism import derived_seed, seed_everything
from hydra_pipe.workers.hessian.gauss_newton import GaussNewton, GaussNewtonTile, Mixed, MixedTile, mixture
from hydra_pipe.workers.hessian.second_order import SecondOrder
from hydra_pipe.workers.hessian.tiles import TILE, HessianTiles
from hydra_pipe.workers.model.state import load_buffers, pack_buffers
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.exact import ExactRows
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn
from torch.utils.data import TensorDataset

from tests import oracle
from tests.recipes import Attention, Augmented, BatchNormed, Images, Sequences, Small, TwoGroups

DOUBLE = Compute(dtype="float64", device="cpu", batch_norm="coupled")
SINGLE = Compute(dtype="float32", device="cpu", batch_norm="coupled")
TRACKED = np.array([0, 3, 17, 43])


class Linear(Small):
    def model(self):
        return nn.Linear(6, 3)


@dataclass
class Returned:
    logits: torch.Tensor
    note: str
    hidden: tuple


class Mapping(OrderedDict):
    """A mapping that torch's trees do not know."""


class Around(nn.Module):
    def __init__(self, inner, outputs):
        super().__init__()
        self.inner, self.outputs = inner, outputs

    def forward(self, x):
        return self.outputs(self.inner(x), x)


class Dressed(Small):
    """The outputs lie in something."""

    def __init__(self, kind="dict"):
        self.kind = kind

    def model(self):
        dress = {
            "dict": lambda o, x: {"logits": o, "hidden": [2 * o, x, 3]},
            "tuple": lambda o, x: (o, [2 * o, x]),
            "dataclass": lambda o, x: Returned(logits=o, note="n", hidden=(2 * o, x)),
            "mapping": lambda o, x: Mapping(logits=o, hidden=[2 * o, x]),
        }
        return Around(super().model(), dress[self.kind])

    def losses(self, model, batch):
        found = model(batch[0])
        if isinstance(found, tuple):
            logits, hidden = found
        elif isinstance(found, dict):
            logits, hidden = found["logits"], found["hidden"]
        else:
            logits, hidden = found.logits, found.hidden
        return F.cross_entropy(logits, batch[1], reduction="none") + 0.1 * hidden[0].square().sum(1)


class Twice(Small):
    """The model is called twice, and its outputs meet in the losses."""

    def losses(self, model, batch):
        one, other = model(batch[0]), model(batch[0] + 0.1)
        apart = (one.softmax(1) - other.softmax(1)).square().sum(1)
        return F.cross_entropy(one, batch[1], reduction="none") + apart


class InPlace(Small):
    """Random numbers before and after the model, whose output is changed in place."""

    def losses(self, model, batch):
        outputs = model(batch[0] + 0.1 * torch.randn_like(batch[0]))
        outputs[:, 0] *= 0.5
        return F.cross_entropy(outputs + 0.1 * torch.randn_like(outputs), batch[1], reduction="none")


class Detached(Small):
    """A weight that is no part of the gradient."""

    def losses(self, model, batch):
        found = super().losses(model, batch)
        return found * (1 - torch.exp(-found)).detach()


class _OnceOnly(torch.autograd.Function):
    """Forward mode and a first backward pass, no second."""

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
        with torch.no_grad():
            return 3 * x.detach() ** 2 * d.detach()

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


class _WrongForward(_OnceOnly):
    """A rule for forward mode that is wrong, and right ones backwards."""

    @staticmethod
    def backward(ctx, d):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * d

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 2 * x**2 * tangent


class Cube(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


class OnceOnly(Small):
    function = _OnceOnly

    def model(self):
        return nn.Sequential(nn.Linear(6, 5), Cube(self.function), nn.Linear(5, 3))

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class WrongForward(OnceOnly):
    function = _WrongForward


class Last(nn.Module):
    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x):
        found = self.layer(x)
        return self.head((found[0] if isinstance(found, tuple) else found)[:, -1])


class Steps(Small):
    def train_dataset(self):
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(
            torch.randn(45, 5, 6, generator=generator), torch.randint(0, 3, (45,), generator=generator)
        )


class Recurrent(Steps):
    def model(self):
        return Last(nn.LSTM(6, 4, batch_first=True), 4)


class _Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 18)

    def forward(self, x):
        query, key, value = self.mix(x).view(len(x), 5, 3, 2, 3).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return found.transpose(1, 2).reshape(len(x), 5, 6)


class Fused(Steps):
    def model(self):
        return Last(_Fused(), 6)


class Half(Small):
    def losses(self, model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(batch[0])
        return F.cross_entropy(outputs.float(), batch[1], reduction="none")


def explicit(training, step, batch):
    """Return J^T H_out J (D, D) by one backward pass an entry of the outputs, and one more of the losses."""
    model, outputs = training.model, []
    hook = model.register_forward_hook(lambda _m, _a, returned: _begun(returned, outputs))
    kept = pack_buffers(model)
    seed_everything(derived_seed(training.recipe.seed, "step", step))
    loss = training.recipe.losses(model, batch).mean()
    hook.remove()

    def rows(values, inputs):
        found = []
        for value in values:
            parts = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(i) if p is None else p for p, i in zip(parts, inputs, strict=True)]
            found.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(found)

    slope = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
    used = [(o, s) for o, s in zip(outputs, slope, strict=True) if s is not None]
    outputs = [o for o, _ in used]
    jacobian = rows([entry for o in outputs for entry in o.reshape(-1)], training.parameters)
    bend = rows([entry for _, s in used for entry in s.reshape(-1)], outputs)
    load_buffers(model, kept)
    return jacobian.T @ bend @ jacobian


def _begun(returned, outputs):
    """Return a copy whose tensors are noted, none made of another."""
    if isinstance(returned, torch.Tensor):
        if not returned.requires_grad:
            return returned
        outputs.append(returned.clone())
        return outputs[-1].clone()
    if isinstance(returned, dict):
        return type(returned)({key: _begun(value, outputs) for key, value in returned.items()})
    if isinstance(returned, (tuple, list)):
        return type(returned)(_begun(value, outputs) for value in returned)
    if isinstance(returned, Returned):
        return Returned(*(_begun(value, outputs) for value in vars(returned).values()))
    return returned


def batch_of(training, step):
    (batch,) = list(training.loader(step, step + 1))
    return batch


def product(way, vectors):
    out = torch.full_like(vectors, np.nan)
    return out, way.tile(vectors, out)


def near(found, right, tolerance=1e-11):
    return bool((found - right).abs().max() <= tolerance * right.abs().max())


def recorded(recipe, tmp_path, compute=DOUBLE, every=None):
    uri = str(tmp_path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri, every).run()
    return open_trajectory(uri)


KINDS = [Small, TwoGroups, Images, BatchNormed, Sequences, Attention, Augmented, Fused, Twice, Linear]
MADE = [kind() for kind in KINDS] + [Dressed(kind) for kind in ("dict", "tuple", "dataclass", "mapping")]


@pytest.mark.parametrize("recipe", MADE, ids=lambda r: f"{type(r).__name__}{getattr(r, 'kind', '')}")
def test_both_ways_and_mixtures_are_the_explicit_matrices(recipe):
    training = Training(recipe, DOUBLE)
    tiles = HessianTiles(training, share=0.0)
    assert tiles.kind is GaussNewtonTile
    assert tiles.choice == f"{TILE} directions at a time"
    before = copy.deepcopy(training.model.state_dict())
    step = training.steps - 1
    batch = batch_of(training, step)
    vectors = torch.randn(3, training.layout.dimension, dtype=torch.float64)
    matrix = explicit(training, step, batch)
    hessian, slopes = product(SecondOrder(training, step, batch), vectors)
    for kind in (GaussNewtonTile, GaussNewton):
        found, values = product(kind(training, step, batch), vectors)
        assert near(found, vectors @ matrix)
        assert near(values, slopes)
    for share in (0.25, 0.9):
        right = share * hessian + (1 - share) * vectors @ matrix
        chosen = HessianTiles(training, share=share).kind
        assert issubclass(chosen, MixedTile)
        for kind in (chosen, mixture(Mixed, share)):
            found, values = product(kind(training, step, batch), vectors)
            assert near(found, right)
            assert near(values, slopes)
    after = training.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_random_numbers_around_the_model_are_those_of_the_step():
    training = Training(InPlace(), DOUBLE)
    batch = batch_of(training, 1)
    vectors = torch.randn(3, training.layout.dimension, dtype=torch.float64)
    hessian, slopes = product(SecondOrder(training, 1, batch), vectors)
    plain, values = product(HessianTiles(training, share=0.0).at(1, batch), vectors)
    assert near(values, slopes)
    mixed, _ = product(HessianTiles(training, share=0.5).at(1, batch), vectors)
    assert near(mixed, 0.5 * hessian + 0.5 * plain)
    assert not near(plain, hessian, 1e-3)


def test_a_replay_is_the_recursion_with_the_explicit_matrix(tmp_path):
    """Forward and adjoint against ``oracle.dense`` with J^T H J of every step, in float64."""
    recipe = TwoGroups()
    trajectory = recorded(recipe, tmp_path, every=1)
    training = Training(recipe, DOUBLE)
    matrices = []
    for step, batch in enumerate(training.loader()):
        kept = trajectory.checkpoint(step)
        assert kept.step == step
        training.load_weights(kept.weights, kept.buffers)
        matrices.append(explicit(training, step, batch).numpy())
    right = oracle.dense(
        recipe, trajectory, TRACKED, batch_norm="coupled", curvature=lambda step, du: matrices[step] @ du
    ).hypergradient
    rows = make(recipe, trajectory, share=0.0).run().numpy(0, 4)
    assert oracle.relative_error(rows, right) < 1e-12
    vectors = np.random.default_rng(0).standard_normal((3, rows.shape[1]))
    back = Adjoint(Training(recipe, DOUBLE), trajectory, TRACKED, vectors, share=0.0).run().contributions()
    along = vectors @ right.T
    assert np.abs(-back * 45 - along).max() < 1e-12 * np.abs(along).max()
    exact = make(recipe, trajectory, share=1.0).run().numpy(0, 4)
    assert oracle.relative_error(rows, exact) > 0.01  # a test of the test


def make(recipe, trajectory, share, compute=DOUBLE, tracked=TRACKED):
    def sink(*given):
        return ExactRows(*given, share=share)

    return Replay(Training(recipe, compute), trajectory, tracked, sink)


def test_the_matrix_of_a_linear_model_is_the_hessian(tmp_path):
    recipe = Linear()
    trajectory = recorded(recipe, tmp_path)
    rows = {share: make(recipe, trajectory, share).run().numpy(0, 4) for share in (1.0, 0.0, 0.5)}
    assert oracle.relative_error(rows[0.0], rows[1.0]) < 1e-13
    assert oracle.relative_error(rows[0.5], rows[1.0]) < 1e-13


@pytest.mark.parametrize(("kind", "share"), [(Images, 0.0), (BatchNormed, 0.5)])
def test_forward_equals_adjoint_and_rows_do_not_see_each_other(kind, share, tmp_path):
    recipe = kind()
    trajectory = recorded(recipe, tmp_path, SINGLE)
    tracked = np.arange(0, 44, 4)
    every = make(recipe, trajectory, share, SINGLE, tracked).run().numpy(0, len(tracked))
    for chosen in ([1, 3, 8], [10]):
        part = make(recipe, trajectory, share, SINGLE, tracked[chosen]).run().numpy(0, len(chosen))
        assert np.array_equal(part, every[chosen])
    vectors = np.random.default_rng(0).standard_normal((3, every.shape[1])).astype(np.float32)
    back = Adjoint(Training(recipe, SINGLE), trajectory, tracked, vectors, share=share).run()
    forward = -(vectors @ every.T) / len(recipe.train_dataset())
    assert np.abs(forward - back.contributions()).max() < 1e-3 * np.abs(forward).max()


def test_a_model_without_a_second_derivative_will_do():
    training = Training(OnceOnly(), DOUBLE)
    with pytest.raises(RecipeError, match="exact tangents of this recipe cannot be had"):
        HessianTiles(training, transposed=True)
    tiles = HessianTiles(training, share=0.0)
    assert tiles.kind is GaussNewtonTile
    assert tiles.fallback is None  # one direction at a time takes a second backward pass
    batch = batch_of(training, 0)
    vectors = torch.randn(3, training.layout.dimension, dtype=torch.float64)
    assert near(product(tiles.at(0, batch), vectors)[0], vectors @ explicit(training, 0, batch))
    with pytest.raises(RecipeError, match="exact tangents"):
        HessianTiles(training, share=0.5)


def test_a_wrong_rule_for_forward_mode_is_not_believed():
    training = Training(WrongForward(), DOUBLE)
    tiles = HessianTiles(training, share=0.0)
    assert tiles.kind is GaussNewton
    assert "the outputs' derivative is not the transpose of backward's" in tiles.choice
    batch = batch_of(training, 0)
    vectors = torch.randn(2, training.layout.dimension, dtype=torch.float64)
    assert near(product(tiles.at(0, batch), vectors)[0], vectors @ explicit(training, 0, batch))


def test_layers_without_forward_mode_go_one_direction_at_a_time():
    """An LSTM in float32; in float64 it has one."""
    training = Training(Recurrent(), SINGLE)
    tiles = HessianTiles(training, share=0.0)
    batch = batch_of(training, 0)
    vectors = torch.randn(2, training.layout.dimension)
    assert near(product(tiles.at(0, batch), vectors)[0], vectors @ explicit(training, 0, batch), 1e-4)


def test_products_leave_autocast_out(tmp_path):
    """They are those of the same losses in the run's own precision, whatever training rounds."""
    training, plain = Training(Half(), SINGLE), Training(Small(), SINGLE)
    tiles = HessianTiles(training, share=0.0)
    batch = batch_of(training, 0)
    vectors = torch.randn(2, training.layout.dimension)
    right = product(HessianTiles(plain, share=0.0).at(0, batch), vectors)[0]
    found = product(tiles.at(0, batch), vectors)[0]
    assert torch.equal(found, right)
    with torch.no_grad():
        assert not torch.equal(training.losses(batch, len(batch[1])), plain.losses(batch, len(batch[1])))


def test_what_the_losses_detach_is_a_constant():
    training = Training(Detached(), DOUBLE)
    tiles = HessianTiles(training, share=0.0)
    assert tiles.told()["matrix"].endswith("what the losses detach counts as a constant")
    batch = batch_of(training, 0)
    vectors = torch.randn(2, training.layout.dimension, dtype=torch.float64)
    assert near(product(tiles.at(0, batch), vectors)[0], vectors @ explicit(training, 0, batch))
    with pytest.raises(RecipeError, match="something is detached"):
        HessianTiles(training, share=0.5)


def _layer_by_layer(_self, model, batch):
    x = batch[0]
    for layer in model:
        x = layer(x)
    return F.cross_entropy(x, batch[1], reduction="none")


def _penalty(self, model, batch):
    found = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return found + 1e-3 * sum(p.square().sum() for p in model.parameters())


def _first_layer(_self, model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") + model[0](batch[0]).square().sum(1)


def _chained(_self, model, batch):
    first = model(batch[0])
    again = model(torch.cat([first, first], 1))
    return F.cross_entropy(again, batch[1], reduction="none")


def _linear(_self, model, batch):
    return model(batch[0]).sum(1)


def _ctc(_self, model, batch):
    scores = model(batch[0])[:, None].repeat(1, 5, 1).log_softmax(-1).transpose(0, 1)
    count = scores.shape[1]
    labels = batch[1].clamp(1, 2)[:, None]
    return F.ctc_loss(scores, labels, torch.full((count,), 5), torch.ones(count).long(), reduction="none")


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (_layer_by_layer, r"losses\(\) does not call the model; call it: outputs = model\(inputs\)"),
        (
            _penalty,
            "parameter '0.weight' reaches the losses otherwise than .* let weight_decay be the penalty",
        ),
        (
            _first_layer,
            "parameter '0.weight' reaches the losses otherwise than .* do all .* in the model's forward",
        ),
        (_chained, "parameter '.*' reaches the losses otherwise than"),
        (_linear, "the losses are linear in what the model returns, .* let the model return its outputs"),
        (_ctc, "the losses have no second derivative with respect to what the model returns"),
    ],
)
def test_losses_that_are_no_function_of_the_outputs_are_refused_by_name(losses, said):
    kind = type("Odd", (Small,), {"losses": losses})
    with pytest.raises(RecipeError, match=said) as caught:
        HessianTiles(Training(kind(), DOUBLE), share=0.0)
    assert "\n" not in str(caught.value)
    assert "otherwise use --hessian exact, ekfac or none" in str(caught.value)


def test_outputs_that_nobody_can_see_are_refused_by_name():
    class Box:
        def __init__(self, logits):
            self.logits = logits

    class Hidden(Small):
        def model(self):
            return Around(super().model(), lambda o, _x: Box(o))

        def losses(self, model, batch):
            return F.cross_entropy(model(batch[0]).logits, batch[1], reduction="none")

    with pytest.raises(
        RecipeError, match=r"uses no tensor that the model's forward returns; let it return a"
    ):
        HessianTiles(Training(Hidden(), DOUBLE), share=0.0)
