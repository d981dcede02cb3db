"""How the gradients of each parameter are had, and what a step that is looked at again begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from zlib import crc32

from torch import Tensor, nn

from ..model.layout import Layout
from ..model.state import Kept
from ..recipe import Batch
from .capture import Form

Strategy = Literal["outer", "rule", "second", "lent", "func", "vjp"]
"""``outer``: a rule whose result is one outer product a row, so that it may be kept as factors. ``second``: a rule
of a layer whose batch is on the second axis; ``lent``: of one whose output all samples share (see ``capture``)."""

RULED: Mapping[Strategy, Form] = {"outer": "first", "rule": "first", "second": "second", "lent": "lent"}
"""Strategies that go by a layer's rule, and the form of its calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ways:
    """How the gradients of each parameter are had; see ``trials``.

    Attributes:
        strategies: One per entry of the layout.
        untried: Entries (``vjp``) whose gradients were zero in every trial: a pass with random weights says
            in each step whether there is anything to compute.
        random: Whether the losses draw random numbers.
        coupled: Whether samples see each other in the losses; None where that could not be tried.
        graphs: Forms of the graphs of the batches that were tried; see ``form_of``.
        judge: Tries a step whose graph has another form: given the model, the batch and what the step began
            with, the entries whose way is not right there.
        noise: How far rows added up to something else than a batch's gradient, relative: more than rounding of
            the run's dtype where layers compute in a lower precision.
        trials: How many batches were tried.
        rows: How many gradients of single samples were held against autograd.
    """

    strategies: tuple[Strategy, ...]
    untried: frozenset[int] = frozenset()
    random: bool = False
    coupled: bool | None = None
    graphs: frozenset[int] = frozenset()
    judge: Judge | None = None
    noise: float = 0.0
    trials: int = 0
    rows: int = 0


def always_vjp(layout: Layout) -> Ways:
    """Return the ways that need no trial."""
    way: Strategy = "vjp"
    return Ways(strategies=(way,) * len(layout.entries))


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """What a step began with: generators and buffers, for passes of its own.

    ``generators`` is None where no way alone (``func``) asks whether anything was drawn.
    """

    generators: object
    random: Tensor
    buffers: Kept


Judge = Callable[[nn.Module, Batch, Before], frozenset[int]]


NORMS = dict.fromkeys(
    (
        "NativeBatchNormBackward0",
        "CudnnBatchNormBackward0",
        "MiopenBatchNormBackward0",
        "SwitchedBatchNormBackward",
    ),
    "BatchNorm",
)
"""Nodes of one operation, by the library that does it and by how its statistics are differentiated."""


def form_of(losses_B: Tensor, entries: Mapping[int, int]) -> int:
    """Return a hash of the form of a graph: its operations, how they hang together, the parameters used.

    The same in every process, so of numbers alone: hashes of text and of None are not.

    Args:
        losses_B: Its end.
        entries: Entry of each parameter, by id.
    """
    numbers: dict[Any, int] = {}
    waiting = [losses_B.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in numbers:
            numbers[node] = len(numbers)
            waiting += [following for following, _ in node.next_functions]
    parts = []
    for node in numbers:
        variable = getattr(node, "variable", None)
        leaf = -3 if variable is None else entries.get(id(variable), -1)
        name = NORMS.get(node.name(), node.name())
        parts.append((_number(name), leaf, tuple(numbers.get(f, -1) for f, _ in node.next_functions)))
    return hash(tuple(parts))


@cache
def _number(name: str) -> int:
    return crc32(name.encode())
