"""Record: the first run. What it writes is all that later stages need to know about training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ...storage.errors import RecipeError
from ...storage.trajectory import TrajectoryWriter
from ...storage.trajectory_format import BORDERS
from ..data.batches import fetch, to_device
from ..data.cast import cast_model
from ..data.labels import Accuracy, Labels, targets_of
from ..data.user_code import user_code
from ..determinism import derived_seed, fingerprint, preserved_generators, seed_everything
from ..model.autocast import noticed
from ..model.layout import checksum, load_flat
from ..model.state import load_buffers, pack_buffers
from ..persample.reference import same_losses
from ..recipe import Batch, Recipe
from ..recursion.coefficients import stored_coefficients
from ..recursion.settings import Recorded
from .borders import wanted_borders
from .finite import check_norms
from .initial import initial_state, load_weights
from .metrics import OutputWatch, defines_predictions, evaluate, evaluating, evaluation_size
from .training import Training
from .update import UpdateCheck, check_hooks
from .visits import VisitWatch

Integers = npt.NDArray[np.int64]

CHECKPOINTS = 21
"""Checkpoints kept unless the spec says otherwise: the first, the last and up to 19 between."""

CHECKPOINT_BYTES = 2 << 30
"""All checkpoints together stay under this, but for the first and the last."""

DIGEST_EVERY = 10
"""Steps between two digests of the weights; 50 for models over 5 million parameters."""

REBUILT = 64
"""Test samples on which a model built anew must lose what the trained one loses."""

CHECKED = 16
"""So many first steps are held against the optimiser's formula; later those after which a digest is taken."""

EPOCH_COLUMNS = (
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
)


