"""Class labels: what the batches hold, and not what an attribute of the dataset says.

What a sample is trained on is the target in its batch. A dataset's ``targets`` or ``labels`` is only a
fast way to it, and a wrong one where a ``target_transform`` or a wrapper renumbers the classes. So the
attribute must agree with a sample of the items first; where it does not, the items win. A recipe
that defines ``labels`` has the last word, and is told when its word is not what the batches hold.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from ...storage.errors import HydraError, RecipeError
from ..determinism import preserved_generators, seed_everything
from .batches import batch_length, fetch, is_plain
from .of_recipe import Batch, DataRecipe, is_default

AnyRecipe = TypeVar("AnyRecipe", bound=DataRecipe)

LOOKED_AT = 66
"""Samples on which an attribute must agree with the items: spread evenly, both ends among them."""

MOST = 32767
"""The largest class: labels are stored as int16."""

KEYS = ("labels", "label", "targets", "target")
"""Where a batch that is a mapping has its targets."""

_BLOCK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassLabels:
    """The classes of a dataset, and what is to be said of them.

    Attributes:
        values: One a sample, 0 to `MOST`; None where there are none.
        missing: Why there are none, where nobody said that there should be none.
        differing: How the dataset or the recipe contradicts the batches, one line; None if not.
    """

    values: list[int] | None
    missing: str | None = None
    differing: str | None = None


class Labels:
    """Gives the classes of batches, for accuracies: off the batch itself, at no cost.

    Args:
        recipe: The recipe.
        dataset: What the batches are made of.
    """

    def __init__(self, recipe: DataRecipe, dataset: Dataset[Any]) -> None:
        self.own = defines_labels(recipe)
        self.attribute = None if self.own else attribute_labels(dataset)
        self.given = recipe.labels(dataset) if self.own else self.attribute

    def of(self, batch: Batch, indices: Sequence[int] | npt.NDArray[Any]) -> Tensor | None:
        """Return the classes of a batch, (B,) int64 on the CPU, or None. May be negative.

        Args:
            batch: The batch, collated.
            indices: Positions of its samples in the dataset, (B,).
        """
        return self.settled(targets_of(batch), indices)

    def settled(self, found: Targets, indices: Sequence[int] | npt.NDArray[Any]) -> Tensor | None:
        """Return the classes of the samples whose batch held these targets, maybe on a device; see ``of``."""
        known = None if self.given is None else torch.tensor([int(self.given[int(i)]) for i in indices])
        if self.own:
            return known
        found = found.on_host()
        if known is not None and any(torch.equal(known, part) for part in found.values()):
            return known
        # The second of three or more parts may be anything, unless the dataset says that it has classes.
        if found.sure or (known is not None and found.second is not None):
            return found.second
        return known


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The parts of a batch that may be its classes: integers, one a sample.

    Attributes:
        second: The second part of a tuple, or the part of a mapping that `KEYS` name.
        others: Further parts of a tuple of three or more.
        sure: Whether ``second`` is the batch's target and can be nothing else.
    """

    second: Tensor | None = None
    others: tuple[Tensor, ...] = ()
    sure: bool = False

    def values(self) -> list[Tensor]:
        """Return all of them, the second first."""
        return [*([] if self.second is None else [self.second]), *self.others]

    def on_host(self) -> Targets:
        """Return them on the CPU; a device is waited for."""
        second = None if self.second is None else self.second.cpu()
        return replace(self, second=second, others=tuple(part.cpu() for part in self.others))


def targets_of(batch: Batch) -> Targets:
    """Return what a batch holds that may be classes."""
    size = batch_length(batch)
    if isinstance(batch, Mapping):
        found = next((part for key in KEYS if (part := _classes(batch.get(key), size)) is not None), None)
        return Targets(second=found, sure=found is not None)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return Targets()
    parts = [_classes(part, size) for part in batch[1:]]
    others = tuple(part for part in parts[1:] if part is not None)
    return Targets(second=parts[0], others=others, sure=len(parts) == 1 and parts[0] is not None)


def _classes(part: Any, size: int) -> Tensor | None:
    if not isinstance(part, Tensor) or part.shape != (size,) or part.is_floating_point() or part.is_complex():
        return None
    return part.detach().long()


