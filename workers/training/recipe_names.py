"""Names on a recipe that hydra-pipe does not know: likely mistakes are said.

A recipe may have attributes and methods of its own. One is taken for a mistake when nothing in the
recipe's code reads it and it is either a name that other trainers give such a thing (``sampler``,
``gradient_clip_val``) or nearly one of ours (``epoch``).
"""

from __future__ import annotations

import difflib
import dis
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from ..recipe import Recipe

NEAR = 0.8
"""Similarity (difflib) from which on an unknown name is taken for a known one."""

_EPOCHS = "say epochs"
_BATCH = "say batch_size"
_CLIP = "say clip_grad_norm, the largest norm of a step's gradient"
_ACCUMULATE = "say accumulate, the batches of a step"
_ORDER = "say order(epoch, generator), which returns the training indices of an epoch"
_TRAIN = "say train_dataset(), and batch_size"
_TEST = "say test_dataset(), and batch_size"
_VALIDATION = "say validation_dataset()"
_LOSS = "say losses(model, batch), one loss a sample"
_OPTIMIZER = "say optimizer(model)"
_SCHEDULER = "say scheduler(optimizer)"
_DTYPE = "use --dtype float32 or float64"

ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs", "nb_epochs", "num_train_epochs"), _EPOCHS),
    **dict.fromkeys(("batchsize", "bs", "train_batch_size", "per_device_train_batch_size"), _BATCH),
    **dict.fromkeys(
        (
            "gradient_clip_val",
            "gradient_clip_algorithm",
            "gradient_clip",
            "gradient_clipping",
            "grad_clip",
            "clip_grad",
            "clip_grad_value",
            "clip_gradients",
            "max_grad_norm",
        ),
        _CLIP,
    ),
    **dict.fromkeys(
        (
            "accumulate_grad_batches",
            "gradient_accumulation_steps",
            "accumulation_steps",
            "grad_accum",
            "grad_accumulation",
        ),
        _ACCUMULATE,
    ),
    **dict.fromkeys(
        ("sampler", "batch_sampler", "train_sampler", "shuffle", "sample_weights", "drop_last"), _ORDER
    ),
    **dict.fromkeys(
        ("train_dataloader", "train_loader", "dataloader", "trainloader", "train_data", "trainset"), _TRAIN
    ),
    **dict.fromkeys(
        ("test_dataloader", "test_loader", "testloader", "test_data", "testset", "eval_dataset"), _TEST
    ),
    **dict.fromkeys(
        ("val_dataloader", "val_loader", "val_dataset", "valid_dataset", "val_data"), _VALIDATION
    ),
    **dict.fromkeys(("criterion", "loss", "loss_fn", "loss_function", "compute_loss"), _LOSS),
    **dict.fromkeys(("training_step", "train_step", "validation_step", "test_step"), _LOSS),
    **dict.fromkeys(("configure_optimizers", "optimizers", "create_optimizer", "optim"), _OPTIMIZER),
    **dict.fromkeys(("lr_scheduler", "lr_schedule", "schedulers", "create_scheduler"), _SCHEDULER),
    **dict.fromkeys(("collate_fn", "data_collator"), "say collate(items)"),
    **dict.fromkeys(("random_seed", "manual_seed"), "say seed"),
    **dict.fromkeys(("precision", "fp16", "bf16", "amp", "use_amp"), _DTYPE),
    **dict.fromkeys(("configure_model", "build_model", "get_model", "net", "network"), "say model()"),
}
"""What other trainers call it -> what to do here."""

_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_CONST")

HARMLESS = frozenset({"show"})
"""Names of the contract that change no number."""


def unknown_names(recipe: Recipe) -> list[str]:
    """Return one warning for each name on the recipe that is likely to be a mistake."""
    known = [name for name in dir(Recipe) if not name.startswith("_")]
    own = [name for name in _own_names(recipe) if name not in {*known, *HARMLESS}]
    read = _names_read(recipe) if own else set()
    found = []
    for name in own:
        hint = ELSEWHERE.get(name)
        if hint is None:
            close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=NEAR)
            hint = f"did you mean {close[0]}?" if close else None
        if hint is not None and name not in read:
            found.append(f"recipe {recipe.name!r} has {name!r}, which nothing reads: {hint}")
    return found


def nearest_defined(recipe: Recipe, method: str) -> str | None:
    """Return the recipe's own method that seems to be meant where ``method`` is missing."""
    own = [name for name in _own_names(recipe) if callable(getattr(type(recipe), name, None))]
    elsewhere = [name for name in own if f"say {method}" in ELSEWHERE.get(name, "")]
    close = difflib.get_close_matches(method, [n for n in own if not hasattr(Recipe, n)], n=1, cutoff=NEAR)
    return next(iter([*elsewhere, *close]), None)


def _own_names(recipe: Recipe) -> list[str]:
    """Return the public names that the recipe's classes and the instance add to ``Recipe``."""
    spaces = [vars(kind) for kind in _classes(recipe)]
    names = [name for space in [*spaces, vars(recipe)] for name in space]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def _classes(recipe: Recipe) -> list[type]:
    return [kind for kind in type(recipe).__mro__ if kind not in Recipe.__mro__]


def _names_read(recipe: Recipe) -> set[str]:
    """Return every attribute that code of the recipe's classes or of their modules reads."""
    read: set[str] = set()
    for kind in _classes(recipe):
        module = sys.modules.get(kind.__module__)
        around = [value for value in vars(module).values() if not _other(value)] if module else []
        for value in [*vars(kind).values(), *around]:
            for function in _functions(value, kind.__module__):
                read.update(_attributes(function.__code__))
    return read


def _other(value: Any) -> bool:
    """Whether this is a recipe class: what one reads, another one may have misspelt."""
    return isinstance(value, type) and issubclass(value, Recipe)


def _functions(value: Any, module: str, depth: int = 2) -> Iterator[Callable[..., Any]]:
    """Yield the functions in ``value``: itself, a property's, a wrapped one's, those of a class of ``module``."""
    if isinstance(value, type):
        if value.__module__ == module and depth:
            for inner in vars(value).values():
                yield from _functions(inner, module, depth - 1)
        return
    for candidate in (
        value,
        *(getattr(value, part, None) for part in ("__func__", "__wrapped__", "fget", "func")),
    ):
        if isinstance(getattr(candidate, "__code__", None), CodeType):
            yield candidate


def _attributes(code: CodeType) -> Iterator[str]:
    """Yield the attributes that code reads, by name or, as ``getattr`` does, by text."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in _READS and isinstance(instruction.argval, str):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attributes(constant)
