"""Training that starts from given weights and momentum: loaded by name, differentiated right, refused in one line."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from hydra_pipe.pipeline.verify.conservation import compare
from hydra_pipe.storage.errors import ConservationBroken, InputError, RecipeError
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.recipe import InitialState
from hydra_pipe.workers.recursion.conservation import RowSums, check_sums, law_of
from hydra_pipe.workers.reference.dense import DenseReference
from hydra_pipe.workers.replay.adjoint import Adjoint
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.exact import ExactRows
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.initial import StateFile, load_optimizer, load_weights, read_weights
from hydra_pipe.workers.training.made_of import differences, made_of
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn

from tests import oracle
from tests.recipes import BatchNormed, Dampened, Nesterov, OneCycle, Plain, Small, TwoGroups

DOUBLE = Compute(dtype="float64", device="cpu")
COUPLED = Compute(dtype="float64", device="cpu", batch_norm="coupled")
TRACKED = np.array([0, 4, 17, 43])


def trained(kind, steps=7, *, momentum=True):
    """What a loop by hand comes to after some steps: its state_dict and the optimiser's."""
    recipe = kind()
    torch.manual_seed(11)
    model = recipe.model().double()
    optimizer = recipe.optimizer(model)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        batch = [recipe.train_dataset()[i] for i in range(5 * step, 5 * step + 5)]
        recipe.losses(
            model, (torch.stack([x for x, _ in batch]).double(), torch.stack([y for _, y in batch]))
        ).mean().backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()) if momentum else None


def starting(kind, weights, optimizer=None):
    class Starting(kind):
        epochs = 2

        def initial_state(self):
            return InitialState(weights=weights, optimizer=optimizer)

    return Starting()


def recorded(recipe, path, compute=DOUBLE):
    uri = str(path / "trajectory.zarr")
    Recorder(Training(recipe, compute), uri, 5).run()
    return open_trajectory(uri)


@pytest.mark.parametrize("kind", [Dampened, TwoGroups, OneCycle, Plain], ids=lambda k: k.__name__)
def test_every_form_agrees_with_autograd_through_training_from_given_weights_and_momentum(kind, tmp_path):
    weights, optimizer = trained(kind)
    recipe = starting(kind, weights, optimizer)
    trajectory = recorded(recipe, tmp_path)
    first = trajectory.checkpoint(0)
    names = [entry.name for entry in trajectory.parameters]
    assert np.array_equal(first.weights, torch.cat([weights[name].reshape(-1) for name in names]).numpy())
    assert first.has_momentum.any() == (kind is not Plain)
    assert ("begun" in trajectory.optimizer) == (kind is not Plain)
    vectors = np.random.default_rng(0).standard_normal((3, len(first.weights)))
    right = oracle.unrolled(recipe, trajectory, TRACKED).along(vectors)
    forward = Replay(Training(recipe, COUPLED), trajectory, TRACKED, ExactRows).run().numpy(0, 4) @ vectors.T
    backward = Adjoint(Training(recipe, COUPLED), trajectory, TRACKED, vectors).run().contributions()
    reference = DenseReference(Training(recipe, DOUBLE), trajectory, TRACKED, ("none", "exact")).run()
    limit = oracle.EXACT_FLOAT64 * np.abs(right).max()
    assert np.abs(forward.T - right).max() < limit
    assert np.abs(-backward * 45 - right).max() < limit
    assert np.abs(vectors @ reference.hypergradients("exact").T - right).max() < limit
    fast = Replay(Training(recipe, DOUBLE), trajectory, TRACKED, FastRows).run().numpy(0, 4)
    dense = oracle.dense(recipe, trajectory, TRACKED)
    assert oracle.relative_error(fast, dense.hypergradient) < oracle.DENSE_FLOAT64
    assert oracle.relative_error(reference.hypergradients("none"), dense.hypergradient) < oracle.DENSE_FLOAT64
    assert np.allclose(dense.weights, trajectory.checkpoint(-1).weights, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [Nesterov, TwoGroups], ids=lambda k: k.__name__)
