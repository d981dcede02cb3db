"""What a ``lightning.Trainer`` can be told and its record cannot follow, refused by name.

A refusal is one line: the argument with its value, why, and what to do instead. Trainer and module are looked at
by their attributes, so that Lightning need not be imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ....storage.errors import RecipeError
from .recipe import PRECISIONS

SWAPPING = ("StochasticWeightAveraging", "WeightAveraging", "ModelPruning")
"""Callbacks that put other weights into the module, by class, subclasses included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Something that is not followed.

    Attributes:
        name: Of the argument or method.
        found: Takes the Trainer; returns what to show of it, or None where it is not asked for.
        why: Why it is not followed.
        remedy: What to do instead.
    """

    name: str
    found: Callable[[Any], object | None]
    why: str
    remedy: str


def _kinds(thing: object) -> list[str]:
    return [kind.__name__ for kind in type(thing).__mro__]


def _strategy(trainer: Any) -> object | None:
    alone = "SingleDeviceStrategy" in _kinds(trainer.strategy) and trainer.world_size == 1
    return None if alone else type(trainer.strategy).__name__


def _accelerator(trainer: Any) -> object | None:
    kind = trainer.strategy.root_device.type
    return None if kind in ("cpu", "cuda") else kind


def _swapping(trainer: Any) -> object | None:
    names = (type(one).__name__ for one in trainer.callbacks if set(SWAPPING) & set(_kinds(one)))
    return next(names, None)


def _own(*methods: str) -> Callable[[Any], object | None]:
    """Return what finds the first of ``methods`` that module or datamodule have of their own."""

    def found(trainer: Any) -> object | None:
        for one in (trainer.lightning_module, trainer.datamodule):
            for method in methods if one is not None else ():
                code = getattr(one, method, None)
                home = getattr(inspect.unwrap(code), "__module__", "") if code is not None else ""
                if code is not None and home.partition(".")[0] not in ("lightning", "pytorch_lightning"):
                    return f"{type(one).__name__}.{method}"
        return None

    return found


def _takes_iterator(trainer: Any) -> object | None:
    takes = "dataloader_iter" in inspect.signature(trainer.lightning_module.training_step).parameters
    return "dataloader_iter" if takes else None


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        name="strategy",
        found=_strategy,
        why="one process with one device is followed",
        remedy="use Trainer(devices=1, num_nodes=1, strategy='auto')",
    ),
    Refusal(
        name="accelerator",
        found=_accelerator,
        why="replays run on CPU or CUDA",
        remedy="use accelerator='cpu' or 'gpu'",
    ),
    Refusal(
        name="precision=16-mixed",
        found=lambda trainer: trainer.precision if str(trainer.precision) == "16-mixed" else None,
        why="its GradScaler skips steps",
        remedy="use precision='bf16-mixed' or '32-true'",
    ),
    Refusal(
        name="precision",
        found=lambda trainer: trainer.precision if str(trainer.precision) not in PRECISIONS else None,
        why="training in low precision cannot be followed",
        remedy="use precision='bf16-mixed' or '32-true'",
    ),
    Refusal(
        name="gradient_clip_algorithm",
        found=lambda trainer: (
            "value"
            if trainer.gradient_clip_val
            and getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm) == "value"
            else None
        ),
        why="clipping by value is not followed",
        remedy="use gradient_clip_algorithm='norm'",
    ),
    Refusal(
        name="reload_dataloaders_every_n_epochs",
        found=lambda trainer: trainer.reload_dataloaders_every_n_epochs or None,
        why="rows of another dataset would be other samples",
        remedy="leave it at 0",
    ),
    Refusal(
        name="callbacks",
        found=_swapping,
        why="it puts other weights into the module than the steps made",
        remedy="leave it out while recording",
    ),
    Refusal(
        name="automatic_optimization",
        found=lambda trainer: None if trainer.lightning_module.automatic_optimization else False,
        why="manual optimization takes steps of its own",
        remedy="let Lightning optimize, or record your loop with hydra_pipe.recording",
    ),
    Refusal(
        name="torch.compile",
        found=lambda trainer: (
            None if getattr(trainer.lightning_module, "_compiler_ctx", None) is None else True
        ),
        why="replays run uncompiled, which gives other bits",
        remedy="give fit() the module itself",
    ),
    Refusal(
        name="training_step",
        found=_takes_iterator,
        why="which batches it draws is not known",
        remedy="write training_step(self, batch, batch_idx)",
    ),
    Refusal(
        name="backward",
        found=_own("backward"),
        why="a gradient of your own is not followed",
        remedy="write it into the loss, or record your loop with hydra_pipe.recording",
    ),
    Refusal(
        name="configure_gradient_clipping",
        found=_own("configure_gradient_clipping"),
        why="clipping of your own is not followed",
        remedy="use Trainer(gradient_clip_val=1.0)",
    ),
    Refusal(
        name="batch transfer hooks",
        found=_own("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device"),
        why="a replay takes batches as the dataset and collate_fn give them",
        remedy="do it in the dataset, in collate_fn, or in the module's forward()",
    ),
)
"""All of them, in the order of the documentation's table."""


def refuse(trainer: Any) -> None:
    """Refuse a Trainer, with the module and data that are attached to it, whose training is not followed.

    Raises:
        RecipeError: Names what, why, and what to do.
    """
    for one in REFUSALS:
        found = one.found(trainer)
        if found is not None:
            raise RecipeError(f"{one.name}: {found!s:.60} is not supported: {one.why}; {one.remedy}")
