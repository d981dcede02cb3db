"""The record of a ``transformers.Trainer``'s own training: `HydraCallback`.

The Trainer keeps its loop, optimizer, schedule, sampler, logging, evaluation and saving. Two things are taken
from it: batches are fetched by row, so that it is known which rows they are; and a batch's loss is added up from
the losses of its sequences, with generators seeded by the batch, so that a replay has the same bits.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...storage.errors import InputError
from ...workers.data.batches import fetch, to_device
from ...workers.determinism import derived_seed, preserved_generators, seed_everything
from ...workers.recipes.hugging_face.recipe import TrainerRecipe
from ..spec.spec import RunSpec
from .recording import Recording, recording

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError("HydraCallback needs transformers: pip install 'hydra-pipe[hf]'") from error

__all__ = ["HydraCallback"]


class HydraCallback(TrainerCallback):  # type: ignore[misc]
    """Records the training of a Trainer; give it to ``Trainer.add_callback`` before ``train()``.

    Args:
        trainer: The Trainer, which has not trained yet. Its model is copied as it is now.
        out: Run directory.
        threads: CPU threads of torch while training; replays use as many.
        checkpoint_every: Batches between checkpoints; None: about 20 in all.
        check: First batches that are replayed at once; 0: none.
        overwrite: Replace a run that is at ``out``.
        wait: Where another command writes to ``out`` when training begins, wait for it.

    Attributes:
        recipe: What replays the training, and shows its sequences.
        notes: What was left out of the record, one line each; known when the training has ended.

    Raises:
        RecipeError: An argument, or something that the Trainer does in its own way, is not followed; says which.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        out: str | os.PathLike[str],
        threads: int = 1,
        checkpoint_every: int | None = None,
        check: int = 8,
        overwrite: bool = False,
        wait: bool = False,
    ) -> None:
        self.recipe = TrainerRecipe.of(trainer, recording=True)
        self.notes: list[str] = []
        self._trainer, self._out, self._threads = trainer, os.fspath(out), threads
        self._record = functools.partial(
            recording,
            out=self._out,
            threads=threads,
            checkpoint_every=checkpoint_every,
            check=check,
            overwrite=overwrite,
            wait=wait,
        )
        self._recording: Recording | None = None
        self._data: Dataset[Any] = self.recipe.train_dataset()
        self._ended = False
        self._loader = trainer.get_train_dataloader
        self._loop = trainer._inner_training_loop
        trainer.get_train_dataloader = self._rows
        trainer.get_batch_samples = self._batches
        trainer.training_step = self._step
        trainer._clip_grad_norm = self._clip
        trainer._inner_training_loop = self._watched

    def spec(self, **fields: Any) -> RunSpec:
        """Return the specification of a run that goes on from the record: ``run(callback.spec())``.

        Args:
            fields: Further fields of ``RunSpec``, such as ``mode``, ``hessian`` or ``executor``.
        """
        return RunSpec(recipe=self.recipe, out=self._out, threads=self._threads, **fields)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the record: the optimizer is there, and has taken no step."""
        optimizer = self._trainer.optimizer
        entered = self._record(
            self._trainer.model,
            getattr(optimizer, "optimizer", optimizer),  # inside of accelerate's
            recipe=self.recipe,
            clip_grad_norm=self.recipe.clip_grad_norm,
            accumulate=args.gradient_accumulation_steps + 1,  # the Trainer steps, never the recording
            seed=self.recipe.seed,
        )
        self._recording = entered.__enter__()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an epoch of the record."""
        self._entered.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the record."""
        self._close(None)

    @property
    def _entered(self) -> Recording:
        if self._recording is None:
            raise InputError(
                "the Trainer trains without the callback; say trainer.add_callback(callback) before trainer.train()"
            )
        return self._recording

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's loop once; leave no half of a record where it raises."""
        if self._ended:
            raise InputError(
                f"{self._out} holds the record of this Trainer's training, and a record is of one; make a new Trainer"
            )
        try:
            return self._loop(*args, **kwargs)
        except BaseException as error:
            self._close(error)
            raise

    def _close(self, error: BaseException | None) -> None:
        held, self._recording, self._ended = self._recording, None, True
        if held is not None:
            held.__exit__(None if error is None else type(error), error, None)
            self.notes = held.notes

    def _rows(self) -> Any:
        """Return the Trainer's loader, of rows in the place of items."""
        trainer = self._trainer
        kept = trainer.train_dataset, trainer.data_collator
        trainer.train_dataset, trainer.data_collator = _Rows(len(self._data)), torch.tensor  # type: ignore[arg-type]
        try:
            return self._loader()
        finally:
            trainer.train_dataset, trainer.data_collator = kept

    def _batches(self, rows: Iterator[Tensor], count: int, device: torch.device) -> tuple[list[_Batch], None]:
        """Fetch the batches of a step, as a replay will."""
        found: list[_Batch] = []
        for number, row in enumerate(itertools.islice(rows, count)):
            indices = row.cpu().numpy()
            with preserved_generators():
                seed_everything(derived_seed(self.recipe.seed, "data", self._entered.begun + number))
                made = fetch(self.recipe, self._data, indices)
            batch = _Batch(to_device(made, device, torch.float32))
            batch.indices = indices
            found.append(batch)
        for batch, divisor in zip(found, self.recipe.divisors(found), strict=True):
            batch.divisor = divisor
        return found, None

    def _step(self, model: nn.Module, inputs: _Batch, _items: Any = None) -> Tensor:
        """Differentiate a batch."""
        model.train()
        held = self._entered
        held.batch(inputs.indices, divisor=inputs.divisor)
        return held.step(inputs.indices, self.recipe.losses(model, inputs), divisor=inputs.divisor)

    def _clip(self, _model: nn.Module) -> Tensor:
        return self._entered.clip()


class _Batch(dict[str, object]):
    """A batch that knows which rows it is of, and what the sum of its losses is divided by."""

    indices: Any = None
    divisor: float = 1.0


class _Rows(Dataset[int]):
    """Row numbers as items."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> int:
        return row