def test_hypergradients_add_up_to_what_training_did_beyond_its_first_momentum(kind, tmp_path):
    weights, optimizer = trained(kind)
    recipe = starting(kind, weights, optimizer)
    trajectory = recorded(recipe, tmp_path)
    rows = Replay(Training(recipe, DOUBLE), trajectory, np.arange(45), FastRows).run().numpy(0, 45)
    sums = RowSums(trajectory.parameters)
    sums.add(rows)
    assert law_of(trajectory, [sums.values()], 45).ok
    assert compare(trajectory, rows.sum(0), n_train=45)["ok"]
    targets = np.random.default_rng(3).standard_normal((2, rows.shape[1]))
    check_sums(-targets @ rows.T / 45, targets, trajectory)
    forgetful = copy.copy(trajectory)
    object.__setattr__(forgetful, "attrs", {k: v for k, v in trajectory.attrs.items() if k != "optimizer"})
    assert not law_of(forgetful, [sums.values()], 45).ok, (
        "the term of the first momentum is what makes it hold"
    )
    assert not compare(forgetful, rows.sum(0), n_train=45)["ok"]
    with pytest.raises(ConservationBroken, match="add up to"):
        check_sums(-targets @ rows.T / 45, targets, forgetful)


def test_momentum_of_some_parameters_of_a_group_alone(tmp_path):
    """Dampening leaves the first step alone where it is one: the others' factor differs by 1 / (1 - d)."""
    weights, optimizer = trained(Dampened)
    named = {name: optimizer["state"][k] for k, name in enumerate(weights) if name.startswith("0")}
    recipe = starting(Dampened, weights, named)
    trajectory = recorded(recipe, tmp_path)
    assert trajectory.checkpoint(0).has_momentum.tolist() == [True, True, False, False]
    fast = Replay(Training(recipe, DOUBLE), trajectory, np.arange(45), FastRows).run().numpy(0, 45)
    right = oracle.dense(recipe, trajectory, TRACKED).hypergradient
    assert oracle.relative_error(fast[TRACKED], right) < oracle.DENSE_FLOAT64
    assert compare(trajectory, fast.sum(0), n_train=45)["ok"]


class Adaptive(Small):
    epochs = 2

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.05)


def adam_by_hand(recipe, trajectory, optimizer, tracked):
    """Autograd through AdamW's steps from given weights, moments and counts: (w_T, eps)."""
    model, dataset = recipe.model().double(), recipe.train_dataset()
    names = [entry.name for entry in trajectory.parameters]
    flat = torch.from_numpy(trajectory.checkpoint(0).weights)
    split = [int(np.prod(entry.shape)) for entry in trajectory.parameters]
    w = [p.view(e.shape) for p, e in zip(flat.split(split), trajectory.parameters, strict=True)]
    m, v = ([optimizer["state"][k][key] for k in range(len(w))] for key in ("exp_avg", "exp_avg_sq"))
    count = int(optimizer["state"][0]["step"])
    eps = torch.zeros(len(tracked), dtype=torch.float64, requires_grad=True)
    place = {int(i): k for k, i in enumerate(tracked)}
    for row in trajectory.batches:
        members = row[row >= 0]
        count += 1
        batch = (
            torch.stack([dataset[i][0] for i in members]).double(),
            torch.stack([dataset[i][1] for i in members]),
        )
        w = [one if one.requires_grad else one.clone().requires_grad_() for one in w]
        scores = torch.func.functional_call(model, dict(zip(names, w, strict=True)), (batch[0],))
        losses = torch.nn.functional.cross_entropy(scores, batch[1], reduction="none")
        extra = torch.stack([eps[place[int(i)]] if int(i) in place else eps.new_zeros(()) for i in members])
        total = (losses * (1 + extra * len(dataset))).sum() / len(members)
        for k, g in enumerate(torch.autograd.grad(total, w, create_graph=True)):
            m[k], v[k] = 0.8 * m[k] + 0.2 * g, 0.9 * v[k] + 0.1 * g * g
            step = m[k] / (1 - 0.8**count) / ((v[k] / (1 - 0.9**count)).sqrt() + 1e-4)
            w[k] = w[k] * (1 - 0.05 * 0.05) - 0.05 * step
    return torch.cat([one.reshape(-1) for one in w]), eps


