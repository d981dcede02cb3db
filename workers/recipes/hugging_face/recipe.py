"""A recipe made of what a ``transformers.Trainer`` is given: model, datasets, ``TrainingArguments``, collator.

The step is the Trainer's own of version 5: the sum of the losses of all tokens of a step over their number, over
all accumulated batches; AdamW with decay by name; ``get_scheduler`` with warm-up after each step; clipping by
norm; its sampler's order. Shape letters: B sequences of a batch, L tokens, N training samples.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ....storage.errors import RecipeError
from ...determinism import preserved_generators, seed_everything
from ...recipe import Batch, Recipe
from .arguments import decisive, refuse
from .forms import IGNORED, Form, columns_of, find_form

__all__ = ["TrainerRecipe"]

LOOKED_AT = 8
"""Training samples on which the form of the loss is tried."""

_REPLACED = (
    "compute_loss",
    "training_step",
    "get_batch_samples",
    "get_train_dataloader",
)
"""Methods of a Trainer that decide what a step is."""

_FOLLOWED = ("create_optimizer", "create_scheduler", "_get_train_sampler")
"""Those whose outcome a record of its own training holds."""


class TrainerRecipe(Recipe):
    """The training that a ``transformers.Trainer`` would do, as a recipe.

    Give it what the Trainer gets; or use it as the base of a class with a constructor of its own, which the
    command line can name. ``losses`` gives each sequence the sum of the losses of its tokens, ``weights`` their
    number (for classification: the loss, and 1).

    Args:
        args: ``transformers.TrainingArguments``. Those of logging, saving and evaluation are not used.
        train_dataset: Map-style, such as a ``datasets.Dataset``, or a function that returns it. ``train_index``
            is its row.
        eval_dataset: The test samples, likewise.
        model: The model to start from; it is copied.
        model_init: In its place, a function that returns it. It is called with the seed of ``args`` set.
        data_collator: As the Trainer's; default: padding where ``processing_class`` is a tokenizer.
        processing_class: The tokenizer: it shows sequences as text.

    Raises:
        RecipeError: An argument is not supported, or neither or both of ``model`` and ``model_init`` are given.
    """

    scheduler_interval = "step"

    def __init__(
        self,
        *,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        model: nn.Module | None = None,
        model_init: Callable[..., nn.Module] | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        processing_class: Any = None,
    ) -> None:
        if (model is None) == (model_init is None):
            raise RecipeError("give model or model_init, not both and not neither")
        if eval_dataset is None or isinstance(eval_dataset, Mapping):
            raise RecipeError(
                "eval_dataset must be one dataset: its samples are the test samples that contributions are to"
            )
        refuse(args)
        self._args, self._init = args, model_init
        self._model = copy.deepcopy(model)
        self._train, self._eval = train_dataset, eval_dataset
        self._tokenizer = processing_class
        self._collator = data_collator or _default_collator(processing_class)
        self._form: Form | None = None
        self.batch_size = int(args.per_device_train_batch_size)
        self.accumulate = int(args.gradient_accumulation_steps)
        self.seed = int(args.seed)
        self.num_workers = int(args.dataloader_num_workers)
        self.clip_grad_norm = float(args.max_grad_norm) if args.max_grad_norm > 0 else None
        self.epochs = max(1, math.ceil(args.num_train_epochs))
        if args.max_steps > 0:
            self.max_steps = int(args.max_steps)
        elif args.num_train_epochs != self.epochs:
            self.max_steps = math.ceil(args.num_train_epochs * self._updates_per_epoch())

    @classmethod
    def of(cls, trainer: Any, *, recording: bool = False) -> TrainerRecipe:
        """Return the recipe of a ``transformers.Trainer`` that has not trained yet.

        Args:
            trainer: The Trainer.
            recording: Whether its own training is recorded, which then knows optimizer, schedule and order.

        Raises:
            RecipeError: It computes its loss, optimizer or order in a way of its own, or an argument is refused.
        """
        from transformers import Trainer

        refuse_own_ways(trainer, Trainer, recording=recording)
        refuse(trainer.args, recording=recording)
        given = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
        if given and not recording:
            raise RecipeError(
                "the Trainer was given an optimizer; name it in TrainingArguments(optim=...), or write a Recipe"
            )
        return cls(
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
            model=trainer.model if trainer.model_init is None else None,
            model_init=trainer.model_init,
            data_collator=trainer.data_collator,
            processing_class=trainer.processing_class,
        )

    def arguments(self) -> Mapping[str, Any]:
        """Return the training arguments that decide numbers."""
        return decisive(self._args)

    def train_dataset(self) -> Dataset[Any]:
        """Return the training dataset as it was given."""
        found: Dataset[Any] = _made(self._train)
        return found

    def test_dataset(self) -> Dataset[Any]:
        """Return the evaluation dataset as it was given."""
        found: Dataset[Any] = _made(self._eval)
        return found

    def model(self) -> nn.Module:
        """Return the model that training starts from."""
        model = self._built()
        self._checked(model)
        return model

    def divisors(self, batches: Sequence[Batch]) -> list[float]:
        """Return what the Trainer divides the sum of each batch's losses by, for all batches of a step."""
        form = self._known
        own = [float(form.weights(batch["labels"]).sum()) for batch in batches]
        if form.counts == "items":
            return [sum(own)] * len(own)
        return [one * (len(own) if form.counts == "each" else 1) for one in own]

    def _built(self) -> nn.Module:
        if self._init is not None:
            takes_trial = bool(inspect.signature(self._init).parameters)  # of a search, as Trainer hands it
            model: Any = self._init(None) if takes_trial else self._init()
        else:
            model = copy.deepcopy(self._model)
        if not isinstance(model, nn.Module):
            raise RecipeError(f"model_init() returned {type(model).__name__} and must return a model")
        config = getattr(model, "config", None)
        if config is not None:
            config.use_cache = False  # as Trainer does
        for name, parameter in model.named_parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                raise RecipeError(
                    f"parameter {name!r} is {str(parameter.dtype).removeprefix('torch.')}, and training in low precision "
                    "cannot be followed; load the model with dtype=torch.float32, and bf16=True for autocast"
                )
        return model

    def _checked(self, model: nn.Module) -> Form:
        """Return the form of the model's loss after finding it once.

        Raises:
            RecipeError: There is none.
        """
        if self._form is None:
            dataset = self.train_dataset()
            items = [dataset[k] for k in range(min(LOOKED_AT, len(dataset)))]  # type: ignore[arg-type]
            keep_all = not self._args.remove_unused_columns

            def collate(some: Sequence[Any]) -> Any:
                return self._collated(some, None if keep_all else columns_of(model))

            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            with preserved_generators():
                seed_everything(self.seed)
                self._form = find_form(
                    model,
                    lambda some: _on(collate(some), device),
                    items,
                    keep_all=keep_all,
                )
        return self._form

    def _check_steps(self, count: int) -> None:
        """Refuse steps whose loss is no sum over their samples with weights that each batch knows.

        Raises:
            RecipeError: Says what does not go up.
        """
        form = self._known
        if self.accumulate == 1 or form.counts == "items":
            return
        batches, left = divmod(count, self.batch_size)
        even = (left == 0 or self._args.dataloader_drop_last) and not form.over_tokens
        if form.counts == "sum":
            even = even and batches % self.accumulate == 0
        if not even:
            added = "adds" if form.counts == "sum" else "averages"
            raise RecipeError(
                f"gradient_accumulation_steps={self.accumulate} with a {form.model}, whose loss does not use num_items_in_batch, so "
                f"that the Trainer {added} batch means: {count:,} samples in batches of {self.batch_size} do not go up into equal "
                "steps; use 1 and a larger batch, or dataloader_drop_last with batches that go up"
            )

    @property
    def _known(self) -> Form:
        if self._form is None:  # a copy that has not built its model
            with preserved_generators():
                seed_everything(self.seed)
                self._checked(self._built())
        assert self._form is not None
        return self._form

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the losses of the tokens of each sequence, (B,); of classes, each one's loss."""
        return self._known.of(self._logits(model, batch), batch["labels"])[0]

    def weights(self, batch: Batch) -> Tensor | None:
        """Return how many tokens of each sequence count, (B,); of classes, 1 for each."""
        found = self._known.weights(batch["labels"])
        if self._known.counts == "sum":  # the Trainer adds the means of the batches up
            found = found / self.accumulate
        return found

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        kind = next((v.device.type for v in batch.values() if isinstance(v, Tensor)), "cpu")
        low = torch.autocast(kind, torch.bfloat16) if self._args.bf16 else contextlib.nullcontext()
        with low:
            return self._known.forward(model, batch)

    def collate(self, items: Sequence[Any]) -> Batch:
        """Join items by the data collator, without the columns that the model does not take."""
        return self._collated(items, self._known.columns)

    def _collated(self, items: Sequence[Any], columns: frozenset[str] | None) -> Batch:
        kept = [
            {name: value for name, value in item.items() if columns is None or name in columns}
            if isinstance(item, Mapping)
            else item
            for item in items
        ]
        return self._collator(kept)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the arguments; weight decay spares biases and norms, as the Trainer does."""
        from transformers import Trainer

        kind, options = Trainer.get_optimizer_cls_and_kwargs(self._args, model)
        decayed = set(Trainer.get_decay_parameter_names(None, model))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in trained if n in decayed], "weight_decay": self._args.weight_decay},
            {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
        ]
        optimizer = kind(groups, **options)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the schedule of the arguments over all steps, warm-up included."""
        from transformers import get_scheduler

        total = self.max_steps or self.epochs * self._updates_per_epoch()
        return get_scheduler(
            self._args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=self._args.get_warmup_steps(total),
            num_training_steps=total,
            scheduler_specific_kwargs=self._args.lr_scheduler_kwargs,
        )

    def order(self, epoch: int, generator: torch.Generator) -> Sequence[int] | Tensor | None:
        """Return the order of the Trainer's sampler: a permutation drawn from ``data_seed`` (or ``seed``) + epoch."""
        count = self._count()
        self._check_steps(count)
        if self._args.train_sampling_strategy == "sequential":
            found = torch.arange(count)
        else:
            seed = self.seed if self._args.data_seed is None else int(self._args.data_seed)
            found = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        left = count % self.batch_size
        return found[: count - left] if self._args.dataloader_drop_last and left else found

    def labels(self, dataset: Dataset[Any]) -> Sequence[int] | None:
        """Return the classes of a classification; sequences of tokens have none."""
        if self._known.name != "classes":
            return None
        items: Any = dataset
        key = next((key for key in ("labels", "label", "label_ids") if key in items[0]), None)
        if key is None:
            return None
        column = items[key] if hasattr(items, "column_names") else (items[k][key] for k in range(len(items)))
        return [int(value) for value in column]

    @torch.no_grad()
    def predictions(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Return the predicted class of each sequence; None where tokens are predicted."""
        if self._known.name != "classes":
            return None
        return self._logits(model, batch).argmax(1)

    @torch.no_grad()
    def sample_targets(self, model: nn.Module, batch: Batch) -> Batch | None:
        """Return the batch with tokens, or classes, drawn from the model's own distribution."""
        form = self._known
        if form.name not in ("next tokens", "tokens", "classes"):
            return None
        logits, labels = self._logits(model, batch), batch["labels"]
        drawn = torch.multinomial(logits.double().softmax(-1).flatten(0, -2), 1).view(logits.shape[:-1])
        if form.name == "next tokens":
            drawn = torch.cat([labels[:, :1], drawn[:, :-1]], 1)
        drawn = torch.where(labels == IGNORED, labels, drawn.view(labels.shape).to(labels.dtype))
        found = copy.copy(batch)
        found["labels"] = drawn
        return found

    def show(self, item: Any) -> Any:
        """Return the text of a sequence, where there is a tokenizer, or its tokens."""
        tokens = item.get("input_ids") if isinstance(item, Mapping) else None
        decode = getattr(self._tokenizer, "decode", None)
        if tokens is None:
            return super().show(item)
        mask = item.get("attention_mask")
        kept = [int(t) for k, t in enumerate(tokens) if mask is None or int(mask[k])]
        return " ".join(map(str, kept)) if decode is None else str(decode(kept, skip_special_tokens=True))

    def _count(self) -> int:
        return len(self.train_dataset())  # type: ignore[arg-type]

    def _updates_per_epoch(self) -> int:
        count, size = self._count(), self.batch_size
        batches = count // size if self._args.dataloader_drop_last else -(-count // size)
        return max(1, -(-batches // self.accumulate))


def refuse_own_ways(trainer: Any, base: type, *, recording: bool) -> None:
    """Refuse a Trainer that decides in a way of its own what a step is.

    Raises:
        RecipeError: Names the method or argument.
    """
    for name in _REPLACED if recording else (*_REPLACED, *_FOLLOWED):
        if getattr(type(trainer), name, None) is not getattr(base, name, None):
            raise RecipeError(
                f"{type(trainer).__name__} has {name}() of its own, which is not followed; write a Recipe instead"
            )
    if trainer.compute_loss_func is not None:
        raise RecipeError("compute_loss_func is not followed; write a Recipe with losses() instead")


def _made(dataset: Any) -> Any:
    return dataset() if callable(dataset) and not hasattr(dataset, "__getitem__") else dataset


def _on(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _default_collator(tokenizer: Any) -> Callable[[list[Any]], Any]:
    """Return what the Trainer takes where no collator is given."""
    from transformers import DataCollatorWithPadding, default_data_collator
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        found: Callable[[list[Any]], Any] = DataCollatorWithPadding(tokenizer)
    else:
        found = default_data_collator
    return found
