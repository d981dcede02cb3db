"""Targets drawn from the model by the very forward pass whose losses are then differentiated.

``Recipe.sample_targets`` asks the model for its scores, and ``Recipe.losses`` asks it again. Where both ask for the
same thing, the second is given what the first computed.

A model that is nearly sure draws nearly always a class whose gradient is nearly nothing, and what its curvature
consists of once in many times. So classes are drawn with probabilities q in place of the model's own p,

    q_c ~ p_c |p - e_c|^2,   mixed with p;   each gradient then counts p_c / q_c times in E[g g^T],

|p - e_c|^2 being the squared gradient of ``-log p_c`` with respect to the scores. The expectation stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..model.returned import mapped
from ..model.stand_in import answered
from ..recipe import Batch, Recipe, class_scores

OWN = 0.1
"""Share of the model's own p in q: no gradient counts more than 1 / OWN times, whatever the loss makes of classes."""

Asked = tuple[Any, int]


def draw(
    recipe: Recipe, model: nn.Module, batch: Batch, *, evenly: bool
) -> tuple[Batch, Tensor | None] | None:
    """Return the batch with targets drawn from the model, and how often each gradient counts, (B,); None: once.

    Args:
        recipe: Draws, where it has a way of its own.
        model: Its model.
        batch: The batch.
        evenly: Whether classes may be drawn with other probabilities than the model's.

    Returns:
        None where there is nothing to draw from.
    """
    scores = None
    if evenly and type(recipe).sample_targets is Recipe.sample_targets:
        scores = class_scores(model, batch)
    if scores is None:
        drawn = recipe.sample_targets(model, batch)
        return None if drawn is None else (drawn, None)
    p = scores.double().softmax(1)
    size = p * (1 - 2 * p + p.square().sum(1, keepdim=True))
    total = size.sum(1, keepdim=True)
    q = torch.where(total > 0, OWN * p + (1 - OWN) * size / total, p)
    chosen = torch.multinomial(q, 1)
    counts = (p.gather(1, chosen) / q.gather(1, chosen)).squeeze(1)
    inputs, targets = batch
    return [inputs, chosen.squeeze(1).to(targets.dtype)], counts


class OneForward:
    """Answers a model's calls while targets are drawn, and then while the losses are computed.

    Args:
        model: The recipe's.
        forget: Called where what the first pass left is not wanted after all.

    Attributes:
        shared: Whether the losses got what the targets were drawn from.
    """

    def __init__(self, model: nn.Module, forget: Callable[[], object]) -> None:
        self._model, self._forget = model, forget
        self._asked: list[Asked] = []
        self._returned: Any = None
        self._calls, self._drawn = 0, False
        self.shared = False

    def answering(self) -> AbstractContextManager[None]:
        """Stand in for the model's ``forward``; call ``drawn`` between the two."""
        return answered(
            self._model,
            lambda call, given: self._answer(call, [_identity(leaf) for leaf in tree_leaves(given)]),
        )

    def drawn(self) -> None:
        """The targets are there; what the model is asked for now is for the losses."""
        self._drawn = True
        if self._calls and (self._calls > 1 or not self._differentiable()):
            self._drop()

    def _answer(self, call: Callable[[], Any], asked: list[Asked]) -> Any:
        if not self._drawn:
            self._calls += 1
            with torch.enable_grad():
                self._returned, self._asked = call(), asked
            return mapped(self._returned, lambda output: output.detach().clone())
        if self._returned is None:
            return call()
        found, same = self._returned, self._same(asked)
        if not same:
            self._drop()
            return call()
        self._returned, self.shared = None, True
        return found

    def _drop(self) -> None:
        self._returned = None
        self._forget()

    def _differentiable(self) -> bool:
        found = []

        def note(output: Tensor) -> Tensor:
            found.append(output.requires_grad)
            return output

        mapped(self._returned, note)
        return any(found)

    def _same(self, asked: list[Asked]) -> bool:
        """Whether the model is asked for what it was asked for before: the very objects, unchanged."""
        return len(asked) == len(self._asked) and all(
            one is two and version == before
            for (one, version), (two, before) in zip(asked, self._asked, strict=True)
        )


def _identity(leaf: Any) -> Asked:
    """Return an argument of the model, and how often it was changed in place."""
    return leaf, leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0
