"""What a replay could not follow is said by name, where the loop does it."""

from __future__ import annotations

import pytest
import torch
from hydra_pipe.storage.errors import InputError, NonFiniteLoss, RecipeError
from torch import nn

from hydra_pipe import open_run, recording
from tests.pipeline.drive.loops import Mine, N, batches, losses_of, simple


def take(rec, model, optimizer, indices, *, noise=0.0, between=None):
    """A batch of a loop that only announces it."""
    rec.batch(indices)
    optimizer.zero_grad()
    losses_of(model, indices, noise).mean().backward()
    if between is not None:
        between()
    optimizer.step()


def refused(tmp_path, message, body, **given):
    """Run ``body`` in a recording, which must raise and leave nothing."""
    model, optimizer, watched = simple(tmp_path / "run", **given)
    with pytest.raises(RecipeError, match=message), watched as rec:
        body(rec, model, optimizer)
    assert not (tmp_path / "run").exists()


def test_a_replay_that_leaves_the_loop_says_where(tmp_path):
    """Before the third batch, though the loop would go on."""
    seen = []

    def body(rec, model, optimizer):
        for k, indices in enumerate(batches(4)):
            seen.append(k)
            rec.step(indices, losses_of(model, indices, noise=1e-3 * (k == 1)))

    refused(
        tmp_path,
        r"cannot be replayed: the losses of batch 1 \(train_index .*\) are not the loop's \(sample \d+: .*augmentation drawn in the loader",
        body,
        recipe=Mine(),
        check=3,
    )
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda found: found.sum() / 7,
            r"the weights after batch 0 .* are not the loop's \(off by .*: another reduction",
        ),
        (
            lambda found: found.mean() * 1.00005,
            r"by rounding alone \(off by .*: the same sum",
        ),
    ],
    ids=["another", "rounding"],
)
def test_another_reduction(tmp_path, loss, message):
    def body(rec, model, optimizer):
        for indices in batches():
            rec.batch(indices)
            optimizer.zero_grad()
            loss(losses_of(model, indices)).backward()
            optimizer.step()

    refused(tmp_path, message, body, recipe=Mine(), check=1)


def test_gradients_that_are_zero_in_the_loop_alone(tmp_path):
    class Half(Mine):
        def model(self):
            model = super().model()
            model.register_parameter("unused", nn.Parameter(torch.ones(2)))
            return model

    torch.manual_seed(0)
    model = Half().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.unused.grad = torch.zeros(2)
    watched = recording(model, optimizer, out=tmp_path / "run", recipe=Half(), check=1)

    def loop():
        with watched as rec:
            rec.batch(range(6))
            optimizer.zero_grad(set_to_none=False)
            losses_of(model, range(6)).mean().backward()
            optimizer.step()

    with pytest.raises(
        RecipeError,
        match=r"parameter 'unused' has a gradient at batch 0 .* has none in the replay: zero_grad",
    ):
        loop()


def test_a_recipe_that_is_not_deterministic(tmp_path):
    class Loose(Mine):
        count = 0

        def losses(self, model, batch):
            type(self).count += 1
            return super().losses(model, [batch[0] * (1 + 1e-3 * self.count), batch[1]])

    def body(rec, model, optimizer):
        for indices in batches():
            rec.step(indices, losses_of(model, indices))

    refused(tmp_path, r"two replays of the first \d batches differ from each other", body, recipe=Loose())


def test_clipping_of_the_loops_own(tmp_path):
    def body(rec, model, optimizer):
        between = lambda: nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        take(rec, model, optimizer, range(6), between=between)

    refused(
        tmp_path,
        r"'0.weight' was changed between backward\(\) and the step of batch 0 \(clip_grad_norm_\?\)",
        body,
    )


def test_clipping_twice(tmp_path):
    """Beside a scaler gradients may be written to, so what is clipped already shows in its norm."""

    def body(rec, model, optimizer):
        scaler = torch.amp.GradScaler("cpu")
        del scaler
        between = lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        take(rec, model, optimizer, range(6), between=between)

    refused(
        tmp_path,
        r"comes in with norm 0\.0999.*|comes in with norm 0\.1.*",
        body,
        clip_grad_norm=0.1,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )


def test_clip_needs_a_limit(tmp_path):
    def body(rec, model, optimizer):
        take(rec, model, optimizer, range(6), between=rec.clip)

    refused(tmp_path, r"clip\(\) needs to know how far: say recording\(..., clip_grad_norm=1.0\)", body)