def test_adam_goes_on_from_given_moments_and_counts(tmp_path):
    weights, optimizer = trained(Adaptive)
    recipe = starting(Adaptive, weights, copy.deepcopy(optimizer))
    trajectory = recorded(recipe, tmp_path)
    assert trajectory.checkpoint(0).count.tolist() == [7] * 4
    end, eps = adam_by_hand(recipe, trajectory, optimizer, TRACKED)
    assert np.allclose(end.detach().numpy(), trajectory.checkpoint(-1).weights, rtol=1e-12, atol=1e-13)
    vectors = np.random.default_rng(0).standard_normal((2, len(end)))
    right = np.stack(
        [torch.autograd.grad(end, eps, torch.from_numpy(v), retain_graph=True)[0].numpy() for v in vectors]
    )
    forward = Replay(Training(recipe, COUPLED), trajectory, TRACKED, ExactRows).run().numpy(0, 4)
    backward = Adjoint(Training(recipe, COUPLED), trajectory, TRACKED, vectors).run().contributions()
    limit = oracle.EXACT_FLOAT64 * np.abs(right).max()
    assert np.abs(vectors @ forward.T - right).max() < limit
    assert np.abs(-backward * 45 - right).max() < limit


def test_going_on_is_the_same_training_as_not_stopping(tmp_path):
    """Five epochs, or two recorded and three from what they left: weights, buffers and momentum."""

    class Whole(BatchNormed):
        epochs = 2

    whole = Training(Whole(), DOUBLE)
    for step, batch in enumerate(whole.loader(0, 4)):
        whole.step(step, batch)
    state = copy.deepcopy(whole.model.state_dict()), copy.deepcopy(whole.optimizer.state_dict())
    rest = Training(starting(Whole, *state), DOUBLE)
    assert rest.state_digest() == whole.state_digest()
    for step, batch in enumerate(whole.loader(4, 8), start=4):
        whole.step(step, batch)
        rest.step(step, batch)
    assert rest.state_digest() == whole.state_digest()
    assert torch.equal(rest.optimizer_state().vectors[0], whole.optimizer_state().vectors[0])


def test_the_state_goes_to_parameters_by_name_whatever_their_order():
    weights, state = trained(Small)

    class Backwards(Small):
        def optimizer(self, model):
            return torch.optim.SGD(reversed(list(model.named_parameters())), lr=0.1, momentum=0.9)

    buffers = {name: state["state"][k]["momentum_buffer"] for k, name in enumerate(weights)}
    named = {name: {"momentum_buffer": buffer} for name, buffer in buffers.items()}
    forwards = {**state, "param_groups": [{**state["param_groups"][0], "param_names": list(weights)}]}
    for given in (named, forwards):
        training = Training(starting(Backwards, weights, given), DOUBLE)
        for name, parameter in training.model.named_parameters():
            assert torch.equal(training.optimizer.state[parameter]["momentum_buffer"], buffers[name])
        assert [group["lr"] for group in training.optimizer.param_groups] == [0.1]


def test_moments_of_adam_are_loaded_and_counted_as_torch_counts():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    fresh = torch.optim.AdamW(model.parameters(), lr=0.2)
    load_optimizer(Small(), model, fresh, InitialState(weights={}, optimizer=optimizer.state_dict()))
    for parameter in model.parameters():
        old, new = optimizer.state[parameter], fresh.state[parameter]
        assert set(old) == set(new)
        assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in old)
        assert old["exp_avg"] is not new["exp_avg"]
    assert fresh.param_groups[0]["lr"] == 0.2


def test_one_name_of_tied_weights_is_enough():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model, weight = Tied(), torch.arange(9.0).reshape(3, 3)
    load_weights(Small(), model, InitialState(weights={"b.weight": weight}))
    assert torch.equal(model.a.weight, weight)


