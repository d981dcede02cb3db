"""Training again with other sample weights: the truth that contributions predict.

A retraining is the recorded training with every setting, batch and random draw as it was, in which
sample i counts ``weight_i`` times in the loss of its batch,

    loss_t = sum over the batch of  weight_i loss_i / B_t          (weight_i = 1 + N eps_i)

so that weight 0 is eps_i = -1/N: exactly what the contribution's derivative speaks of. B_t stays the
recorded batch size, and a sample of weight 0 stays in its batch, so that dropout, augmentation and
batch statistics are those of the record. Two ways to remove samples follow:

``weighted``: those that stay keep weight 1. Half of the samples removed halves every gradient, as
half the learning rate would.

``rescaled``: those that stay get weight N / (N - removed): the loss is the mean over what is left, and
the learning rate means what it meant.

A third way, ``subset``, is what somebody who deletes the samples would do: the recipe trained from
scratch, same seed, on the samples that are left, in batches drawn anew, with its own schedule. It
mixes the effect of the samples with that of another batch order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from ...storage.errors import InputError
from ...storage.trajectory import Trajectory
from ..data.batches import fetch, holds_tensors, to_device
from ..data.labels import Labels
from ..determinism import derived_seed, preserved_generators, seed_everything
from ..persample.engine import Watch
from ..recipe import Batch, Recipe
from .metrics import OutputWatch, evaluate, evaluating, evaluation_size, predicted
from .training import Compute, Training
from .verified import VerifiedReplay

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleLosses:
    """What a model makes of some samples.

    Attributes:
        loss: (n,) float64, eval mode.
        correct: (n,) int8: 1 predicted right, 0 wrong, -1 unknown.
    """

    loss: Floats
    correct: npt.NDArray[np.int8]


class WeightedTraining(Training):
    """A training whose samples count by weight; with weights of 1 the bits are the record's.

    Args:
        recipe: The user's recipe.
        compute: How to compute.
        weights_N: One weight a training sample, 1 + N eps_i.
    """

    def __init__(self, recipe: Recipe, compute: Compute, weights_N: Floats) -> None:
        super().__init__(recipe, compute)
        if weights_N.shape != (self.n_train,):
            raise InputError(
                f"{weights_N.shape[0]} sample weights for {self.n_train} training samples; is it the same recipe?"
            )
        self._weights = torch.from_numpy(weights_N).to(device=self.device, dtype=self.dtype)
        self._members: Tensor | None = None
        self.visited = np.zeros(self.n_train)
        """Sum of each sample's own losses over its visits, before weights, (N,)."""

    def step(self, step: int, batch: Batch, watch: Watch | None = None) -> Tensor:
        """Take one step of weighted losses; see ``Training.step``."""
        row = self.batches[step]
        self._members = torch.from_numpy(row[row >= 0].astype(np.int64))
        try:
            return super().step(step, batch, watch)
        finally:
            self._members = None

    def losses(self, batch: Batch, size: int) -> Tensor:
        """Return weight_i loss_i inside a training step, plain losses elsewhere, (B,)."""
        losses_B = super().losses(batch, size)
        if self._members is None:
            return losses_B
        np.add.at(self.visited, self._members.numpy(), losses_B.detach().double().cpu().numpy())
        return losses_B * self._weights[self._members.to(self.device)]


def retrain_weighted(
    recipe: Recipe,
    compute: Compute,
    trajectory: Trajectory,
    weights_N: Floats,
    report: Report | None = None,
) -> WeightedTraining:
    """Repeat the recorded training with other sample weights; return it, trained.

    With all weights 1 every recorded digest is checked on the way.

    Raises:
        ReplayDiverged: Batch order or initial weights (all weights 1: any weights) are not the
            recorded ones: another recipe, other data or another kind of machine.
        NonFiniteLoss: A batch loss is NaN or infinite.
    """
    training = WeightedTraining(recipe, compute, weights_N)
    verified = VerifiedReplay(training, trajectory, np.empty(0, dtype=np.int64))
    if (weights_N == 1).all():
        verified.replay(report)
        return training
    training.guarded = True
    settings = {name: getattr(trajectory, name) for name in training.family.settings}
    for step, batch in enumerate(training.loader()):
        training.apply_settings(settings, step)
        training.check_finite(step, float(training.step(step, batch)))
        if report:
            report(step + 1, training.steps)
    return training


