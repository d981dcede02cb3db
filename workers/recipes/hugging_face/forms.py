"""The loss of each sequence, from a model's logits and labels; which form is right is tried, not guessed.

Models say their loss for a batch alone. The forms here give one number a sequence; the one whose mean over
tokens (or sequences) is the model's own loss on a few samples is taken. Shape letters: B sequences of a batch,
L tokens, V words of the vocabulary, C classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....storage.errors import RecipeError

IGNORED = -100
"""The label of a token that counts for nothing."""

AGREE = 1e-4
"""How far a form's mean may be from the model's own loss, relative: both in float32."""

_PROBE = 7.0
"""A number of items no batch has by accident: a loss divided by it is told from a mean."""

Pair = tuple[Tensor, Tensor]


def shifted(labels_BL: Tensor) -> Tensor:
    """Return what each position predicts, (B, L): the next label; the last one predicts nothing."""
    return F.pad(labels_BL, (0, 1), value=IGNORED)[:, 1:]


def _tokens(logits: Tensor, labels: Tensor) -> Pair:
    if logits.ndim != 3 or labels.ndim != 2 or logits.shape[:2] != labels.shape or _floating(labels):
        raise ValueError
    rows = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return rows.sum(1), labels.ne(IGNORED).sum(1).to(logits.dtype)


def _next_tokens(logits: Tensor, labels: Tensor) -> Pair:
    if labels.ndim != 2:
        raise ValueError
    return _tokens(logits, shifted(labels))


def _classes(logits: Tensor, labels: Tensor) -> Pair:
    if logits.ndim != 2 or labels.numel() != len(logits) or _floating(labels):
        raise ValueError
    rows = F.cross_entropy(logits, labels.reshape(-1), ignore_index=IGNORED, reduction="none")
    return rows, labels.reshape(-1).ne(IGNORED).to(logits.dtype)


def _several(logits: Tensor, labels: Tensor) -> Pair:
    if logits.ndim != 2 or labels.shape != logits.shape or not _floating(labels):
        raise ValueError
    rows = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1)
    return rows, torch.ones_like(rows)


def _values(logits: Tensor, labels: Tensor) -> Pair:
    if logits.ndim != 2 or labels.numel() != logits.numel() or not _floating(labels):
        raise ValueError
    rows = F.mse_loss(logits, labels.reshape(logits.shape).to(logits.dtype), reduction="none").mean(1)
    return rows, torch.ones_like(rows)


def _floating(labels: Tensor) -> bool:
    return labels.is_floating_point()


FORMS: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "next tokens": _next_tokens,
    "tokens": _tokens,
    "classes": _classes,
    "several classes": _several,
    "values": _values,
}
"""By name: logits and labels to (losses (B,), weights (B,)); ValueError where their shapes are not the form's."""

