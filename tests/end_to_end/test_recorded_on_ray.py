"""Runs of recorded loops and of Trainers' recipes on Ray: the bits of this process."""

from __future__ import annotations

import shutil

import pytest

from hydra_pipe import RunSpec, recording, run
from tests.end_to_end.support import assert_same_bits, numbers
from tests.pipeline.drive.loops import Bare, Whole, batches, losses_of

HERE = {"executor": "serial", "shards": 1}


@pytest.mark.ray
def test_a_recorded_loop_goes_on_with_the_same_bits(warm_ray, tmp_path):
    """Dropout, clipped steps of two batches, AdamW in groups; workers begin at the record's weights."""
    model = Whole().model()
    optimizer = Whole().optimizer(model)
    with recording(
        model, optimizer, out=tmp_path / "here", recipe=Bare(), clip_grad_norm=0.3, accumulate=2
    ) as rec:
        for indices in batches(2, 6):
            rec.step(indices, losses_of(model, indices))
    shutil.copytree(tmp_path / "here", tmp_path / "ray")
    there = {"executor": "ray", "address": warm_ray, "workers": 2, "shards": 3, "device": "cpu"}
    for name, fields in (("here", HERE), ("ray", there)):
        done = run(RunSpec(recipe=Bare(), out=str(tmp_path / name), **fields))
        assert done.info["layout"]["shards"] == fields["shards"]
    assert_same_bits(
        numbers(tmp_path / "ray", shard=False),
        numbers(tmp_path / "here", shard=False),
    )


@pytest.mark.ray
def test_a_trainers_recipe_has_the_same_bits(warm_ray, tmp_path):
    """Dropout, warm-up, clipping, accumulation of token means; the record is made by a worker, too."""
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    from hydra_pipe import TrainerRecipe
    from tests import tiny_text

    recipe = TrainerRecipe(
        args=tiny_text.arguments(tmp_path),
        model_init=tiny_text.gpt2_dropout,
        train_dataset=tiny_text.sequences(11, 1),
        eval_dataset=tiny_text.sequences(3, 2),
        data_collator=tiny_text.padded,
    )
    there = {"executor": "ray", "address": warm_ray, "workers": 2, "shards": 2, "device": "cpu"}
    for name, fields in (("here", HERE), ("ray", there)):
        done = run(RunSpec(recipe=recipe, out=str(tmp_path / name), **fields))
        assert done.info["layout"]["shards"] == fields["shards"]
    assert_same_bits(
        numbers(tmp_path / "ray", shard=False),
        numbers(tmp_path / "here", shard=False),
    )
