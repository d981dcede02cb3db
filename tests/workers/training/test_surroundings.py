"""What surrounds a step: optimisers and options that are refused, weights, clipping, autocast, orders of fewer samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.model.autocast import full_precision, noticed
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.retrain import only, retrain_subset
from hydra_pipe.workers.training.training import Compute, Training

from tests.recipes import Small

CPU = Compute()


class With(Small):
    """The small recipe with another optimiser."""

    epochs = 2

    def __init__(self, make=None, **changes):
        self.make = make or (lambda ps: torch.optim.SGD(ps, lr=0.1))
        vars(self).update(changes)

    def optimizer(self, model):
        return self.make(list(model.parameters()))


def recorded(recipe, place):
    uri = str(place / "trajectory.zarr")
    Recorder(Training(recipe, CPU), uri).run()
    return open_trajectory(uri)


def named(name):
    return type(name, (torch.optim.SGD,), {})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda ps: torch.optim.AdamW(ps, amsgrad=True),
            r"AdamW\(amsgrad=True\) is not supported: .* leave it out",
        ),
        (lambda ps: torch.optim.Adam(ps, maximize=True), "Adam\\(maximize=True\\).*negate the losses"),
        (lambda ps: torch.optim.AdamW(ps, capturable=True), "capturable=True.*leave it out"),
        (lambda ps: torch.optim.AdamW(ps, differentiable=True), "differentiable=True"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1, maximize=True), "SGD\\(maximize=True\\)"),
        (
            lambda ps: torch.optim.SGD(ps, lr=torch.tensor(0.1)),
            "the learning rate is a tensor.*give the optimizer a float",
        ),
        (
            lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.1), foreach=False),
            "the learning rate is a tensor",
        ),
        (lambda ps: torch.optim.RMSprop(ps), "RMSprop has no rule.*AdamW with betas"),
        (
            lambda ps: torch.optim.Adafactor(ps),
            "Adafactor has no rule.*use torch.optim.SGD .*nearest is AdamW",
        ),
        (lambda ps: torch.optim.LBFGS(ps), "LBFGS has no rule"),
        (lambda ps: torch.optim.NAdam(ps), "NAdam has no rule.*nearest is AdamW"),
        (lambda ps: named("Lion")(ps, lr=0.1), "Lion has no rule.*nearest is AdamW"),
        (lambda ps: named("Muon")(ps, lr=0.1), "Muon has no rule.*Nesterov"),
        (lambda ps: named("AdamW8bit")(ps, lr=0.1), "AdamW8bit has no rule.*nearest is torch.optim.AdamW"),
    ],
)
def test_an_optimizer_or_option_without_a_rule_is_refused_with_what_to_use(make, said):
    with pytest.raises(RecipeError, match=said) as found:
        Training(With(make), CPU)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip_grad_norm": 0}, "clip_grad_norm is 0; it must be a positive number, or None"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm is nan"),
        ({"clip_grad_norm": "1"}, "clip_grad_norm is '1'"),
        ({"clip_grad_value": 0.5}, "clip_grad_value has no rule here; clip by norm instead"),
    ],
)
def test_clipping_that_is_none_is_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        Training(With(**changes), CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_sixteen_bits_are_refused_with_what_to_do(dtype):
    class Low(With):
        def model(self):
            return super().model().to(dtype)

    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        RecipeError, match=f"parameter '0.weight' is {kind}.*compute in {kind} under torch.autocast"
    ):
        Training(Low(), CPU)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            lambda batch: 1.0,
            r"weights\(\) returned float for a batch of 8 samples; it must return shape \(8,\)",
        ),
        (lambda batch: torch.ones(3), r"weights\(\) returned \(3,\)"),
        (lambda batch: -torch.ones(len(batch[1])), "weights are 0 or more"),
        (lambda batch: 1 / 0, "weights\\(\\) of the batch of step 0 raised ZeroDivisionError"),
    ],
)
def test_weights_that_are_none_are_refused(weights, said, tmp_path):
    class Weighted(With):
        def weights(self, batch):
            return weights(batch)

    with pytest.raises(RecipeError, match=said):
        recorded(Weighted(), tmp_path)


def test_a_record_holds_what_surrounds_its_steps(tmp_path):
    class Weighted(With):
        accumulate, clip_grad_norm = 4, 0.05

        def weights(self, batch):
            return 1.0 + batch[1]

        def losses(self, model, batch):
            return super().losses(model, batch) * (1.0 + batch[1])

    record = recorded(Weighted(lambda ps: torch.optim.AdamW(ps, lr=0.01)), tmp_path)
    ends = np.flatnonzero(record.updates)
    assert ends.tolist() == [3, 5, 9, 11]  # six batches an epoch
    labels = Weighted().train_dataset().tensors[1].numpy()
    weight = [(1.0 + labels[row[row >= 0]]).sum() for row in record.batches]
    for first, last in zip([0, 4, 6, 10], ends, strict=True):
        assert record.divisor[first : last + 1].tolist() == [sum(weight[first : last + 1])] * (
            last + 1 - first
        )
        norm = record.clip_norm[last]
        assert record.clip_factor[last] == pytest.approx(min(1, 0.05 / (norm + 1e-6)))
    assert (record.clip_factor < 1).any()
    assert record.optimizer == {
        "family": "adam",
        "class": "AdamW",
        "decoupled": [True],
        "clip_grad_norm": 0.05,
    }
    last = record.checkpoint(-1)
    assert last.count.tolist() == [4] * 4
    assert (last.second_moment > 0).any()


def test_autocast_is_noticed_and_can_be_left_out():
    class Mixed(With):
        def losses(self, model, batch):
            with torch.autocast("cpu", torch.bfloat16):
                scores = model(batch[0])
            return F.cross_entropy(scores.float(), batch[1], reduction="none")

    training = Training(Mixed(), CPU)
    batch = next(training.loader())
    with noticed() as found, torch.no_grad():
        rough = training.losses(batch, 8)
    assert found == {"bfloat16"}
    with full_precision(), torch.no_grad():
        exact = training.losses(batch, 8)
    plain = F.cross_entropy(training.model(batch[0]), batch[1], reduction="none").detach()
    assert torch.equal(exact, plain)
    assert not torch.equal(rough, plain)
    with torch.no_grad():  # put back
        assert torch.equal(training.losses(batch, 8), rough)


def test_an_order_goes_on_over_the_samples_that_are_left():
    class Ordered(With):
        def order(self, epoch, generator):
            return [5, 7, 5, 9, 11, 0]

    kept = np.array([0, 5, 9, 30])
    smaller = only(Ordered(), kept)
    assert smaller.order(0, torch.Generator()).tolist() == [1, 1, 2, 0]
    training = retrain_subset(Ordered(batch_size=4), CPU, kept)
    assert training.batches.tolist() == [[1, 1, 2, 0]] * 2
    assert only(With(), kept).order(0, torch.Generator()) is None
