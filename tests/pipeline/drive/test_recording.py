"""A loop written by hand, recorded, goes the way of a recipe's own run: the same bits."""

from __future__ import annotations

import copy
import logging
import os

import cloudpickle
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.pipeline.plan.survey import resolve_recipe
from hydra_pipe.storage.errors import (
    CorruptStore,
    InputError,
    RecipeError,
    RunNotFound,
    SpecMismatch,
    StorageFull,
    StoreError,
)
from hydra_pipe.storage.trajectory import TrajectoryWriter
from hydra_pipe.workers.determinism import seed_everything
from hydra_pipe.workers.training.training import Compute, Training

import hydra_pipe
from hydra_pipe import Questions, Recipe, RunSpec, open_run, recording, verify
from tests.pipeline.drive.loops import Bare, Mine, N, Whole, WholeLayers, batches, losses_of, simple

ASKED = {"executor": "serial", "hessian": "exact", "mode": "adjoint", "shards": 1}


def begin(recipe):
    """The model, optimiser and scheduler that a run of the recipe begins with."""
    seed_everything(recipe.seed)
    model = recipe.model()
    optimizer = recipe.optimizer(model)
    return model, optimizer, recipe.scheduler(optimizer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a recipe and one of the loop that does the same, both with contributions."""
    place = tmp_path_factory.mktemp("recorded")
    own = hydra_pipe.run(RunSpec(recipe=Whole(), out=str(place / "own"), **ASKED))
    model, optimizer, scheduler = begin(Whole())
    out = str(place / "loop")
    with recording(
        model,
        optimizer,
        out=out,
        recipe=Bare(),
        scheduler=scheduler,
        clip_grad_norm=0.3,
        accumulate=2,
        seed=3,
    ) as rec:
        for row in own.trajectory().batches:
            rec.step(row[row >= 0], losses_of(model, row[row >= 0]))
    assert rec.notes == []
    return own, hydra_pipe.run(RunSpec(recipe=Bare(), out=out, **ASKED))


def same_records(a, b):
    for name in ("batches", "learning_rate", "weight_decay", "momentum", "coefficient"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for name in ("beta1", "beta2", "eps", "divisor", "updates", "clip_norm", "clip_factor"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert a.epoch_digest == b.epoch_digest
    assert a.epoch_ends == b.epoch_ends
    assert a.parameters == b.parameters
    both = dict(zip(a.digest_step.tolist(), a.digest.tolist(), strict=True))
    other = dict(zip(b.digest_step.tolist(), b.digest.tolist(), strict=True))
    assert {k: both[k] for k in both if k in other} == {k: other[k] for k in other if k in both}
    assert len(set(both) & set(other)) >= 2
    for name in ("weights", "momentum", "buffers"):
        mine, yours = getattr(a.checkpoint(-1), name), getattr(b.checkpoint(-1), name)
        assert np.array_equal(mine, yours) if name != "buffers" else mine == yours


def test_steps_of_the_recording_are_those_of_a_recipe(runs):
    own, loop = (run.trajectory() for run in runs)
    assert loop.clip_factor.min() < 1
    assert loop.updates.tolist() == [False, True] * 6
    same_records(own, loop)
    assert loop.attrs["recorded"] == "loop"


def test_contributions_are_those_of_a_recipe(runs):
    own, loop = (
        run.contributions().to_table().sort_by([("test_index", "ascending"), ("train_index", "ascending")])
        for run in runs
    )
    assert own.num_rows == N * 4
    assert own["contribution"].to_pylist() == loop["contribution"].to_pylist()


def test_the_run_is_whole(runs):
    assert verify(runs[1]).problems == ()
    noted = runs[1].info
    assert noted["recipe"]["name"] == "bare"
    assert noted["made_of"] is not None


def test_another_process_goes_on_from_it(runs):
    """With `attribute`, which reads the specification from the run."""
    done = hydra_pipe.attribute(runs[1].uri, {"gradient-dot": {}}, Bare())
    assert "gradient-dot" in done.methods()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 5, r"epochs is 5, and the loop that made this record had 3; leave it out"),
        ("seed", 4, r"seed is 4, and the loop that made this record had 3"),
        ("seeds", 2, r"seeds is 2, and only its own loop can train again"),
        ("dtype", "float64", r"dtype: stored \"float32\", asked \"float64\""),
    ],
)
def test_another_training_is_refused(runs, field, value, message):
    with pytest.raises(SpecMismatch, match=message):
        hydra_pipe.run(RunSpec(**{"recipe": Bare(), "out": runs[1].uri, **ASKED, field: value}))


def test_a_record_of_a_loop_is_not_overwritten(runs):
    with pytest.raises(SpecMismatch, match="which no command can make again; use another --out"):
        hydra_pipe.run(RunSpec(recipe=Bare(), out=runs[1].uri, track="5", overwrite=True, **ASKED))
    assert runs[1].methods()


def test_the_pair_beside_a_loop_of_ones_own(tmp_path):
    """Batch statistics, dropout and the loop's own scheduler; generators are used between the batches."""
    whole = WholeLayers()
    own = hydra_pipe.run(RunSpec(recipe=whole, out=str(tmp_path / "own"), **ASKED), stages=["record"])
    model, optimizer, scheduler = begin(whole)
    switches = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with recording(model, optimizer, out=tmp_path / "loop", recipe=Mine(), seed=3) as rec:
        for k, row in enumerate(own.trajectory().batches):
            torch.randn(3)
            inputs = torch.utils.data.default_collate([Mine().train_dataset()[int(i)] for i in row])
            rec.batch(row, inputs=inputs)
            optimizer.zero_grad()
            losses_of(model, row).mean().backward()
            optimizer.step()
            model.eval()
            losses_of(model, range(4))
            model.train()
            if k % 2:
                rec.end_epoch()
                scheduler.step()
    assert switches == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    loop = open_run(tmp_path / "loop").trajectory()
    assert np.isnan(loop.loss).all()
    assert loop.epoch_digest == own.trajectory().epoch_digest
    assert np.array_equal(loop.learning_rate, own.trajectory().learning_rate)
    assert verify(open_run(tmp_path / "loop")).problems == ()


def test_without_a_recipe_nothing_is_replayed_and_the_replay_says_so(tmp_path, caplog):
    model, _, watched = simple(tmp_path / "run")
    with caplog.at_level(logging.WARNING), watched as rec:
        for indices in batches():
            rec.step(indices, losses_of(model, indices, noise=0.5))
    assert rec.notes == [
        "no recipe was given, so nothing was replayed: the first replay says whether it follows"
    ]
    assert rec.notes[0] in caplog.text
    # Batch statistics take the noise out again, but for rounding and their own means: only a replay sees it.
    with pytest.raises(hydra_pipe.HydraError, match=r"replay diverged at step \d"):
        hydra_pipe.run(RunSpec(recipe=Mine(), out=rec.uri, **{**ASKED, "hessian": "none", "mode": "forward"}))


def test_an_optimizer_that_has_a_state_goes_on_with_it(tmp_path):
    model = Mine().model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(2):
        losses_of(model, range(6)).mean().backward()
        optimizer.step()
    with recording(model, optimizer, out=tmp_path / "run", recipe=Mine()) as rec:
        for indices in batches():
            rec.step(indices, losses_of(model, indices))
    found = open_run(rec.uri).trajectory()
    assert found.optimizer["count"] == [2] * len(found.parameters)
    assert found.checkpoint(0).momentum.any()


def test_divisors_stand_for_the_mean(tmp_path):
    """Token counts and the like: sums over what the loop says."""
    model, optimizer, watched = simple(tmp_path / "run", recipe=Mine(), n_train=None)
    with watched as rec:
        for indices in batches():
            rec.batch(indices, divisor=40)
            optimizer.zero_grad()
            (losses_of(model, indices).sum() / 40).backward()
            optimizer.step()
    found = open_run(rec.uri).trajectory()
    assert found.divisor.tolist() == [40, 40]
    assert found.attrs["weighted"]


def test_what_is_left_over_makes_no_step_or_a_smaller_one(tmp_path):
    model, _, watched = simple(tmp_path / "dropped", recipe=Mine(), accumulate=2)
    with watched as rec:
        for indices in [*batches(), range(3)]:
            rec.step(indices, losses_of(model, indices))
    assert rec.notes == ["the last 1 batches made no step of the optimizer and are not in the record"]
    assert open_run(rec.uri).trajectory().updates.tolist() == [False, True]
    assert verify(open_run(rec.uri)).problems == ()
    model, _, watched = simple(tmp_path / "ended", recipe=Mine(), accumulate=2)
    with watched as rec:
        for indices in [*batches(), range(3)]:
            rec.step(indices, losses_of(model, indices))
        rec.end_epoch()
    found = open_run(rec.uri).trajectory()
    assert found.updates.tolist() == [False, True, True]
    assert found.divisor.tolist() == [22, 22, 6]
    assert found.epoch_ends == [3]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_left_out(tmp_path, fused):
    """Fused optimisers are stepped all the same, and leave the weights alone themselves."""
    model = Whole().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    with recording(
        model, optimizer, out=tmp_path / "run", recipe=Bare(), scaler=scaler, clip_grad_norm=0.5
    ) as rec:
        for k, indices in enumerate(batches(2)):
            rec.batch(indices)
            optimizer.zero_grad()
            scaler.scale(losses_of(model, indices).mean()).backward()
            if k == 1:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert rec.notes == ["1 batches whose step the scaler skipped are not in the record"]
    assert rec.done == 3


def test_a_block_that_raises_leaves_nothing(tmp_path):
    out = tmp_path / "run"
    model, optimizer, watched = simple(out)
    with pytest.raises(ZeroDivisionError), watched as rec:  # noqa: PT012
        rec.step(range(6), losses_of(model, range(6)))
        kept = rec._recorder.kept._place
        assert os.listdir(kept)
        1 / 0  # noqa: B018
    assert not out.exists()
    assert not kept.exists()
    assert not optimizer._optimizer_step_pre_hooks
    losses_of(model, range(6)).mean().backward()
    optimizer.step()  # nobody watches
    with pytest.raises(InputError, match=r"a recording watches inside of its block"):
        rec.batch(range(6))


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_given):
        raise StorageFull("no space left")

    monkeypatch.setattr(TrajectoryWriter, "finish", full)
    model, _, watched = simple(tmp_path / "run")
    with pytest.raises(StorageFull), watched as rec:
        rec.step(range(6), losses_of(model, range(6)))
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []
    with pytest.raises(RunNotFound):
        open_run(tmp_path / "run")