def test_clip_where_the_loop_says_is_the_steps_own(tmp_path):
    model, optimizer, watched = simple(tmp_path / "run", clip_grad_norm=0.1, recipe=Mine())
    with watched as rec:
        for indices in batches():
            take(rec, model, optimizer, indices, between=rec.clip)
    found = open_run(rec.uri).trajectory()
    assert found.clip_norm.min() > 0.1
    assert found.clip_factor.max() < 1


def test_parameters_and_buffers_changed_between_steps(tmp_path):
    def parameters(rec, model, optimizer):
        take(rec, model, optimizer, range(6))
        with torch.no_grad():
            model[0].bias.mul_(0.9)
        rec.batch(range(6))

    def buffers(rec, model, optimizer):
        take(rec, model, optimizer, range(6))
        losses_of(model, range(4))  # in train mode
        rec.batch(range(6))

    message = r"parameters or buffers were changed between the steps of batches 0 and 1"
    refused(tmp_path, message, parameters)
    refused(tmp_path, message, buffers)


def test_a_step_that_is_not_the_optimizers(tmp_path):
    def body(rec, model, optimizer):
        def between():
            model[0].weight.data.add_(0.5)

        take(rec, model, optimizer, range(6), between=between)

    refused(tmp_path, r"step 0 moved parameter '0.weight' elsewhere than SGD does", body)


def test_a_scheduler_that_moves_weights(tmp_path):
    class Averages:
        def __init__(self, model):
            self.model = model

        def step(self):
            with torch.no_grad():
                self.model.mul_(0.5)

    model = Mine().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = recording(
        model, optimizer, out=tmp_path / "run", n_train=N, scheduler=Averages(model[0].weight)
    )
    with (
        pytest.raises(RecipeError, match=r"scheduler.step\(\) changed the model after batch 0"),
        watched as rec,
    ):
        take(rec, model, optimizer, range(6))


def test_the_order_of_calls(tmp_path):
    def unannounced(rec, model, optimizer):
        losses_of(model, range(6)).mean().backward()
        optimizer.step()

    def unseen(rec, model, optimizer):
        rec.step(range(6), torch.stack([p.sum() for p in model.parameters()]))

    def other(rec, model, optimizer):
        rec.batch(range(6))
        rec.step(range(1, 7), losses_of(model, range(6)))

    def twice(rec, model, optimizer):
        rec.batch(range(6))
        rec.batch(range(6))

    def unfinished(rec, model, optimizer):
        rec.batch(range(6))
        rec.end_epoch()

    def backwardless(rec, model, optimizer):
        rec.batch(range(6))
        optimizer.step()

    def closure(rec, model, optimizer):
        rec.batch(range(6))
        optimizer.step(lambda: 0.0)

    refused(
        tmp_path, r"optimizer.step\(\) after batch -?\d+ and before the next batch\(indices\)", unannounced
    )
    refused(
        tmp_path, r"no forward pass of the model in train mode was seen before step\(\) of batch 0", unseen
    )
    refused(tmp_path, r"step\(\) was given other indices than batch\(\) before it \(batch 0\)", other)
    refused(tmp_path, r"batch 1 begins and the one before it made no step .*accumulate is 1", twice)
    refused(tmp_path, r"end_epoch\(\) was called after 1 batches without a step", unfinished)
    refused(tmp_path, r"no parameter that is optimised has a gradient at the step of batch 0", backwardless)
    refused(tmp_path, r"optimizer.step\(closure\) is not followed", closure)
    refused(tmp_path, r"0 steps of the optimizer were recorded", lambda *_: None)


def test_eval_mode(tmp_path):
    def body(rec, model, optimizer):
        model.eval()
        rec.batch(range(6))

    refused(tmp_path, r"layer '1' \(BatchNorm1d\) is in eval mode at training batch 0", body)


def test_indices_losses_and_divisors(tmp_path):
    def step(indices, losses=None, **more):
        def body(rec, model, optimizer):
            found = losses_of(model, range(6))
            rec.step(indices, found if losses is None else losses(found), **more)

        return body

    def mixed(rec, model, optimizer):
        rec.step(range(6), losses_of(model, range(6)))
        rec.step(range(6), losses_of(model, range(6)), divisor=6)

    refused(tmp_path, r"batch 0 holds the training index 22; indices go from 0 to 21", step([1, 22]))
    refused(tmp_path, r"indices of batch 0 are float64 of shape \(1,\)", step([0.5]))
    refused(tmp_path, r"losses of batch 0 are \(\) and must have shape \(6,\)", step(range(6), torch.mean))
    refused(tmp_path, r"parts is 0 for batch 0", step(range(6), parts=0))
    refused(tmp_path, r"divisor is -1 for batch 0", step(range(6), divisor=-1))
    refused(tmp_path, r"batch 1 has a divisor and the batches before it have none", mixed)