class Accuracy:
    """Counts right predictions. Unknown (NaN) as soon as a class is negative: then it is no class."""

    def __init__(self) -> None:
        self.right = self.known = 0
        self.classes = True
        self._waiting: list[tuple[Tensor, Callable[[], Tensor | None]]] = []

    def add(self, predicted: Tensor | None, classes: Tensor | None) -> None:
        """Count a batch; either may be unknown."""
        if predicted is not None and classes is not None:
            self.add_later(predicted, lambda: classes)

    def add_later(self, predicted: Tensor, classes: Callable[[], Tensor | None]) -> None:
        """Count a batch whose classes are only asked for with the value, so that no device is waited for before."""
        self._waiting.append((predicted, classes))

    def _look(self) -> None:
        asked = [(predicted, classes()) for predicted, classes in self._waiting]
        known = [(predicted, classes) for predicted, classes in asked if classes is not None]
        self._waiting = []
        if not known:
            return
        every = torch.cat([classes for _predicted, classes in known])
        self.classes = self.classes and bool((every >= 0).all())
        self.right += int((torch.cat([predicted for predicted, _ in known]).cpu() == every).sum())
        self.known += len(every)

    @property
    def value(self) -> float:
        """The share of right predictions."""
        self._look()
        return self.right / self.known if self.known and self.classes else math.nan


def defines_labels(recipe: DataRecipe) -> bool:
    """Whether the recipe has a ``labels`` of its own."""
    return not is_default(recipe, "labels")


def with_labels(recipe: AnyRecipe, labels: npt.NDArray[Any]) -> AnyRecipe:
    """Return a recipe whose every dataset has these labels, -1 where there are none.

    For a worker that looks at one dataset whose labels the driver knows.
    """
    known = copy.copy(recipe)
    values = None if (labels < 0).any() else labels.tolist()
    known.labels = lambda dataset: values  # type: ignore[method-assign]
    return known


def attribute_labels(dataset: Any) -> list[int] | None:
    """Return ``targets``, ``labels`` or the second tensor of a ``TensorDataset``, through any ``Subset``."""
    if isinstance(dataset, Subset):
        inner = attribute_labels(dataset.dataset)
        return None if inner is None else [int(inner[i]) for i in dataset.indices]
    for attribute in ("targets", "labels"):
        values = getattr(dataset, attribute, None)
        if values is not None and not callable(values) and _length(values) == len(dataset):
            return _integers(values)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return _integers(dataset.tensors[1])
    return None


def _length(values: Any) -> int | None:
    try:
        return len(values)
    except TypeError:
        return None


def _integers(values: Any) -> list[int] | None:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):  # class names, say: no integers to be had
        return None
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex():
        return None
    return [int(v) for v in tensor.tolist()]


def class_labels(recipe: DataRecipe, dataset: Dataset[Any], what: str = "training") -> ClassLabels:
    """Return the class of every sample, as trained on.

    Reads `LOOKED_AT` items, or all of them where no attribute agrees with these. No generator of the
    process is moved.

    Args:
        recipe: The recipe.
        dataset: One of its datasets.
        what: Which one, for messages.

    Raises:
        RecipeError: The recipe's own ``labels`` are no classes, one a sample; or an item cannot be read.
    """
    count = len(dataset)  # type: ignore[arg-type]
    labels = Labels(recipe, dataset)
    if labels.own:
        values = check_labels(labels.given, count, what)
        if values is None:
            return ClassLabels(values=None)
    elif is_plain(recipe, dataset) and labels.attribute is not None:
        return _in_range(labels.attribute, what)
    with preserved_generators():
        seed_everything(0)
        chosen = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(np.int64))
        batch = _read(recipe, dataset, chosen, what)
        if labels.own:
            differing = _differing(labels, batch, chosen, what, "labels()", "labels() is used")
            return ClassLabels(values=values, differing=differing)
        sampled = labels.of(batch, chosen)
        if sampled is None:
            return ClassLabels(values=None, missing=_described(batch))
        known, differing = labels.attribute, None
        if known is not None and sampled.tolist() != [known[i] for i in chosen]:
            name = "the dataset's own (.targets or .labels)"
            differing = _differing(labels, batch, chosen, what, name, "the batches' are used")
            known = None
        if known is None:
            known = _all(recipe, dataset, labels, what)
    found = _in_range(known, what)
    return ClassLabels(values=found.values, missing=found.missing, differing=differing)