TOKENS = ("next tokens", "tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a model's loss is one number a sequence, and how its Trainer adds up batches.

    Attributes:
        name: Of `FORMS`.
        model: Class of the model.
        columns: What the model takes of an item; None: everything.
        with_labels: Whether the model needs the labels as an input (an encoder-decoder).
        counts: What the Trainer divides a step's loss by: ``items`` (those of all its batches), ``each``
            (each batch by its own, then by their number), or ``sum`` (each by its own, and not by their
            number: a model that takes ``num_items_in_batch`` and does not use it).
        next_counted: Whether items of next tokens are counted without the first of a sequence, which none
            predicts. The Trainer knows that of models whose ``loss_type`` is ``ForCausalLM`` alone: of a
            ``GPT2LMHeadModel`` it counts all, and its loss is a little smaller than the mean.
    """

    name: str
    model: str
    columns: frozenset[str] | None
    with_labels: bool
    counts: str
    next_counted: bool

    @property
    def over_tokens(self) -> bool:
        """Whether losses are sums over the tokens of a sequence."""
        return self.name in TOKENS

    def targets(self, labels: Tensor) -> Tensor:
        """Return the labels at the position that predicts them."""
        return shifted(labels) if self.name == "next tokens" else labels

    def of(self, logits: Tensor, labels: Tensor) -> Pair:
        """Return losses (B,) and weights (B,)."""
        return FORMS[self.name](logits, labels)

    def weights(self, labels: Tensor) -> Tensor:
        """Return how many tokens of each sequence count, or 1 for each, (B,)."""
        if self.over_tokens or self.name == "classes":
            all_counted = self.counts == "items" and not self.next_counted
            found = (labels if all_counted else self.targets(labels)).ne(IGNORED)
            return (found.sum(1) if self.over_tokens else found.reshape(-1)).double()
        return torch.ones(len(labels), dtype=torch.float64, device=labels.device)

    def forward(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the model's logits, at least float32."""
        inputs = {name: value for name, value in batch.items() if self.with_labels or name != "labels"}
        output = model(**inputs)
        logits: Tensor = output["logits"] if isinstance(output, Mapping) else output[0]
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT wrapper, or the model."""
    inside = getattr(model, "get_base_model", None)
    found = inside() if callable(inside) else model
    assert isinstance(found, nn.Module)
    return found


def columns_of(model: nn.Module) -> frozenset[str]:
    """Return the names that an item may have for the Trainer to keep them."""
    taken = inspect.signature(bare(model).forward).parameters
    return frozenset({*taken, "label", "label_ids", "labels"})


def find_form(
    model: nn.Module, collate: Callable[[Sequence[Any]], Any], items: Sequence[Any], *, keep_all: bool
) -> Form:
    """Find the form whose mean is the model's own loss on a few samples, in eval mode.

    Args:
        model: The model; its modes and generators are left as they were, but for what eval mode draws.
        collate: Items to a batch.
        items: The first training samples.
        keep_all: Whether the batch keeps what the model does not take.

    Raises:
        RecipeError: The batch is no mapping with ``labels``, or no form gives the model's loss.
    """
    inner = bare(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return _find(model, inner, collate(items), keep_all)
    finally:
        for module, mode in modes:
            module.training = mode


def _find(model: nn.Module, inner: nn.Module, batch: Any, keep_all: bool) -> Form:
    kind = type(inner).__name__
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise RecipeError(
            f"the data collator returned {got} for the first samples; it must return a mapping with 'labels'"
        )
    labels: Tensor = batch["labels"]
    decoder = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
    output = model(**batch)
    own = output.get("loss") if isinstance(output, Mapping) else None
    if own is None or own.ndim:
        raise RecipeError(
            f"{kind} returned no loss for the first samples, so the loss of a sequence cannot be told; "
            "use a model with a head, such as AutoModelForCausalLM, or write a Recipe with losses() of its own"
        )
    tried = {}
    for name, form in FORMS.items():
        try:
            losses, weights = form(output["logits"], labels)
        except ValueError:
            continue
        tried[name] = float(losses.sum() / weights.sum())
        if math.isclose(tried[name], float(own), rel_tol=AGREE, abs_tol=AGREE):
            return Form(
                name=name,
                model=kind,
                columns=None if keep_all else columns_of(model),
                with_labels=decoder,
                counts=_counts(model, inner, batch, float(losses.sum())),
                next_counted=name == "next tokens" and _next_counted(inner, decoder),
            )
    told = ", ".join(f"{name} {value:.6g}" for name, value in tried.items()) or "no form has its shapes"
    raise RecipeError(
        f"{kind} has a loss of {float(own):.6g} on the first samples, and no loss of each sequence is known that gives it "
        f"({told}); write a Recipe with losses() of its own"
    )


def _next_counted(inner: nn.Module, decoder: bool) -> bool:
    """Return the Trainer's own rule, which goes by the model's ``loss_type``."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(getattr(inner, "loss_type", None)) is ForCausalLMLoss and not decoder


def _counts(model: nn.Module, inner: nn.Module, batch: Mapping[str, Any], total: float) -> str:
    """Return how the Trainer adds up the batches of a step with this model; see ``Form``."""
    takes = getattr(inner, "accepts_loss_kwargs", None)
    if takes is None:
        parameters = inspect.signature(inner.forward).parameters.values()
        takes = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    if not takes:
        return "each"
    divided = float(model(**batch, num_items_in_batch=torch.tensor(_PROBE))["loss"])
    return "items" if math.isclose(divided, total / _PROBE, rel_tol=AGREE, abs_tol=AGREE) else "sum"
