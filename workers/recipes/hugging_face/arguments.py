"""What of ``transformers.TrainingArguments`` is followed, and what is refused by name.

A refusal is one line: the argument with its value, why, and what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ....storage.errors import RecipeError

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Values of ``optim`` that have a rule."""

SAMPLERS = ("random", "sequential")
"""Values of ``train_sampling_strategy`` whose order is made again."""

DECISIVE = (
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "bf16",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "remove_unused_columns",
)
"""Arguments that decide numbers; the others (logging, saving, evaluation, placement) decide none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """An argument that is not followed.

    Attributes:
        name: Of the argument.
        asked: Whether the arguments ask for it.
        why: Why it is not followed.
        remedy: What to do instead.
        recorded_only: Whether it stands in the way of recording a Trainer only: a recipe's own training does
            without it and gives the same model, to rounding.
    """

    name: str
    asked: Callable[[Any], bool]
    why: str
    remedy: str
    recorded_only: bool = False


def _seedable(args: Any) -> bool:
    config = args.accelerator_config
    found = config.get("use_seedable_sampler", True) if isinstance(config, dict) else None
    return bool(getattr(config, "use_seedable_sampler", True) if found is None else found)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        name="deepspeed",
        asked=lambda args: args.deepspeed is not None,
        why="its engine takes the optimizer's steps",
        remedy="train on one device without it",
    ),
    Refusal(
        name="fsdp",
        asked=lambda args: bool(args.fsdp),
        why="its shards are not followed",
        remedy="train on one device without it",
    ),
    Refusal(
        name="parallelism_config",
        asked=lambda args: args.parallelism_config is not None,
        why="parallel forms of a model are not followed",
        remedy="train on one device without it",
    ),
    Refusal(
        name="world_size",
        asked=lambda args: args.world_size > 1 or args.n_gpu > 1,
        why="one process with one device is followed",
        remedy="start the script plainly and with CUDA_VISIBLE_DEVICES=0",
    ),
    Refusal(
        name="fp16",
        asked=lambda args: bool(args.fp16),
        why="its GradScaler skips steps",
        remedy="use bf16=True, or float32",
    ),
    Refusal(
        name="optim",
        asked=lambda args: str(getattr(args.optim, "value", args.optim)) not in OPTIMIZERS,
        why="it has no rule",
        remedy=f"use {', '.join(OPTIMIZERS)}",
    ),
    Refusal(
        name="optim_target_modules",
        asked=lambda args: args.optim_target_modules is not None,
        why="only whole optimizers are followed",
        remedy="leave it out, or train adapters with peft",
    ),
    Refusal(
        name="label_smoothing_factor",
        asked=lambda args: args.label_smoothing_factor != 0,
        why="the smoothed loss has no form for each sequence here",
        remedy="set it to 0",
    ),
    Refusal(
        name="neftune_noise_alpha",
        asked=lambda args: args.neftune_noise_alpha is not None,
        why="its noise is drawn in a hook that no replay repeats",
        remedy="leave it out",
    ),
    Refusal(
        name="train_sampling_strategy",
        asked=lambda args: args.train_sampling_strategy not in SAMPLERS,
        why="its order is not made again",
        remedy=f"use {' or '.join(SAMPLERS)}",
    ),
    Refusal(
        name="lr_scheduler_type",
        asked=lambda args: (
            str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
            in ("reduce_lr_on_plateau", "greedy")
        ),
        why="it follows what evaluation finds",
        remedy="use linear, cosine or another schedule of steps alone",
    ),
    Refusal(
        name="use_liger_kernel",
        asked=lambda args: bool(args.use_liger_kernel),
        why="its fused loss gives no logits",
        remedy="leave it out",
    ),
    Refusal(
        name="auto_find_batch_size",
        asked=lambda args: bool(args.auto_find_batch_size),
        why="the batch size must be known before",
        remedy="set per_device_train_batch_size",
    ),
    Refusal(
        name="resume_from_checkpoint",
        asked=lambda args: bool(args.resume_from_checkpoint),
        why="the steps before the checkpoint were not recorded",
        remedy="train from the start, or from the checkpoint's weights as model",
    ),
    Refusal(
        name="accelerator_config",
        asked=lambda args: not _seedable(args),
        why="with use_seedable_sampler=False the order depends on all that was drawn before",
        remedy="leave use_seedable_sampler at True",
    ),
    Refusal(
        name="torch_compile",
        asked=lambda args: bool(args.torch_compile),
        why="replays run uncompiled, which gives other bits",
        remedy="leave it out while recording, or use TrainerRecipe",
        recorded_only=True,
    ),
    Refusal(
        name="tf32",
        asked=lambda args: bool(args.tf32),
        why="replays compute without TF32, which gives other bits",
        remedy="leave it out while recording, or use TrainerRecipe",
        recorded_only=True,
    ),
    Refusal(
        name="load_best_model_at_end",
        asked=lambda args: bool(args.load_best_model_at_end),
        why="contributions are to the model after the last step",
        remedy="set it to False",
    ),
)
"""All of them, in the order of the documentation's table."""


def refuse(args: Any, *, recording: bool = False) -> None:
    """Refuse arguments that are not followed.

    Args:
        args: ``transformers.TrainingArguments``.
        recording: Whether the Trainer's own training is to be recorded.

    Raises:
        RecipeError: Names the argument, why, and what to do.
    """
    for one in REFUSALS:
        if (recording or not one.recorded_only) and one.asked(args):
            value = getattr(args, one.name)
            shown = getattr(value, "value", value)
            raise RecipeError(
                f"TrainingArguments.{one.name}={shown!r:.60} is not supported: {one.why}; {one.remedy}"
            )


def decisive(args: Any) -> dict[str, Any]:
    """Return the arguments that decide numbers, JSON-able."""
    found = {}
    for name in DECISIVE:
        value = getattr(args, name)
        found[name] = getattr(value, "value", value)
    return found