def changed(**changes):
    state = trained(Small)[0]
    for name, value in changes.items():
        state.pop(name, None)
        if value is not None:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (changed(**{"0.weight": None, "2.bias": None}), "2 of 4 tensors are missing, first '0.weight'"),
        (changed(extra=torch.zeros(2)), "1 of 5 tensors are not the model’s, first 'extra'"),
        (
            changed(**{"2.bias": torch.zeros(4)}),
            r"1 tensor has another shape, first '2.bias' with \(4,\) where the model has \(3,\)",
        ),
        (
            changed(),
            "4 tensors have another dtype, first '0.weight' with torch.float64 where the model has torch.float32",
        ),
        (changed(**{"2.bias": torch.zeros(3, dtype=torch.int64)}), "another dtype"),
        ({"0.weight": 3.0}, "entry '0.weight' is a float and no tensor"),
    ],
    ids=["missing", "foreign", "shape", "rounded", "kind", "number"],
)
def test_weights_of_another_model_are_refused_in_one_line(weights, message):
    with pytest.raises(InputError, match=message) as caught:
        Training(starting(Small, weights), Compute(device="cpu"))
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_refused():
    bad = changed(**{"2.bias": torch.tensor([0.0, float("nan"), 0.0])})
    with pytest.raises(InputError, match=r"not finite, first '2.bias'"):
        Training(starting(Small, bad), DOUBLE)


def test_something_else_than_a_state_is_refused():
    recipe = Small()
    vars(recipe)["initial_state"] = lambda: 3
    with pytest.raises(
        RecipeError, match=r"initial_state\(\) returned int and must return None or InitialState"
    ):
        Training(recipe, DOUBLE)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (3, "is a int; give the optimizer's state_dict"),
        (
            {"nowhere": {"momentum_buffer": torch.zeros(2)}},
            "1 of 1 tensors are not held by the optimizer, first 'nowhere'",
        ),
        ({"2.bias": {"momentum_buffer": torch.zeros(2)}}, "another shape, first '2.bias'"),
        ({"2.bias": {"exp_avg": torch.zeros(3)}}, "it has exp_avg and SGD keeps momentum_buffer"),
        ({"2.bias": torch.zeros(3)}, "has a Tensor and no mapping"),
        (
            {"state": {}, "param_groups": [{"params": [0, 1]}, {"params": [2, 3]}]},
            r"groups have 2\+2 parameters and the recipe's optimizer 4",
        ),
    ],
    ids=["kind", "name", "shape", "family", "flat", "groups"],
)
def test_the_state_of_another_optimizer_is_refused_in_one_line(optimizer, message):
    with pytest.raises(InputError, match=message) as caught:
        Training(starting(Small, changed(), optimizer), DOUBLE)
    assert "\n" not in str(caught.value)


def test_a_file_of_anything_but_tensors_is_refused_and_runs_no_code(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    def saved(value):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    for data, message in (
        (saved({"x": Evil()}), "holds more than tensors"),
        (saved({"model": {"x": torch.zeros(1)}}), "entry 'model' is a dict and no tensor"),
        (saved(torch.zeros(1)), "holds a Tensor and no tensors by name"),
        (b"no file of weights", "initial state x.pt "),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read_weights(data, "x.pt")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(b"no file of weights", "x.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(InputError, match=r"hydra-pipe\[safetensors\]"):
        read_weights(b"", "x.safetensors")


def test_a_file_that_changed_or_went_is_refused(tmp_path):
    file = tmp_path / "w.pt"
    torch.save(changed(), file)
    with pytest.raises(InputError, match="the run began with 0000000000000000…"):
        StateFile(uri=str(file), sha256="0" * 64)()
    with pytest.raises(InputError, match=r"No such file.*every machine that trains must see it"):
        StateFile(uri=str(tmp_path / "gone.pt"), sha256="0" * 64)()


def test_another_initial_state_is_another_recipe():
    """Momentum alone differs: the weights' digest would not see it."""
    weights, optimizer = trained(Small)
    other = trained(Small, 3)[1]
    made = [
        made_of(Training(starting(Small, weights, state), DOUBLE), {}) for state in (optimizer, other, None)
    ]
    made.append(made_of(Training(Small(), DOUBLE), {}))
    assert differences(made[0], made[0]) == []
    for different in made[1:3]:
        assert differences(made[0], {**different, "source": made[0]["source"]}) == ["the initial state"]
    assert "the initial state" in differences(made[0], made[3])
    assert "initial" not in made[3]