def test_a_place_that_holds_something_is_refused(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(StoreError, match="holds no run but 1 other entries"):
        simple(tmp_path / "letters")
    for overwrite in (False, True):
        model, _, watched = simple(tmp_path / "run", overwrite=overwrite)
        with watched as rec:
            rec.step(range(6), losses_of(model, range(6)))
    with pytest.raises(StoreError, match=r"holds a run; use another out, or overwrite=True"):
        simple(tmp_path / "run")


def test_checkpoints_are_thinned_or_as_asked(tmp_path):
    model, _, watched = simple(tmp_path / "thin")
    with watched as rec:
        for indices in batches(12):
            rec.step(indices, losses_of(model, indices))
    steps = open_run(rec.uri).trajectory().checkpoint_steps.tolist()
    assert steps == [*range(0, 23, 2), 24]
    model, _, watched = simple(tmp_path / "asked", checkpoint_every=3)
    with watched as rec:
        for indices in batches(4):
            rec.step(indices, losses_of(model, indices))
    found = open_run(rec.uri).trajectory()
    assert found.checkpoint_steps.tolist() == [0, 3, 6, 8]
    assert found.epoch_ends == [2, 4, 6, 8]


def test_a_damaged_record_is_not_trained_again(runs, tmp_path):
    model, _, watched = simple(tmp_path / "run", recipe=Mine())
    with watched as rec:
        for indices in batches():
            rec.step(indices, losses_of(model, indices))
    (tmp_path / "run" / "trajectory.zarr" / "checkpoint" / "weights" / "c" / "2" / "0").unlink()
    with pytest.raises(CorruptStore, match=r"missing; a loop of its own recorded this: restore the file"):
        hydra_pipe.run(RunSpec(recipe=Mine(), out=rec.uri, **ASKED))


def test_a_smaller_training_set_cannot_follow(runs):
    """Evaluate's way ``subset`` trains anew, which only the loop can."""
    with pytest.raises(
        RecipeError, match=r"were recorded of 22 training samples and this training set has 11"
    ):
        hydra_pipe.evaluate(
            runs[1],
            Bare(),
            questions=Questions(retraining="subset", subsets=3, fractions=(0.5,)),
            executor="serial",
        )


def test_a_recipe_of_another_model_is_refused(runs):
    class Wide(Bare):
        def model(self):
            return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))

    with pytest.raises(
        RecipeError,
        match=r"parameter '0.weight' of shape \(6, 5\) was trained by the loop and is of shape \(7, 5\)",
    ):
        hydra_pipe.run(RunSpec(recipe=Wide(), out=runs[1].uri, **ASKED))


