"""The recipe: what the user brings.

A recipe names the model, the data, the loss of each sample, the optimiser and its schedule. It
holds no state of a run; every process that trains builds its own model and datasets from it.
Shape letters: B samples of a batch, N training samples, D trainable parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from .data.labels import class_labels
from .data.of_recipe import Batch, default_method
from .data.schedule import Schedule
from .data.show import Shown, default_look

__all__ = ["Batch", "InitialState", "Recipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialState:
    """Where a training starts, instead of freshly initialised weights.

    Attributes:
        weights: A ``state_dict()`` of the model: parameters and buffers by name, all of them and no others.
        optimizer: A ``state_dict()`` of the optimiser, or what it keeps of each parameter by the parameter's
            name. Only its state is taken (momentum, moments, step counts): settings are those of
            ``optimizer()`` and ``scheduler()``. None: it starts fresh.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] | None = None


class Recipe:
    """Subclass this to have a training run traced.

    Five methods are required: ``model``, ``train_dataset``, ``test_dataset``, ``losses`` and
    ``optimizer``. The rest have defaults. Instances must survive pickling (cloudpickle), because
    workers on other machines receive them; keep datasets out of ``self`` and build them in
    ``train_dataset``.

    Attributes:
        epochs: Passes over the training dataset.
        batch_size: Samples a step; the last batch of an epoch is smaller when N is no multiple.
        seed: Seeds initial weights, batch order, dropout and augmentation.
        num_workers: Processes that fetch batches; any number gives the same bits.
        scheduler_interval: ``"epoch"`` or ``"step"``: how often the scheduler moves.
        plateau_metric: What ``ReduceLROnPlateau`` watches: the mean loss on ``"validation"``, on
            ``"train"``, or the sum of both, ``"train+validation"``.
        clip_grad_norm: Largest norm of a step's gradient, clipped as ``torch.nn.utils.clip_grad_norm_`` does over
            all parameters; None: not clipped.
        accumulate: Batches a step of the optimiser: its loss is the mean of their means. What is left over at
            the end of an epoch makes a smaller step.
        max_steps: Steps of the optimiser in all, in the place of ``epochs``; None: ``epochs`` counts.
        picture_shape: (H, W) or (C, H, W) of inputs that are flattened images, for ``show``; None: they are none.
    """

    NAME: ClassVar[str | None] = None
    _stop: int | None = None  # batches after which training is taken to have ended, see `RunSpec.at`

    epochs: int = 20
    batch_size: int = 64
    seed: int = 0
    num_workers: int = 0
    scheduler_interval: Literal["epoch", "step"] = "epoch"
    plateau_metric: Literal["train", "validation", "train+validation"] = "validation"
    clip_grad_norm: float | None = None
    accumulate: int = 1
    max_steps: int | None = None
    picture_shape: tuple[int, ...] | None = None
    _schedule: Schedule | None = None  # of a record that a loop of the user's own made

    @property
    def name(self) -> str:
        """Name of the recipe in paths and tables: ``NAME`` or the class name in snake case."""
        return self.NAME or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def arguments(self) -> Mapping[str, Any]:
        """Return what distinguishes this instance from a plain one, as JSON-able values."""
        return {}

    def model(self) -> nn.Module:
        """Return a freshly initialised model. The global torch seed is set just before the call."""
        raise _missing(self, "model")

    def train_dataset(self) -> Dataset[Any]:
        """Return the map-style training dataset of length N; ``train_index`` is its index."""
        raise _missing(self, "train_dataset")

    def test_dataset(self) -> Dataset[Any]:
        """Return the map-style test dataset of length M; ``test_index`` is its index."""
        raise _missing(self, "test_dataset")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one loss per sample, shape (B,), without reduction."""
        raise _missing(self, "losses")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a ``torch.optim.SGD``, ``Adam`` or ``AdamW`` over the model's parameters."""
        raise _missing(self, "optimizer")

    def initial_state(self) -> InitialState | None:
        """Return the weights and the optimiser state that training starts from; None: fresh ones.

        Every process that trains calls it, after ``model()``. ``--init FILE`` takes its place.
        """
        return None

    def order(self, epoch: int, generator: torch.Generator) -> Sequence[int] | Tensor | None:
        """Return the training indices of an epoch in their order; None: a random permutation of all.

        Indices may be repeated or left out: weighted sampling, subsets, a curriculum. They are cut into
        batches of ``batch_size``.

        Args:
            epoch: From 0.
            generator: Seeded by (seed, epoch): draw from nothing else, so that a replay finds the same order.
        """
        return None

    @default_method
    def weights(self, batch: Batch) -> Tensor | None:
        """Return how much of its step's loss each sample of a batch makes up, (B,), or None.

        With weights, ``losses`` returns sums (such as over the tokens of a sequence), and the loss of a step is
        the sum of its samples' losses over the sum of their weights, over all batches of the step. None: the
        mean over samples.
        """
        return None

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return a ``torch.optim.lr_scheduler`` or None (constant settings)."""
        return None

    def validation_dataset(self) -> Dataset[Any] | None:
        """Return the dataset that ``ReduceLROnPlateau`` watches, or None."""
        return None

    @default_method
    def labels(self, dataset: Dataset[Any]) -> Sequence[int] | None:
        """Return the class of every sample of ``dataset`` in order, or None where there is none.

        The default is what the batches hold: the second part of a pair, or ``labels``, ``label``,
        ``targets`` or ``target`` of a mapping, where that is one integer a sample. ``targets`` or
        ``labels`` of the dataset, or a ``TensorDataset``'s second tensor, stand in for reading all
        items where they agree with a sample of these.
        """
        return class_labels(self, dataset).values

    def predictions(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Return the predicted class per sample, shape (B,), or None where that has no meaning.

        The default handles batches ``(inputs, targets)`` and models that return (B, classes).
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            return None
        try:
            output = model(batch[0])
        except TypeError:
            return None
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
            return None
        return output.argmax(1)

    def sample_targets(self, model: nn.Module, batch: Batch) -> Batch | None:
        """Return the batch with its targets drawn from the model's own distribution, or None.

        Used to estimate curvature. The default handles batches ``(inputs, classes)`` and models that
        return scores (B, classes) meant for a softmax; None means that there is no such thing, and
        the given targets are used.
        """
        scores = class_scores(model, batch)
        if scores is None:
            return None
        inputs, targets = batch
        drawn = torch.multinomial(scores.double().softmax(1), 1).squeeze(1)
        return [inputs, drawn.to(targets.dtype)]

    @default_method
    def collate(self, items: Sequence[Any]) -> Batch:
        """Join dataset items to a batch; PyTorch's ``default_collate`` unless overridden."""
        return default_collate(list(items))

    def show(self, item: Any) -> Shown:
        """Return an item of a dataset for people to look at: an image array, a text, or None.

        Images are (H, W), (H, W, 3) or (C, H, W), uint8 or floats from 0 to 1. The default shows the inputs
        of a pair or mapping: images scaled to their own range, tokens and features as text. It decides no
        number of a run: changing it makes no other recipe.
        """
        return default_look(item, self.picture_shape)

    def noisy_labels(self, dataset: Dataset[Any]) -> tuple[Any, Any] | None:
        """Return (train indices, their original labels) of labels wrong on purpose, or None."""
        return None


def class_scores(model: nn.Module, batch: Batch) -> Tensor | None:
    """Return what a model gives for the inputs of a batch ``(inputs, classes)``, (B, classes); None: it is otherwise."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return None
    inputs, targets = batch
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        return None
    try:
        with torch.no_grad():
            scores = model(inputs)
    except (TypeError, NotImplementedError):  # a model that is not called with the inputs
        return None
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[0] != len(targets):
        return None
    return scores


def _missing(recipe: Recipe, method: str) -> NotImplementedError:
    return NotImplementedError(f"{type(recipe).__name__} must define {method}()")
