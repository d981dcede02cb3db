"""Targets drawn by the pass that is differentiated: one forward pass, and the expectation it stands for."""

from __future__ import annotations

import pytest
import torch
from hydra_pipe.workers.ekfac.drawing import OWN, OneForward, draw
from hydra_pipe.workers.ekfac.factors import POSITIONS, grid
from torch import nn

from tests.recipes import Small


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self, seen: str = "") -> None:
        super().__init__()
        self.layer, self.calls, self.seen = nn.Linear(6, 3), 0, seen

    def forward(self, x, scale=1.0):
        self.calls += 1
        return self.layer(x) * scale


def batch(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 6, generator=generator), torch.zeros(count, dtype=torch.int64)]


def asked(model, first, second):
    """Ask twice, once to draw and once for losses; return what was forgotten, and the last output."""
    forgotten = []
    one = OneForward(model, lambda: forgotten.append(1))
    with one.answering():
        first(model)
        one.drawn()
        output = second(model)
    return one.shared, len(forgotten), output


def test_the_losses_get_what_the_targets_were_drawn_from():
    model, (x, _) = Counted(), batch()

    def sample(model):
        with torch.no_grad():
            assert not model(x).requires_grad

    shared, forgotten, output = asked(model, sample, lambda m: m(x))
    assert (shared, forgotten, model.calls) == (True, 0, 1)
    assert torch.equal(output, model.layer(x))
    output.sum().backward()
    assert torch.allclose(model.layer.bias.grad, torch.full((3,), 4.0))
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("first", "second", "forgotten"),
    [
        (lambda m: m(X), lambda m: m(X.clone()), 1),  # other tensors
        (lambda m: m(X), lambda m: m(X, scale=2.0), 1),  # another argument
        (lambda m: (m(X), m(X)), lambda m: m(X), 1),  # which one was it
        (lambda m: (m(X), X.add_(0.5)), lambda m: m(X), 1),  # changed in place
        (lambda m: None, lambda m: m(X), 0),  # targets from elsewhere
    ],
)
def test_another_question_gets_an_answer_of_its_own(first, second, forgotten):
    model = Counted()
    shared, found, output = asked(model, first, second)
    assert (shared, found) == (False, forgotten)
    assert torch.equal(output, second(model))
    assert output.requires_grad


X = batch()[0]


def test_an_inference_pass_is_not_differentiated():
    model = Counted()

    def sample(model):
        with torch.inference_mode():
            model(X)

    shared, forgotten, output = asked(model, sample, lambda m: m(X))
    assert (shared, forgotten, output.requires_grad) == (False, 1, True)


def test_classes_drawn_evenly_have_the_same_second_moments():
    """E[count (p - e)(p - e)^T] = diag(p) - p p^T, with less noise than plain drawing has."""
    torch.manual_seed(0)
    recipe, model = Small(), nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.mul_(6)
    one = [batch(1)[0].expand(4000, 6), torch.zeros(4000, dtype=torch.int64)]
    p = model(one[0][0]).double().softmax(0).detach()
    right = torch.diag(p) - torch.outer(p, p)
    errors = {}
    for evenly in (True, False):
        torch.manual_seed(0)
        (_x, drawn), counts = draw(recipe, model, one, evenly=evenly)
        assert (counts is None) != evenly
        weight = torch.ones(4000, dtype=torch.float64) if counts is None else counts
        assert float(weight.max()) <= 1 / OWN + 1e-9
        away = p - torch.nn.functional.one_hot(drawn, 3).double()
        found = torch.einsum("n,ni,nj->ij", weight, away, away) / 4000
        errors[evenly] = float((found - right).norm() / right.norm())
    assert errors[True] < 0.05
    assert errors[True] < errors[False]


def test_a_recipe_that_draws_itself_is_asked():
    class Own(Small):
        def sample_targets(self, model, batch):
            return [batch[0], batch[1] + 1]

    drawn, counts = draw(Own(), nn.Linear(6, 3), batch(), evenly=True)
    assert counts is None
    assert drawn[1].tolist() == [1, 1, 1, 1]


def test_a_model_that_is_sure_is_drawn_from_all_the_same():
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    (_x, drawn), counts = draw(Small(), model, batch(), evenly=True)
    assert drawn.tolist() == [0] * 4
    assert counts.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("sizes", "steps"), [((28, 28), [4, 4]), ((8, 8), [1, 1]), ((100,), [2]), ((2, 300), [1, 10])]
)
def test_few_positions_of_a_large_output_are_looked_at(sizes, steps):
    assert grid(sizes) == steps
    left = 1
    for size, step in zip(sizes, steps, strict=True):
        left *= -(-size // step)
    assert left <= POSITIONS