def test_workers_elsewhere_get_the_recipe_with_its_record(runs):
    spec = RunSpec(recipe=Bare(), out=runs[1].uri, **ASKED)
    there = cloudpickle.loads(cloudpickle.dumps(resolve_recipe(spec)))
    training = Training(there, Compute())
    assert training.weight_checksum() == runs[1].trajectory().digest[0]
    assert np.array_equal(training.batches, runs[1].trajectory().batches)
    assert [group["weight_decay"] for group in training.optimizer.param_groups] == [0.1, 0.0]


def test_status_and_commands_of_a_record_that_nothing_went_on_from(tmp_path):
    model, _, watched = simple(tmp_path / "run")
    with watched as rec:
        for indices in batches():
            rec.step(indices, losses_of(model, indices))
    done = CliRunner().invoke(main, ["status", rec.uri])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["replay", "digits", "--out", rec.uri, "--executor", "serial"])
    assert done.exit_code == 1
    assert "parameter '0.weight' of shape (6, 5) was trained by the loop" in done.stderr
    assert "Traceback" not in done.stderr


def test_recipes_are_left_as_they_are(runs):
    recipe = Bare()
    before = copy.copy(vars(recipe))
    hydra_pipe.run(RunSpec(recipe=recipe, out=runs[1].uri, **ASKED))
    assert vars(recipe) == before
    assert type(recipe).optimizer is Recipe.optimizer


def test_contributions_as_of_a_step_are_those_of_a_recipe(runs):
    found = []
    for one, recipe in zip(runs, (Whole(), Bare()), strict=True):
        cut = hydra_pipe.run(RunSpec(recipe=recipe, out=one.uri, at=10, **ASKED))
        assert cut.trajectory().checkpoint_steps.tolist()[-1] == 10
        table = (
            cut.contributions()
            .to_table()
            .sort_by([("test_index", "ascending"), ("train_index", "ascending")])
        )
        found.append(table["contribution"].to_numpy())
    assert np.array_equal(*found)


def test_settings_moved_between_forward_pass_and_step_are_followed(tmp_path):
    model, optimizer, watched = simple(tmp_path / "run", recipe=Mine(), check=2)
    with watched as rec:
        for k, indices in enumerate(batches()):
            rec.batch(indices)
            losses_of(model, indices).mean().backward()
            optimizer.param_groups[0]["lr"] = 0.1 * (k + 1)
            optimizer.step()
            optimizer.zero_grad()
    assert open_run(str(tmp_path / "run")).trajectory().learning_rate[:, 0].tolist() == [0.1, 0.2]
