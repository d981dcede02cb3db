"""The record of a ``lightning.Trainer``'s own training: `LightningCallback`.

The Trainer keeps its loop, optimizer, schedule, sampler, loss, hooks, logging, validation and checkpoints. Three things
change while it is recorded: batches are fetched with generators seeded by the batch, and so is each training step;
the closure runs before ``optimizer.step()`` instead of inside of it, which comes to the same for optimizers with a rule;
and the recording clips, by the same norm.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...storage.errors import InputError, RecipeError
from ...workers.recipes.lightning.recipe import LightningRecipe
from ...workers.recipes.lightning.refused import refuse
from ..spec.spec import RunSpec
from .lightning_rows import RowLoader
from .recording import Recording, recording

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("LightningCallback needs lightning: pip install 'hydra-pipe[lightning]'") from error

__all__ = ["LightningCallback"]

SEED = "PL_GLOBAL_SEED"
"""Environment variable in which ``lightning.seed_everything`` leaves its seed."""


class LightningCallback(Callback):  # type: ignore[misc]
    """Records the training of a ``lightning.Trainer``; give it to ``Trainer(callbacks=[...])``.

    Args:
        losses: Takes the LightningModule and a batch, gives one loss a sample, (B,); ``training_step`` must return
            its mean. ``losses=Net.losses`` will do where that is a method of the module, and ``losses=F.cross_entropy``
            for batches of inputs and targets.
        out: Run directory.
        test_dataset: Map-style: the samples that contributions are to. None: the dataset of the validation loader.
        seed: Keys generators; None: that of ``lightning.seed_everything``, or 0.
        threads: CPU threads of torch while training; replays use as many.
        checkpoint_every: Batches between checkpoints; None: about 20 in all.
        check: First batches that are replayed at once; 0: none.
        overwrite: Replace a run that is at ``out``.

    Attributes:
        notes: What was left out of the record, one line each; known when the training has ended.
    """

    def __init__(
        self,
        *,
        losses: Callable[[Any, Any], Tensor],
        out: str | os.PathLike[str],
        test_dataset: Any = None,
        seed: int | None = None,
        threads: int = 1,
        checkpoint_every: int | None = None,
        check: int = 8,
        overwrite: bool = False,
    ) -> None:
        self.notes: list[str] = []
        self._losses, self._test, self._out, self._threads = losses, test_dataset, os.fspath(out), threads
        self._seed = int(os.environ.get(SEED, "0")) if seed is None else seed
        self._record = functools.partial(
            recording,
            out=self._out,
            seed=self._seed,
            threads=threads,
            checkpoint_every=checkpoint_every,
            check=check,
            overwrite=overwrite,
        )
        self._recipe: LightningRecipe | None = None
        self._recording: Recording | None = None
        self._rows: RowLoader | None = None
        self._changed: _Changed | None = None
        self._restore: list[Callable[[], None]] = []
        self._begun = self._ended = False

    @property
    def recipe(self) -> LightningRecipe:
        """What replays the training: module, data and losses.

        Raises:
            InputError: The Trainer has not trained yet.
        """
        if self._recipe is None:
            raise InputError(
                "nothing was recorded yet; say Trainer(callbacks=[callback]) and trainer.fit(...)"
            )
        return self._recipe

    def spec(self, **fields: Any) -> RunSpec:
        """Return the specification of a run that goes on from the record: ``run(callback.spec())``.

        Args:
            fields: Further fields of ``RunSpec``, such as ``mode``, ``hessian`` or ``executor``.
        """
        fields.setdefault("dtype", "float64" if self.recipe.precision == "64-true" else "float32")
        return RunSpec(recipe=self.recipe, out=self._out, threads=self._threads, **fields)

    # ------------------------------------------------------------------ what Lightning calls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not followed, and stand where the Trainer fetches, steps and clips."""
        if stage != "fit":
            return
        if self._begun:
            raise InputError(
                f"{self._out} holds the record of a training, and a record is of one; make a new LightningCallback"
            )
        refuse(trainer)
        plugin, strategy = trainer.strategy.precision_plugin, trainer.strategy
        self._put(trainer._data_connector, "_prepare_dataloader", self._prepare)
        self._put(strategy, "training_step", functools.partial(self._step, trainer))
        self._put(plugin, "backward", self._backward)
        self._put(plugin, "clip_gradients", self._clip)
        self._put(plugin, "optimizer_step", functools.partial(self._optimizer_step, plugin))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the record with the next training step."""
        if self._rows is None or trainer.train_dataloader is not self._rows:
            kind = type(trainer.train_dataloader).__name__
            raise RecipeError(
                f"train_dataloaders is a {kind}, of which no single dataset's rows are known; give one torch.utils.data.DataLoader"
            )
        self._begun = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End an epoch of the record; batches without a step are left to its end."""
        held = self._recording
        if held is not None and held.done and held.begun == held.done:
            held.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record."""
        if self._changed is not None and self._recording is not None and self._recording.done:
            self._changed.check_weights("after the last step")
        self._close(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no half of a record."""
        self._close(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Trainer its own methods back."""
        self._release()

    # ------------------------------------------------------------------ in its places

    def _put(self, place: Any, name: str, ours: Callable[..., Any]) -> None:
        """Let ``ours`` be called instead of a method, and with it, until `_release`."""
        kept = getattr(place, name)
        setattr(place, name, functools.partial(ours, kept))
        self._restore.append(functools.partial(delattr, place, name))

    def _release(self) -> None:
        for back in self._restore:
            back()
        self._restore = []

    def _prepare(self, kept: Callable[..., Any], dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Put rows under the training loader."""
        found = kept(dataloader, *args, **kwargs)
        mode = kwargs.get("mode", args[1] if len(args) > 1 else None)
        if getattr(mode, "value", mode) != "train":
            return found
        self._rows = RowLoader(found, self._seed, self._next)
        return self._rows

    def _next(self) -> int:
        return 0 if self._recording is None else self._recording.begun

    def _step(self, trainer: Trainer, kept: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Announce a batch, and let the module's training step have it."""
        if not self._begun or self._ended:  # a tuner's trial
            return kept(*args, **kwargs)
        assert self._rows is not None
        held = self._recording or self._begin(trainer)
        parts, waiting = trainer.accumulate_grad_batches, held.begun - held.done
        if waiting and trainer.fit_loop.batch_idx % parts == 0:
            raise RecipeError(
                f"{waiting} batches before batch {held.begun} made no step of the optimizer (on_train_batch_start returned -1? an "
                "optimizer_step that skips?), which no replay can follow; let each group of accumulate_grad_batches make its step"
            )
        assert self._changed is not None
        if waiting:
            self._changed.check_weights(f"before the step of batch {held.begun - 1}")
            self._changed.check_gradients(held.begun - 1)
        held.batch(self._rows.next_rows(), parts=parts)
        found = kept(*args, **kwargs)
        if found is None:
            raise RecipeError(
                f"training_step() returned None for batch {held.begun - 1}, and a record has no batches without a loss; return one always"
            )
        self._changed.note_weights()
        return found

    def _begin(self, trainer: Trainer) -> Recording:
        """Begin the record: optimizer and weights are there, and no step was taken."""
        module, loader = trainer.lightning_module, self._rows
        assert loader is not None
        self._recipe = LightningRecipe(
            module=module,
            train_dataset=loader.given.dataset,
            test_dataset=self._tested(trainer),
            losses=self._losses,
            collate_fn=loader.given.collate_fn,
            precision=trainer.precision,
        )
        self._recipe.seed, self._recipe.num_workers = self._seed, loader.num_workers
        held = self._record(
            module,
            trainer.optimizers[0],
            recipe=self._recipe,
            clip_grad_norm=trainer.gradient_clip_val or None,
            accumulate=max(2, trainer.accumulate_grad_batches),  # the Trainer steps, never the recording
        )
        self._changed = _Changed(module)
        self._recording = held.__enter__()
        return self._recording

    def _tested(self, trainer: Trainer) -> Any:
        if self._test is not None:
            return self._test
        found = trainer.val_dataloaders
        if not isinstance(found, DataLoader):
            raise RecipeError(
                f"there is no test_dataset and val_dataloaders is a {type(found).__name__}; say LightningCallback(test_dataset=...): "
                "its samples are those that contributions are to"
            )
        return found.dataset

    def _backward(self, kept: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        kept(*args, **kwargs)
        if self._changed is not None:
            self._changed.note_gradients()

    def _clip(
        self, kept: Callable[..., Any], optimizer: Any, clip_val: float = 0.0, *args: Any, **kwargs: Any
    ) -> Any:
        """Clip as the Trainer would, noting the norm."""
        held = self._recording
        if held is None or self._changed is None:
            return kept(optimizer, clip_val, *args, **kwargs)
        self._changed.check_gradients(held.begun - 1)
        if clip_val > 0:
            return held.clip()
        return None

    def _optimizer_step(
        self, plugin: Any, kept: Callable[..., Any], optimizer: Any, model: Any, closure: Any, **kwargs: Any
    ) -> Any:
        """Run the closure and then the step; with a closure inside of it, the gradient of a step is not known before."""
        if not self._begun or self._ended:
            return kept(optimizer, model=model, closure=closure, **kwargs)
        found = plugin._wrap_closure(model, optimizer, closure)
        if self._changed is not None and self._recording is not None:
            self._changed.check_weights(f"before the step of batch {self._recording.begun - 1}")
        optimizer.step(**kwargs)
        if self._changed is not None:
            self._changed.note_weights()
        return found

    def _close(self, error: BaseException | None) -> None:
        self._release()
        held, self._recording, self._ended = self._recording, None, self._ended or self._begun
        if held is not None:
            held.__exit__(None if error is None else type(error), error, None)
            self.notes = held.notes


class _Changed:
    """Notes how often weights and gradients were written to, and says which hook must have written in between."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.note_weights()
        self._gradients: Sequence[int | None] = []

    def note_weights(self) -> None:
        self._weights = [p._version for _name, p in self._named]

    def note_gradients(self) -> None:
        self._gradients = [self._of(p) for _name, p in self._named]

    @staticmethod
    def _of(parameter: Tensor) -> int | None:
        return None if parameter.grad is None else parameter.grad._version

    def check_weights(self, when: str) -> None:
        for (name, p), noted in zip(self._named, self._weights, strict=True):
            if p._version != noted:
                raise RecipeError(
                    f"weights {name!r} were changed {when} by a hook of the module or of a callback, which no replay can follow; let "
                    "only the optimizer's step change them"
                )

    def check_gradients(self, batch: int) -> None:
        for (name, p), noted in zip(self._named, self._gradients, strict=True):
            if self._of(p) != noted:
                raise RecipeError(
                    f"the gradient of {name!r} was changed after backward() of batch {batch} by a hook (on_after_backward, "
                    "on_before_optimizer_step), which no replay can follow; leave that out, and clip by Trainer(gradient_clip_val=...)"
                )
