"""Mean loss and accuracy of a model on a dataset, beside the training run and without a trace in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.batches import fetch, rows_of, to_device
from ..data.labels import Accuracy, Labels
from ..determinism import derived_seed, generator_states, preserved_generators, seed_everything
from ..model.state import unchanged_buffers
from ..persample.reference import same_losses
from ..recipe import Batch, Recipe

EVALUATION_BATCH = 256


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode and give every submodule its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class OutputWatch:
    """Notes the last output of the model, so that predictions cost no second forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.output: Any = None
        self._handle = model.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.output = output.detach() if isinstance(output, Tensor) else None

    def take(self, size: int) -> Tensor | None:
        """Return the output, (B, classes), or None when it is something else."""
        output, self.output = self.output, None
        if output is None or output.ndim != 2 or output.shape[0] != size or output.shape[1] < 2:
            return None
        taken: Tensor = output
        return taken

    def classes(self, size: int) -> Tensor | None:
        """Return the arg max over (B, classes) outputs, or None when the output is something else."""
        output = self.take(size)
        return None if output is None else output.argmax(1)

    def close(self) -> None:
        """Take the hook off."""
        self._handle.remove()


def defines_predictions(recipe: Recipe) -> bool:
    """Whether the recipe says itself how it predicts."""
    return type(recipe).predictions is not Recipe.predictions


def evaluation_size(
    recipe: Recipe,
    model: nn.Module,
    dataset: Dataset[Any],
    indices: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Return how many samples go together: one where their losses would depend on how the set is cut."""
    first = list(indices[:EVALUATION_BATCH])
    seed_everything(derived_seed(recipe.seed, "evaluate", 0))
    batch = to_device(fetch(recipe, dataset, first), device, dtype)
    return 1 if see_each_other(recipe, model, batch, len(first)) else EVALUATION_BATCH


@torch.no_grad()
def see_each_other(recipe: Recipe, model: nn.Module, batch: Batch, size: int) -> bool:
    """Whether a sample's loss alone is another than in its batch (weights or negatives of the batch).

    Moves the generators. Losses that draw random numbers cannot be asked, and count as losses of their own.
    """
    if size < 2:
        return False
    fresh = generator_states()
    with unchanged_buffers(model):
        together = recipe.losses(model, batch)
        if fresh != generator_states():
            return False
        chosen = [0, size - 1]
        try:
            alone = [
                recipe.losses(model, rows_of(batch, torch.tensor([k], device=together.device), size))[0]
                for k in chosen
            ]
        except Exception:  # noqa: BLE001 - a loss that needs company
            return True
    return not same_losses(torch.stack(alone), together[chosen], float(together.abs().max()))


def predicted(recipe: Recipe, model: nn.Module, batch: Batch, watch: OutputWatch, size: int) -> Tensor | None:
    """Return predicted classes (B,): from the recipe where it says how, else off the last output."""
    if defines_predictions(recipe):
        return recipe.predictions(model, batch)
    return watch.classes(size)


def why_unpredicted(recipe: Recipe, watch: OutputWatch, size: int) -> str | None:
    """Return why the last output of a batch of ``size`` samples gives no classes; None: it does."""
    output = watch.output
    if defines_predictions(recipe) or watch.classes(size) is not None:
        return None
    if output is None:
        return "calling the model returns no tensor, or losses() does not call it as a whole"
    shape = ", ".join(map(str, ("B" if n == size else n for n in output.shape)))
    return f"the model returns shape ({shape}) and not (B, classes)"


@torch.no_grad()
def evaluate(
    recipe: Recipe,
    model: nn.Module,
    dataset: Dataset[Any],
    labels: Labels | None,
    device: torch.device,
    dtype: torch.dtype,
    size: int | None = None,
) -> tuple[float, float]:
    """Return (mean loss, accuracy); accuracy is NaN where there are no labels or predictions.

    ``size`` is how many samples go together, where ``evaluation_size`` has been asked before.
    """
    count = len(dataset)  # type: ignore[arg-type]
    total, accuracy = 0.0, Accuracy()
    with preserved_generators(), evaluating(model):
        size = size or evaluation_size(recipe, model, dataset, range(count), device, dtype)
        watch = OutputWatch(model)
        try:
            for start in range(0, count, size):
                indices = range(start, min(start + size, count))
                seed_everything(derived_seed(recipe.seed, "evaluate", start))
                batch = to_device(fetch(recipe, dataset, indices), device, dtype)
                total += float(recipe.losses(model, batch).double().sum())
                found = predicted(recipe, model, batch, watch, len(indices))
                if labels is not None:
                    accuracy.add(found, labels.of(batch, indices))
        finally:
            watch.close()
    return total / max(count, 1), accuracy.value
