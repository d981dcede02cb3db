"""Training arguments that are refused, each by name, and the documentation's table of them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipes.hugging_face.arguments import REFUSALS, decisive, refuse

from tests import tiny_text

PAGE = Path(__file__).parents[4] / "docs" / "hugging-face.md"
ASKED: dict[str, Any] = {
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": ["full_shard"],
    "parallelism_config": SimpleNamespace(),
    "world_size": 2,
    "fp16": True,
    "optim": "adafactor",
    "optim_target_modules": "all-linear",
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "train_sampling_strategy": "group_by_length",
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "use_liger_kernel": True,
    "auto_find_batch_size": True,
    "resume_from_checkpoint": "checkpoint-10",
    "accelerator_config": {"use_seedable_sampler": False},
    "torch_compile": True,
    "tf32": True,
    "load_best_model_at_end": True,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_text.arguments(tmp_path_factory.mktemp("arguments"))


def changed(plain, name, value):
    """The arguments with one changed, past what transformers itself checks of it on this machine."""
    names = {*vars(plain), "world_size", "n_gpu"}
    return SimpleNamespace(**{**{key: getattr(plain, key) for key in names}, name: value})


@pytest.mark.parametrize("one", REFUSALS, ids=lambda one: one.name)
def test_an_argument_is_refused_by_name(one, plain):
    args = changed(plain, one.name, ASKED[one.name])
    told = (
        rf"^TrainingArguments\.{one.name}=.* is not supported: {re.escape(one.why)}; {re.escape(one.remedy)}$"
    )
    with pytest.raises(RecipeError, match=told):
        refuse(args, recording=True)
    if one.recorded_only:
        refuse(args)
    else:
        with pytest.raises(RecipeError, match=told):
            refuse(args)


def test_usual_arguments_are_followed(plain):
    refuse(plain, recording=True)
    assert decisive(plain)["optim"] == "adamw_torch_fused"
    for optim in ("lion_32bit", "adamw_bnb_8bit", "galore_adamw"):
        with pytest.raises(RecipeError, match=optim):
            refuse(changed(plain, "optim", optim))


def test_the_page_lists_the_arguments_that_are_refused():
    text = PAGE.read_text(encoding="utf-8").partition("## Arguments that are refused")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|(.*)\|$", text, re.MULTILINE)
    assert [(name, why, remedy) for name, why, remedy, _ in rows] == [
        (one.name, one.why.replace("_", "_"), one.remedy) for one in REFUSALS
    ]
    assert [last.strip() == "recording" for *_, last in rows] == [one.recorded_only for one in REFUSALS]