def test_a_loss_that_is_no_number(tmp_path):
    model, _, watched = simple(tmp_path / "run")
    with pytest.raises(NonFiniteLoss, match=r"loss of batch 0 is nan \(train_index 4\)"), watched as rec:
        rec.step([3, 4], losses_of(model, [3, 4]) * torch.tensor([1.0, torch.nan]))


def test_inputs_that_the_recipe_does_not_give(tmp_path):
    def body(rec, model, optimizer):
        inputs, targets = Mine().train_dataset()[:6]
        rec.batch(range(6), inputs=(inputs, targets))
        rec.batch(range(6), inputs=inputs + 1e-6)

    refused(
        tmp_path,
        r"tensor 0 of the inputs of batch 1, \(6, 5\), is not what the recipe gives for train_index 0, 1, 2, 3, 4, 5",
        body,
        recipe=Mine(),
        accumulate=2,
    )
    model, _, watched = simple(tmp_path / "other")
    with pytest.raises(InputError, match=r"inputs are compared with the recipe's data"), watched as rec:
        rec.batch(range(6), inputs=torch.zeros(6, 5))
    assert model is not None


def test_a_scaler_that_moved_batch_statistics(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def body(rec, model, optimizer):
        rec.batch(range(6))
        scaler.scale(losses_of(model, range(6)).mean()).backward()
        model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        rec.batch(range(6))

    refused(
        tmp_path,
        r"the scaler skipped the step of batch 0, whose forward pass moved buffers",
        body,
        scaler=scaler,
    )
    refused(
        tmp_path,
        r"step\(\) takes no scaler",
        lambda rec, model, _: rec.step(range(6), losses_of(model, range(6))),
        scaler=scaler,
    )


def test_a_fused_step_that_unscales_by_itself(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = Mine().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    watched = recording(model, optimizer, out=tmp_path / "run", n_train=N, scaler=scaler)
    with (  # noqa: PT012
        pytest.raises(RecipeError, match=r"call scaler.unscale_\(optimizer\) before scaler.step\(\)"),
        watched as rec,
    ):
        rec.batch(range(6))
        scaler.scale(losses_of(model, range(6)).mean()).backward()
        scaler.step(optimizer)


def test_sparse_gradients(tmp_path):
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = recording(model, optimizer, out=tmp_path / "run", n_train=N, clip_grad_norm=1.0)
    with pytest.raises(RecipeError, match=r"parameter '0.weight' has a sparse gradient"), watched as rec:
        rec.step(range(2), model(torch.tensor([1, 2])).flatten())


def test_what_a_recording_is_asked(tmp_path):
    def given(message, kind=RecipeError, **arguments):
        with pytest.raises(kind, match=message):
            simple(tmp_path / "run", **arguments)

    given(r"accumulate is 0; it must be a whole number of at least 1", accumulate=0)
    given(r"clip_grad_norm is -1; it must be a positive number", clip_grad_norm=-1)
    given(r"seed is -1", seed=-1)
    given(r"scheduler_interval is 'batch'", scheduler_interval="batch")
    given(r"n_train is not known; say recording\(..., n_train=len\(dataset\)\)", InputError, n_train=None)
    given(r"threads is 0", InputError, threads=0)
    given(r"recipe is a dict; give an instance", recipe={})
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    given(r"scheduler is a ReduceLROnPlateau", scheduler=plateau)


def test_models_and_optimizers_without_a_replay(tmp_path):
    def given(message, change):
        with pytest.raises(RecipeError, match=message):
            simple(tmp_path / "run", change)

    def low(model, _optimizer):
        model[0].bfloat16()

    def hook(_model, optimizer):
        optimizer.register_step_post_hook(lambda *_: None)

    given(r"'1.weight' of the model is torch.float32|'0.weight' of the model is torch.bfloat16", low)
    given(r"the optimizer has a step_post_hook", hook)
    model = Mine().model()
    with pytest.raises(RecipeError, match=r"optimizer RMSprop has no rule"):
        recording(model, torch.optim.RMSprop(model.parameters()), out=tmp_path / "run", n_train=N)
    wrapped = nn.DataParallel(model)
    with pytest.raises(
        RecipeError, match=r"the model is a DataParallel, and a record is that of one process"
    ):
        recording(wrapped, torch.optim.SGD(model.parameters()), out=tmp_path / "run", n_train=N)


def test_a_recording_is_entered_once(tmp_path):
    model, _, watched = simple(tmp_path / "run")
    with watched as rec:
        rec.step(range(6), losses_of(model, range(6)))
    with pytest.raises(InputError, match=r"a recording is entered once"):
        watched.__enter__()