def checkpoint_steps(steps: int, dimension: int, itemsize: int, every: int | None) -> list[int]:
    """Return the steps after which weights are kept: 0, every so many and T.

    Args:
        steps: T.
        dimension: D.
        itemsize: Bytes of one weight; a checkpoint holds weights and momentum.
        every: How many steps apart, or None for a number bounded by ``CHECKPOINTS`` and ``CHECKPOINT_BYTES``.
    """
    if every is None:
        affordable = max(2, CHECKPOINT_BYTES // (2 * dimension * itemsize))
        every = max(1, math.ceil(steps / max(1, min(CHECKPOINTS, affordable) - 1)))
    return sorted({*range(0, steps, every), steps})


class Recorder:
    """Runs the recipe's training once and writes its trajectory.

    Args:
        training: A fresh ``Training``.
        uri: Where ``trajectory.zarr`` goes.
        every: Steps between checkpoints, or None (see ``checkpoint_steps``).
        visits: Whether own losses and margins of every visit are kept; changes nothing else.
        segments: Of a later replay, whose borders are kept beside the checkpoints; changes nothing else.
    """

    def __init__(
        self,
        training: Training,
        uri: str,
        every: int | None = None,
        *,
        visits: bool = True,
        segments: int = 1,
    ) -> None:
        self.training, recipe = training, training.recipe
        training.guarded = True
        self.scheduler = recipe.scheduler(training.optimizer)
        check_hooks(training.optimizer, training.model)  # of a scheduler's making
        names = {id(p): e.name for p, e in zip(training.parameters, training.layout.entries, strict=True)}
        self.update = UpdateCheck(training.optimizer, names)
        with preserved_generators():
            seed_everything(recipe.seed)
            self.test: Dataset[Any] = recipe.test_dataset()
            seed_everything(recipe.seed)
            self.validation: Dataset[Any] | None = recipe.validation_dataset()
        self.labels = Labels(recipe, training.dataset)
        self.judged = [
            (name, dataset, Labels(recipe, dataset))
            for name, dataset in (("validation", self.validation), ("test", self.test))
            if dataset is not None
        ]
        steps, groups = training.steps, len(training.optimizer.param_groups)
        self.settings = {name: np.zeros((steps, groups)) for name in training.family.settings}
        self.optimizer_told = {**training.optimizer_told, **training.optimizer_state().told()}
        self.loss = np.zeros(steps)
        # Elsewhere a look makes the host wait for the device: there it is taken where a digest is.
        self.at_once = training.device.type == "cpu"
        training.looks_later = not self.at_once
        self._losses: list[
            tuple[int, torch.Tensor, torch.Tensor]
        ] = []  # step, batch loss, own losses: not looked at
        self.checked = 0
        self.noted = False
        self.autocast: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.digests: dict[int, int] = {0: training.weight_checksum()}
        self.epoch_digest: list[str] = []
        self.epochs = {name: np.full(training.epochs, np.nan) for name in EPOCH_COLUMNS}
        dimension = training.layout.dimension
        self.digest_every = DIGEST_EVERY if dimension <= 5_000_000 else 5 * DIGEST_EVERY
        kept = checkpoint_steps(steps, dimension, training.dtype.itemsize, every)
        # Only between two steps of the optimiser is all there is in weights and state.
        between = {int(training.schedule.first[k]) if k < steps else k for k in kept}
        wanted = wanted_borders(steps, segments, sorted(between))
        self.borders = sorted({int(training.schedule.first[k]) for k in wanted} - between)
        self.kept = sorted({*between, *self.borders})
        self.writer = TrajectoryWriter(
            uri,
            dimension=dimension,
            dtype=training.compute.dtype,
            checkpoint_steps=self.kept,
            buffer_bytes=len(pack_buffers(training.model)),
            parameter_count=len(training.layout.entries),
            moments=training.family.counts,
        )
        # Predictions of the recipe's own would cost a second forward pass, which may move the model's state.
        self.classes = not defines_predictions(recipe)
        self.visits = (
            VisitWatch(self.writer, training.epochs, training.n_train, classes=self.classes)
            if visits
            else None
        )
        self.kept_visits: dict[str, Any] | None = None

    def run(self, report: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Train, write, and return the closing numbers (losses and accuracies of the last epoch).

        Raises:
            NonFiniteLoss: A batch loss is NaN or infinite; nothing is left under the final name.
            RecipeError: See ``Training.step``.
        """
        try:
            self._keep(0)
            self._train(report)
            self._finish()
        except BaseException:
            self.writer.abort()
            raise
        closing = {name: float(values[-1]) for name, values in self.epochs.items() if len(values)}
        known = {name: value for name, value in closing.items() if not math.isnan(value)}
        return {"checked_steps": self.checked, **known}

    @property
    def visit_arrays(self) -> tuple[str, ...]:
        """Which arrays of the visits were written."""
        return () if self.kept_visits is None else tuple(self.kept_visits["arrays"])

    def _train(self, report: Callable[[int, int], None] | None) -> None:
        training = self.training
        watch = OutputWatch(training.model)
        accuracy = Accuracy()
        for step, batch in enumerate(training.loader()):
            for name, values in training.read_settings().items():
                self.settings[name][step] = values
            self._step(step, batch, watch, accuracy)
            done = step + 1
            digest = done % self.digest_every == 0 or done == training.steps
            if self.at_once or digest or done in training.epoch_ends:
                self._look()
            if digest:
                self.digests[done] = training.weight_checksum()
            if done in training.epoch_ends:
                self._end_epoch(training.epoch_ends.index(done), accuracy.value)
                accuracy = Accuracy()
            elif training.updates[step] and training.recipe.scheduler_interval == "step":
                self._move_scheduler(None, done)
            if done in self.kept:
                self._keep(done)
            if report:
                report(done, training.steps)
        watch.close()

    def _step(self, step: int, batch: Batch, watch: OutputWatch, accuracy: Accuracy) -> None:
        """Take a step; count how many training samples it predicted right, where that is known."""
        training = self.training
        ends = bool(training.updates[step])
        if training.schedule.first[step] == step:
            self.noted = self._checks(int(training.schedule.last[step]))
            if self.noted:
                self.update.before()
        checked = self.noted and ends
        self.checked += checked
        with noticed() if step == 0 else nullcontext(self.autocast) as found:
            self._losses.append((step, training.step(step, batch), training.own_losses))
        self.autocast = found
        if self.at_once:
            self._look()
        if checked:
            self.update.after(step)
            check_hooks(training.optimizer, training.model)
            training.trainable.check_identity(step, training.steps)
        row = training.batches[step]
        members = row[row >= 0]
        output = watch.take(len(members))
        if not self.classes:
            output = None
        labels = cache(partial(self.labels.settled, targets_of(batch), members))
        if output is not None:
            accuracy.add_later(output.argmax(1), labels)
        if self.visits is not None:
            self.visits.add(members, training.own_losses, output, labels)

    def _look(self) -> None:
        """Take the losses of the steps since the last look, and raise for the first that is no number."""
        waiting, self._losses = self._losses, []
        if not waiting:
            return
        first, stop = waiting[0][0], waiting[-1][0] + 1
        self.loss[first:stop] = torch.stack([loss.double() for _step, loss, _own in waiting]).cpu().numpy()
        if not np.isfinite(self.loss[first:stop]).all():
            for step, _loss, own in waiting:
                self.training.check_finite(step, float(self.loss[step]), own)
        check_norms(self.training, self.loss)

    def _end_epoch(self, epoch: int, train_accuracy: float) -> None:
        training, recipe = self.training, self.training.recipe
        span = slice(training.epoch_ends[epoch - 1] if epoch else 0, training.epoch_ends[epoch])
        sizes = (training.batches[span] >= 0).sum(1)
        self.epochs["train_loss"][epoch] = float(np.average(self.loss[span], weights=sizes))
        self.epochs["train_accuracy"][epoch] = train_accuracy
        place = (training.device, training.dtype)
        for name, dataset, labels in self.judged:
            if name not in self.sizes:
                with preserved_generators(), evaluating(training.model):
                    count = range(len(dataset))  # type: ignore[arg-type]
                    self.sizes[name] = evaluation_size(recipe, training.model, dataset, count, *place)
            loss, accuracy = evaluate(recipe, training.model, dataset, labels, *place, self.sizes[name])
            self.epochs[f"{name}_loss"][epoch] = loss
            self.epochs[f"{name}_accuracy"][epoch] = accuracy
        if self.visits is not None:
            self.visits.end_epoch(epoch)
        self.epoch_digest.append(training.state_digest())
        self._move_scheduler(epoch, training.epoch_ends[epoch])

    def _move_scheduler(self, epoch: int | None, done: int) -> None:
        """Step the scheduler, after an epoch or between two steps; it may move settings and nothing else."""
        if self.scheduler is None:
            return
        surveyed = epoch is not None or self._checks(done - 1)
        before = self._state_checksums() if surveyed else None
        plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) and epoch is not None
        moment = f"step {done - 1}" if epoch is None else f"epoch {epoch}"
        with user_code(f"moving the scheduler after {moment} raised", always=True):
            self.scheduler.step(*([self._watched(epoch)] if plateau and epoch is not None else []))
        if before is not None and self._state_checksums() != before:
            raise RecipeError(
                f"scheduler.step() changed the weights or momentum after step {done - 1}, which no replay can follow; "
                "let it change settings of the optimizer alone"
            )

    def _state_checksums(self) -> tuple[int, int]:
        training = self.training
        states = [training.optimizer.state.get(p, {}) for p in training.parameters]
        vectors = [state.get(key) for state in states for key in training.family.vectors]
        return training.weight_checksum(), checksum([v for v in vectors if v is not None])

    def _checks(self, step: int) -> bool:
        """Whether a step is held against the optimiser's formula."""
        return step < CHECKED or (step + 1) % self.digest_every == 0

    def _watched(self, epoch: int) -> float:
        """What ReduceLROnPlateau sees: a loss of this epoch, by the recipe's ``plateau_metric``."""
        train, validation = (float(self.epochs[f"{k}_loss"][epoch]) for k in ("train", "validation"))
        metric = self.training.recipe.plateau_metric
        if metric == "train" or self.validation is None:
            return train
        return validation if metric == "validation" else train + validation

    def _keep(self, step: int) -> None:
        self.writer.write_checkpoint(
            self.kept.index(step),
            step,
            weights=self.training.weights().cpu().numpy(),
            buffers=pack_buffers(self.training.model),
            **self.training.optimizer_state().stored(),
        )

    def _check_rebuilt(self) -> None:
        """Refuse a model that keeps what it learns outside of its parameters and buffers.

        Later stages build it anew and load both: in eval mode it must lose what the trained one loses.

        Raises:
            RecipeError: It does not.
        """
        training, recipe = self.training, self.training.recipe
        count = min(REBUILT, len(self.test))  # type: ignore[arg-type]
        with preserved_generators():
            seed_everything(recipe.seed)
            rebuilt = cast_model(recipe.model(), training.device, training.dtype)
            load_weights(recipe, rebuilt, initial_state(recipe))  # what is frozen is in no checkpoint
            load_flat(training.layout.parameters(rebuilt), training.weights())
            load_buffers(rebuilt, pack_buffers(training.model))
            losses = []
            for model in (training.model, rebuilt):
                with evaluating(model), torch.no_grad():
                    seed_everything(derived_seed(recipe.seed, "evaluate", 0))
                    batch = to_device(fetch(recipe, self.test, range(count)), training.device, training.dtype)
                    losses.append(recipe.losses(model, batch))
        if not same_losses(losses[1], losses[0], float(losses[0].abs().max())):
            worst = float((losses[1] - losses[0]).abs().max())
            raise RecipeError(
                f"a model that is built anew and given the trained weights and buffers loses something else on the first "
                f"{count} test samples (off by {worst:.1e}): it keeps a state in plain attributes, or moves frozen parameters; register_buffer() them"
            )

    def _finish(self) -> None:
        self._check_rebuilt()
        training, recipe = self.training, self.training.recipe
        self.kept_visits = None if self.visits is None else self.visits.finish()
        settings, sometimes = self._settings()
        self.writer.finish(
            batches=training.batches,
            **settings,
            coefficient=self._coefficients(settings, sometimes),
            sometimes=sometimes,
            loss=self.loss,
            digest_step=np.array(sorted(self.digests), dtype=np.int64),
            digest=np.array([self.digests[k] for k in sorted(self.digests)], dtype=np.uint32),
            epoch_digest=self.epoch_digest,
            parameters=training.layout.entries,
            epochs=self.epochs,
            noisy=_noisy(recipe, training.dataset),
            visits=self.kept_visits,
            attrs={
                "n_train": training.n_train,
                "batch_size": recipe.batch_size,
                "seed": recipe.seed,
                **({BORDERS: self.borders} if self.borders else {}),
                **self._told(),
                "environment": fingerprint(training.device),
            },
        )

    def _told(self) -> dict[str, Any]:
        """Return what the attributes say of the schedule and of the optimiser."""
        training, ends = self.training, self.training.epoch_ends
        told: dict[str, Any] = {"epochs": training.epochs, "steps_per_epoch": ends[0] if ends else 0}
        if any(end != (epoch + 1) * ends[0] for epoch, end in enumerate(ends)):
            told["epoch_ends"] = list(ends)
        if training.weighted:
            told["weighted"] = True
        if self.autocast:
            told["autocast"] = sorted(self.autocast)
        if self.optimizer_told != {"family": "sgd", "class": "SGD"}:
            told["optimizer"] = self.optimizer_told
        return told

    def _settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the settings that every record has, and those that only some have."""
        training = self.training
        settings, sometimes = always_and_sometimes(self.settings)
        if training.weighted or training.schedule.accumulates:
            sometimes["divisor"] = training.divisors
        if training.schedule.accumulates:
            sometimes["updates"] = training.updates
        if training.clips is not None:
            sometimes |= {"clip_norm": training.clips[:, 0], "clip_factor": training.clips[:, 1]}
        if not training.active.all():
            sometimes["active"] = training.active
        return settings, sometimes

    def _coefficients(self, settings: dict[str, Any], sometimes: dict[str, Any]) -> npt.NDArray[np.float64]:
        return stored_coefficients(
            Recorded(
                parameters=self.training.layout.entries,
                batches=self.training.batches,
                optimizer=self.optimizer_told,
                **settings,
                **sometimes,
            )
        )


def always_and_sometimes(settings: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a family's settings as those that every record has, and those that only some have."""
    taken = dict(settings)
    none = np.zeros_like(taken["learning_rate"])
    always = ("learning_rate", "momentum", "weight_decay", "dampening", "nesterov")
    found = {name: taken.pop(name, none) for name in always}
    found["nesterov"] = found["nesterov"].astype(bool)
    return found, taken


def _noisy(recipe: Recipe, dataset: Dataset[Any]) -> tuple[Integers, Integers] | None:
    found = recipe.noisy_labels(dataset)
    if found is None:
        return None
    indices, original = (np.asarray(values, dtype=np.int64) for values in found)
    return indices, original
