"""Refuse, before any training, a recipe whose samples cannot be traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.data import IterableDataset, Subset

from ...storage.errors import RecipeError
from ...storage.uri import check_name
from ..data.batches import batch_length, fetch, to_device
from ..data.cast import cast_model
from ..data.user_code import user_code
from ..recipe import Recipe
from .recipe_names import nearest_defined


def check_numbers(recipe: Recipe, *, least_epochs: int = 1) -> None:
    """Check epochs, batch size and the other plain attributes of a recipe.

    Args:
        recipe: The recipe.
        least_epochs: 0 where nothing is trained.

    Raises:
        RecipeError: One is out of range, or a required method is missing.
    """
    for name, least in (("epochs", least_epochs), ("batch_size", 1)):
        value = getattr(recipe, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RecipeError(
                f"recipe {recipe.name!r}: {name} is {value!r} and must be an integer of 1 or more"
            )
    if not isinstance(recipe.seed, int):
        raise RecipeError(f"recipe {recipe.name!r}: seed is {recipe.seed!r} and must be an integer")
    choices = {
        "scheduler_interval": ("epoch", "step"),
        "plateau_metric": ("train", "validation", "train+validation"),
    }
    for name, allowed in choices.items():
        if getattr(recipe, name) not in allowed:
            raise RecipeError(
                f"recipe {recipe.name!r}: {name} is {getattr(recipe, name)!r}; use one of {', '.join(allowed)}"
            )
    check_name(recipe.name, "recipe name")
    for method in ("model", "train_dataset", "test_dataset", "losses", "optimizer"):
        if method not in vars(recipe) and getattr(type(recipe), method) is getattr(Recipe, method):
            near = nearest_defined(recipe, method)
            hint = f"; is {near}() meant? rename it" if near else "; add it (see docs/tutorial.md)"
            raise RecipeError(f"recipe {recipe.name!r} does not define {method}(){hint}")


def check_dataset(dataset: Any, what: str) -> int:
    """Return the length of a map-style dataset.

    Raises:
        RecipeError: It has no length, no items, or is iterable-style.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise RecipeError(
            f"the {what} dataset ({type(dataset).__name__}) is not map-style: samples need an index; "
            "give it __len__ and __getitem__"
        )
    try:
        count = len(dataset)
    except TypeError:
        raise RecipeError(
            f"the {what} dataset ({type(dataset).__name__}) has no length; give it __len__"
        ) from None
    if count < 1:
        raise RecipeError(f"the {what} dataset has 0 samples; it needs at least 1")
    return count


def check_overlap(train: Any, test: Any) -> None:
    """Refuse training and test datasets that share samples.

    Raises:
        RecipeError: They are one object, or subsets of one dataset with common indices.
    """
    if train is test:
        raise RecipeError("train and test dataset are the same object; give the test set its own samples")
    left, right = _identity(train), _identity(test)
    if left[0] is right[0]:
        common = sorted(set(left[1]) & set(right[1]))
        if common:
            raise RecipeError(
                f"train and test share {len(common)} samples of one dataset (the first: index {common[0]}); "
                "split it without overlap"
            )


def _identity(dataset: Any) -> tuple[Any, Sequence[int]]:
    indices: Sequence[int] = range(len(dataset))
    while isinstance(dataset, Subset):
        indices = [int(dataset.indices[i]) for i in indices]
        dataset = dataset.dataset
    return dataset, indices


def check_layers(model: nn.Module) -> None:
    """Refuse layers whose hypergradient would be silently wrong.

    Raises:
        RecipeError: Names the layer, why, and what to use instead; or it is no model at all.
    """
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model() returned {type(model).__name__} and must return a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise RecipeError(
            "model() returned a TorchScript module, which takes no hooks; return the plain module"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise RecipeError(
                f"layer {name!r} is SyncBatchNorm, which couples processes; use BatchNorm or GroupNorm"
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            if module.max_norm is not None:
                raise RecipeError(
                    f"layer {name!r} has max_norm={module.max_norm}, which rewrites weights in the forward "
                    "pass outside the optimiser; remove max_norm"
                )
            if module.scale_grad_by_freq:
                raise RecipeError(
                    f"layer {name!r} has scale_grad_by_freq=True, so that a sample's gradient depends on its batch; remove it"
                )
            if module.sparse:
                raise RecipeError(f"layer {name!r} has sparse=True gradients; use sparse=False")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise RecipeError(
                f"layer {name!r} has track_running_stats=False and normalises with batch statistics in testing too, so that "
                "test losses depend on how the test set is cut; use track_running_stats=True, or GroupNorm"
            )
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
                raise RecipeError(
                    f"layer {name!r} is under torch.nn.utils.{kind}, whose weight is no parameter and cannot be copied; "
                    f"use torch.nn.utils.parametrizations.{kind}"
                )
        if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
            raise RecipeError(f"layer {name!r} is lazy ({type(module).__name__}); give it its sizes")
    for name, parameter in model.named_parameters():
        if parameter.is_complex() or not parameter.is_floating_point():
            raise RecipeError(f"parameter {name!r} has dtype {parameter.dtype}; use a real floating dtype")


def check_losses(
    recipe: Recipe, model: nn.Module, dataset: Any, dtype: torch.dtype, what: str = "training"
) -> None:
    """Try the losses on three samples of the ``what`` set, in eval mode and without gradients.

    Model and batch are cast as training casts them.

    Raises:
        RecipeError: ``losses`` or ``collate`` raises, or returns the wrong shape.
    """
    size = min(3, len(dataset))
    modes = [(module, module.training) for module in model.modules()]
    cast_model(model, None, dtype).eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with user_code(f"losses() failed on the first {size} {what} samples:", always=True), torch.no_grad():
            batch = to_device(fetch(recipe, dataset, range(size)), device, dtype)
            losses = recipe.losses(model, batch)
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(losses, torch.Tensor) or losses.shape != (size,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise RecipeError(
            f"losses() returned {got} for {size} samples and must return shape ({size},): one loss a sample; "
            "use reduction='none' and average over everything but the batch axis"
        )
    if not losses.is_floating_point():
        raise RecipeError(f"losses() returned dtype {losses.dtype}; losses must be floating point")
    if not batch_length(batch):
        raise RecipeError(
            f"collate gave a batch of type {type(batch).__name__}, in which no tensor can be found; make it a "
            "tuple, list, dict (or another mutable mapping), NamedTuple, dataclass or SimpleNamespace of tensors"
        )
    if batch_length(batch) != size:
        raise RecipeError(
            f"collate gave a batch whose first tensor has {batch_length(batch)} rows for {size} samples; "
            "the batch must be on the leading axis of every tensor"
        )


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that cannot be stepped.

    Raises:
        RecipeError: It is neither None nor has ``step()``.
    """
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise RecipeError(
            f"scheduler() returned {type(scheduler).__name__} and must return a torch lr_scheduler, or None"
        )
