"""The losses of a batch cut in two where the model returns: weights to outputs, outputs to losses.

The recipe's own ``losses(model, batch)`` is run with the model it knows, whose ``forward`` is answered by a
stand-in: it returns what the model computed, as a new beginning of the graph, or outputs that are given.
Outputs are all tensors in what the model returns (a tensor, tuple, list, dict, dataclass, or a mapping such as
those of transformers), of every call that ``losses`` makes, in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from torch import Tensor, nn

from ..determinism import generators, put_generators
from ..model.returned import mapped
from ..model.stand_in import answered

Losses = Callable[[], Tensor]
Answer = Callable[[int, Callable[[], Any]], Any]


class _Reached(BaseException):
    """The last output is there: what ``losses`` would do with it is not wanted."""


class ModelCalls:
    """What a batch's losses ask of a model, and what it returned.

    Args:
        model: The recipe's.

    Attributes:
        made: Outputs that depend on the weights, with their graph.
        starts: The same values as leaves, from which the losses were computed.
        count: How often ``losses`` called the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.made: list[Tensor] = []
        self.starts: list[Tensor] = []
        self.count = 0
        self._places: list[tuple[int, int]] = []  # (call, number of the tensor in what it returned)
        self._returned: list[Any] = []
        self._generators: list[tuple[Any, ...]] = []

    def cut(self, losses: Losses) -> Tensor:
        """Return the losses (B,) as a function of ``starts``; fills ``made`` as a function of the weights."""

        def answer(k: int, call: Callable[[], Any]) -> Any:
            returned, number = call(), itertools.count()

            def start(output: Tensor) -> Tensor:
                here = (k, next(number))
                if not output.requires_grad:
                    return output
                leaf = output.detach().requires_grad_()
                self.made.append(output)
                self.starts.append(leaf)
                self._places.append(here)
                return leaf.clone()  # losses may change what it gets in place

            begun = mapped(returned, start)
            self._returned.append(mapped(returned, lambda output: output.detach().clone()))
            self._generators.append(generators())
            self.count = k + 1
            return begun

        with self._answered(answer):
            return losses()

    def keep(self, chosen: Sequence[int]) -> None:
        """Let only some of ``made`` count as outputs: those that the losses use."""
        self.made = [self.made[i] for i in chosen]
        self.starts = [self.starts[i] for i in chosen]
        self._places = [self._places[i] for i in chosen]

    def forget(self) -> None:
        """Let the graphs go."""
        self.made, self.starts = [], []

    def outputs(self, losses: Losses) -> list[Tensor]:
        """Return the outputs once more, with whatever weights the model has now; ``losses`` ends there."""
        found: dict[tuple[int, int], Tensor] = {}
        last = max(k for k, _number in self._places)

        def answer(k: int, call: Callable[[], Any]) -> Any:
            returned, number = call(), itertools.count()

            def note(output: Tensor) -> Tensor:
                found[k, next(number)] = output
                return output.clone()

            passed = mapped(returned, note)
            if k == last:
                raise _Reached
            return passed

        with self._answered(answer), suppress(_Reached):
            losses()
        return [found[place] for place in self._places]

    def losses(self, losses: Losses, outputs: Sequence[Tensor]) -> Tensor:
        """Return the losses (B,) where the model returns ``outputs``; random numbers are those of ``cut``."""
        given = dict(zip(self._places, outputs, strict=True))

        def answer(k: int, _call: Callable[[], Any]) -> Any:
            number = itertools.count()
            put_generators(self._generators[k])
            return mapped(self._returned[k], lambda output: given.get((k, next(number)), output).clone())

        with self._answered(answer):
            return losses()

    def _answered(self, answer: Answer) -> AbstractContextManager[None]:
        """Let ``answer`` return in the model's place; it is told how many calls went before."""
        calls = itertools.count()
        return answered(self._model, lambda call, _given: answer(next(calls), call))