def retrain_subset(
    recipe: Recipe,
    compute: Compute,
    kept: Integers,
    report: Report | None = None,
    *,
    weights: Floats | None = None,
) -> Training:
    """Train the recipe from scratch on the samples ``kept``; return it, trained.

    Args:
        recipe: The recipe.
        compute: How to compute.
        kept: Train indices, ascending, (n,).
        report: Hears of (steps done, steps in all).
        weights: How much each of them counts in the loss of its batch, (n,); None: 1.

    Raises:
        NonFiniteLoss: A batch loss is NaN or infinite.
    """
    smaller = only(recipe, kept)
    training = Training(smaller, compute) if weights is None else WeightedTraining(smaller, compute, weights)
    training.guarded = True
    scheduler = recipe.scheduler(training.optimizer)
    total, seen = 0.0, 0
    for step, batch in enumerate(training.loader()):
        loss = float(training.step(step, batch))
        training.check_finite(step, loss)
        total, seen = total + loss * training.batch_size(step), seen + training.batch_size(step)
        if step + 1 in training.epoch_ends:
            _move(scheduler, training, total / seen)
            total, seen = 0.0, 0
        elif scheduler is not None and training.updates[step] and recipe.scheduler_interval == "step":
            scheduler.step()
        if report:
            report(step + 1, training.steps)
    return training


def only(recipe: Recipe, kept: Integers) -> Recipe:
    """Return a recipe like ``recipe`` that trains on the samples ``kept`` alone."""
    smaller, whole = copy.copy(recipe), recipe.train_dataset

    def dataset() -> Dataset[Any]:
        full = whole()
        if holds_tensors(full):
            chosen = torch.from_numpy(kept)
            return TensorDataset(*(tensor.index_select(0, chosen) for tensor in full.tensors))
        return Subset(full, kept.tolist())

    smaller.train_dataset = dataset  # type: ignore[method-assign]
    smaller.order = _order_among(recipe, kept)  # type: ignore[method-assign, assignment]
    return smaller


def _order_among(recipe: Recipe, kept: Integers) -> Callable[[int, torch.Generator], Tensor | None]:
    """Return the recipe's order without the samples that are gone, renumbered."""
    order = recipe.order

    def among(epoch: int, generator: torch.Generator) -> Tensor | None:
        found = order(epoch, generator)
        if found is None:
            return None
        places = torch.as_tensor(found).numpy().astype(np.int64)
        left = np.searchsorted(kept, places)
        inside = (left < len(kept)) & (kept[np.minimum(left, len(kept) - 1)] == places)
        return torch.from_numpy(left[inside])

    return among


def _move(scheduler: Any, training: Training, train_loss: float) -> None:
    """Move the scheduler at the end of an epoch, as the record does."""
    if scheduler is None:
        return
    if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step()
        return
    recipe = training.recipe
    with preserved_generators():
        seed_everything(recipe.seed)
        validation = recipe.validation_dataset()
    if validation is None or recipe.plateau_metric == "train":
        scheduler.step(train_loss)
        return
    loss, _ = evaluate(recipe, training.model, validation, None, training.device, training.dtype)
    scheduler.step(loss if recipe.plateau_metric == "validation" else train_loss + loss)


@torch.no_grad()
def sample_losses(training: Training, dataset: Dataset[Any], indices: Integers) -> SampleLosses:
    """Return loss and correctness of the given samples under the trained model, in eval mode."""
    recipe, labels = training.recipe, Labels(training.recipe, dataset)
    loss = np.empty(len(indices))
    correct, no_classes = np.full(len(indices), -1, dtype=np.int8), False
    with preserved_generators(), evaluating(training.model):
        place = (training.device, training.dtype)
        size = evaluation_size(recipe, training.model, dataset, indices.tolist(), *place)
        watch = OutputWatch(training.model)
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            span = slice(start, start + len(chosen))
            seed_everything(derived_seed(recipe.seed, "evaluate", start))
            batch = to_device(fetch(recipe, dataset, chosen), training.device, training.dtype)
            # Not training.losses: those are weighted inside a step.
            loss[span] = recipe.losses(training.model, batch).double().cpu().numpy()
            found = predicted(recipe, training.model, batch, watch, len(chosen))
            classes = labels.of(batch, chosen)
            if found is not None and classes is not None:
                correct[span] = (found.cpu() == classes).numpy()
                no_classes = no_classes or bool((classes < 0).any())
        watch.close()
    if no_classes:
        correct[:] = -1
    return SampleLosses(loss=loss, correct=correct)


def test_losses(training: Training, indices: Integers) -> SampleLosses:
    """Return `sample_losses` of the recipe's test samples ``indices``."""
    with preserved_generators():
        seed_everything(training.recipe.seed)
        dataset = training.recipe.test_dataset()
    return sample_losses(training, dataset, indices)
