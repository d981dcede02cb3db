"""A recipe made of a LightningModule, datasets, and the loss of each sample.

Enough for a replay of what a ``lightning.Trainer`` did, whose record knows optimizer, schedule and batches; trained
by itself, it asks the module's ``configure_optimizers``. Shape letters: B samples of a batch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ....storage.errors import RecipeError
from ...determinism import preserved_generators, seed_everything
from ...recipe import Batch, Recipe

__all__ = ["PRECISIONS", "LightningRecipe"]

PRECISIONS = ("32-true", "64-true", "bf16-mixed")
"""Values of ``Trainer(precision=...)`` that are followed."""

_SHORT = {"32": "32-true", "64": "64-true"}
_TOLD = "_hydra_schedule"  # on the optimizer: its schedule, which configure_optimizers() makes with it


class LightningRecipe(Recipe):
    """A LightningModule with its data and the loss of each sample.

    `LightningCallback` makes one of a Trainer. On the command line, use it as the base of a class with a
    constructor of its own. ``epochs``, ``batch_size``, ``seed``, ``clip_grad_norm`` and ``accumulate`` are attributes, as
    of any recipe; where a record is there, the record knows them.

    Args:
        module: The LightningModule, which is copied, or a function (such as its class) that returns it.
        train_dataset: Map-style, or a function that returns it. ``train_index`` is its row.
        test_dataset: The test samples, likewise.
        losses: Takes the module and a batch, gives one loss a sample, (B,). Its mean must be what ``training_step``
            returns. A method of the module's class will do: ``losses=Net.losses``; and for batches of inputs and
            targets, a loss of ``torch.nn.functional``: ``losses=F.cross_entropy``.
        collate_fn: As the loader's; None: ``default_collate``.
        precision: As the Trainer's: ``"32-true"``, ``"64-true"`` (give ``--dtype float64``) or ``"bf16-mixed"``.

    Raises:
        RecipeError: ``precision`` is another, or ``losses`` is no function.
    """

    def __init__(
        self,
        *,
        module: nn.Module | Callable[[], nn.Module],
        train_dataset: Any,
        test_dataset: Any,
        losses: Callable[[Any, Any], Tensor],
        collate_fn: Callable[[list[Any]], Any] | None = None,
        precision: str | int = "32-true",
    ) -> None:
        found = _SHORT.get(str(precision), str(precision))
        if found not in PRECISIONS:
            raise RecipeError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
        if not callable(losses):
            raise RecipeError(
                f"losses is a {type(losses).__name__}; give a function of (module, batch) that returns one loss a sample"
            )
        self._module = copy.deepcopy(module).cpu() if isinstance(module, nn.Module) else module
        self._train, self._test = train_dataset, test_dataset
        pairs = getattr(losses, "__module__", None) == F.__name__
        self._losses: Callable[[Any, Any], Tensor] = _OfPairs(losses) if pairs else losses
        self._collate, self.precision = collate_fn or default_collate, found
        self._interval: Literal["epoch", "step"] | None = None

    def arguments(self) -> Mapping[str, Any]:
        """Return the precision."""
        return {"precision": self.precision}

    def model(self) -> nn.Module:
        """Return the module that training starts from."""
        if isinstance(self._module, nn.Module):
            return copy.deepcopy(self._module)
        found = self._module()
        if not isinstance(found, nn.Module):
            raise RecipeError(f"module() returned {type(found).__name__} and must return a LightningModule")
        return found

    def train_dataset(self) -> Dataset[Any]:
        """Return the training dataset as it was given."""
        found: Dataset[Any] = _made(self._train)
        return found

    def test_dataset(self) -> Dataset[Any]:
        """Return the test dataset as it was given."""
        found: Dataset[Any] = _made(self._test)
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one loss a sample, (B,), under autocast where ``precision`` says so."""
        with self._context(model):
            return self._losses(model, batch)

    def _context(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        if self.precision != "bf16-mixed":
            return contextlib.nullcontext()
        device = next((p.device.type for p in model.parameters()), "cpu")
        return torch.autocast(device, torch.bfloat16, cache_enabled=False)  # as Lightning's

    @torch.no_grad()
    def predictions(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Return the predicted class of each sample, where the module gives scores for ``batch[0]``."""
        with self._context(model):
            return super().predictions(model, batch)

    def sample_targets(self, model: nn.Module, batch: Batch) -> Batch | None:
        """Return the batch with classes drawn from the module's own scores, or None where it gives none."""
        with self._context(model):
            return super().sample_targets(model, batch)

    def collate(self, items: Sequence[Any]) -> Batch:
        """Join items as the loader does."""
        return self._collate(list(items))

    # ------------------------------------------------------------------ trained by itself

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the module's ``configure_optimizers``.

        Raises:
            RecipeError: There are several, or something that only a Trainer can follow.
        """
        try:
            found = model.configure_optimizers()  # type: ignore[operator]
        except RuntimeError as error:
            if "attached to a `Trainer`" not in str(error):
                raise
            raise RecipeError(
                f"{type(model).__name__}.configure_optimizers() asks its Trainer, and a recipe has none; record the Trainer "
                "with LightningCallback, or write optimizer() and scheduler()"
            ) from error
        optimizer, schedule = _parts(found, type(model).__name__)
        vars(optimizer)[_TOLD] = schedule
        return optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the schedule that ``configure_optimizers`` made with the optimizer, or None."""
        return vars(optimizer).get(_TOLD, {}).get("scheduler")

    @property
    def scheduler_interval(self) -> Literal["epoch", "step"]:
        """How often the schedule moves: what ``configure_optimizers`` says."""
        if self._interval is None:
            with preserved_generators():
                seed_everything(self.seed)
                schedule = vars(self.optimizer(self.model())).get(_TOLD, {})
            self._interval = schedule.get("interval", "epoch")
        return self._interval

    @scheduler_interval.setter
    def scheduler_interval(self, value: Literal["epoch", "step"]) -> None:
        self._interval = value


class _OfPairs:
    """The losses of pairs by a function such as ``F.cross_entropy``; several values of a sample are averaged."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, module: Any, batch: Any) -> Tensor:
        found = self.function(module(batch[0]), batch[1], reduction="none")
        return found.flatten(1).mean(1) if found.ndim > 1 else found


def _parts(found: Any, name: str) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """Return the one optimizer, and what is said of its schedule: ``scheduler`` and ``interval``, or nothing.

    Raises:
        RecipeError: There are several, or the schedule is moved in a way that only a Trainer knows.
    """
    optimizers, schedules = [found], []
    if isinstance(found, (list, tuple)):
        if len(found) == 2 and isinstance(found[0], (list, tuple)):
            optimizers, schedules = list(found[0]), list(found[1])
        else:
            optimizers = list(found)
    if len(optimizers) == 1 and isinstance(optimizers[0], Mapping):
        said = optimizers[0]
        optimizers = [said.get("optimizer")]
        schedules = [said["lr_scheduler"]] if said.get("lr_scheduler") is not None else []
    if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.Optimizer):
        kinds = ", ".join(type(one).__name__ for one in optimizers)
        raise RecipeError(
            f"{name}.configure_optimizers() returned {kinds or 'nothing'}; one optimizer is followed: return it alone, or with "
            "its lr_scheduler"
        )
    if len(schedules) > 1:
        raise RecipeError(
            f"{name}.configure_optimizers() returned {len(schedules)} schedules and a recipe follows one; join them "
            "(SequentialLR, ChainedScheduler), or record the Trainer with LightningCallback"
        )
    if not schedules:
        return optimizers[0], {}
    said = schedules[0] if isinstance(schedules[0], Mapping) else {"scheduler": schedules[0]}
    scheduler, frequency = said["scheduler"], said.get("frequency", 1)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or frequency != 1:
        what = "frequency" if frequency != 1 else "monitor"
        raise RecipeError(
            f"{name}.configure_optimizers() moves {type(scheduler).__name__} by {what}, which only a Trainer follows; record it "
            "with LightningCallback, or write scheduler()"
        )
    return optimizers[0], {"scheduler": scheduler, "interval": said.get("interval", "epoch")}


def _made(dataset: Any) -> Any:
    return dataset() if callable(dataset) and not hasattr(dataset, "__getitem__") else dataset