def check_labels(labels: Sequence[int] | None, count: int, what: str) -> list[int] | None:
    """Return labels as a list after checking number and range (int16).

    Raises:
        RecipeError: Their number is not the dataset's length, or one is out of range.
    """
    if labels is None:
        return None
    try:
        values = [int(v) for v in labels]
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"labels() of the {what} set must give integers ({error}); number the classes from 0, or return None"
        ) from None
    if len(values) != count:
        raise RecipeError(f"labels() gave {len(values)} labels for {count} {what} samples; give one a sample")
    if values and (min(values) < 0 or max(values) > MOST):
        raise RecipeError(
            f"labels() of the {what} set range from {min(values)} to {max(values)} and must lie in 0 to "
            f"{MOST}; number the classes from 0, or return None"
        )
    return values


def label_notes(labels: Mapping[str, ClassLabels], unpredicted: str | None) -> list[str]:
    """Return what the user should be told of the classes, one line each.

    Args:
        labels: What `class_labels` found, by what it is of.
        unpredicted: Why the model predicts no classes; None: it does.
    """
    notes = [found.differing for found in labels.values() if found.differing is not None]
    reasons: dict[str, list[str]] = {}
    for what, found in labels.items():
        if found.missing is not None:
            reasons.setdefault(found.missing, []).append(f"{what} set")
    if reasons:
        where = "; ".join(f"{' and '.join(sets)}: {reason}" for reason, sets in reasons.items())
        notes.append(
            f"no class labels ({where}), so no accuracy and no numbers by class there; "
            "where there are classes, define labels(dataset) in the recipe"
        )
    if unpredicted is not None and any(found.values is not None for found in labels.values()):
        notes.append(
            f"accuracy cannot be computed: {unpredicted}; define predictions(model, batch) in the recipe"
        )
    return notes


def _in_range(values: list[int] | None, what: str) -> ClassLabels:
    if values is None:
        return ClassLabels(values=None, missing=f"not all {what} items hold one")
    if min(values) < 0 or max(values) > MOST:
        span = f"targets range from {min(values)} to {max(values)}, and classes from 0 to {MOST}"
        return ClassLabels(values=None, missing=span)
    return ClassLabels(values=values)


def _all(recipe: DataRecipe, dataset: Dataset[Any], labels: Labels, what: str) -> list[int] | None:
    """Read the classes off all items."""
    values: list[int] = []
    count = len(dataset)  # type: ignore[arg-type]
    for start in range(0, count, _BLOCK):
        chosen = np.arange(start, min(start + _BLOCK, count))
        found = labels.of(_read(recipe, dataset, chosen, what), chosen)
        if found is None:
            return None
        values += found.tolist()
    return values


def _read(recipe: DataRecipe, dataset: Dataset[Any], chosen: npt.NDArray[np.int64], what: str) -> Batch:
    try:
        return fetch(recipe, dataset, chosen)
    except HydraError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise RecipeError(
            f"the {what} samples {chosen[0]} to {chosen[-1]} could not be read and collated: "
            f"{type(error).__name__}: {text}; correct the dataset or collate (--debug shows where)"
        ) from error


def _differing(
    labels: Labels, batch: Batch, chosen: npt.NDArray[np.int64], what: str, source: str, outcome: str
) -> str | None:
    """Say how the labels given differ from what a batch holds; None where they do not."""
    parts = targets_of(batch).values()
    given = labels.given
    assert given is not None
    here = [int(given[int(i)]) for i in chosen]
    if not parts or any(part.tolist() == here for part in parts):
        return None
    there = parts[0].tolist()
    wrong = [k for k in range(len(chosen)) if here[k] != there[k]]
    k = wrong[0]
    return (
        f"labels of the {what} set: {source} and the targets in the batches differ in {len(wrong)} of "
        f"{len(chosen)} samples looked at (sample {chosen[k]}: {here[k]} and {there[k]}); {outcome}"
    )


def _described(batch: Batch) -> str:
    """Say what a batch holds where its classes should be."""
    if isinstance(batch, Mapping):
        return f"a batch holds {', '.join(map(str, batch))} and no integer under {' or '.join(KEYS)}"
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return "a batch holds inputs alone"
    target = batch[1]
    if len(batch) > 2:
        return f"a batch holds {len(batch)} parts, and which one is the class is not said"
    if isinstance(target, Tensor):
        kind, inner = str(target.dtype).removeprefix("torch."), "".join(f", {n}" for n in target.shape[1:])
        return f"targets are {kind} of shape (B{inner or ','})"
    if isinstance(target, (tuple, list)) and target and isinstance(target[0], str):
        return f"targets are text, such as {target[0]!r}"
    return f"targets are {type(target).__name__}"
