"""What a family of optimisers has to say of itself, and what it is told of a step.

U steps, L lanes, D parameters, R tangents, Q adjoint vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .clipping import Clip
from .columns import Columns
from .scalars import Scalars
from .settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moment:
    """A step that is about to be taken.

    Attributes:
        gradient: (D,) of the step's loss, before it is clipped; 0 where there is none.
        clip: What clipping makes of it.
        weights: (D,) before the step.
        state: The optimiser's vectors before the step, (D,) each, in the order of ``Family.vectors``.
    """

    gradient: Tensor
    clip: Clip
    weights: Tensor
    state: tuple[Tensor, ...]


class LinearStep(ABC):
    """The derivative of one step, forwards and backwards.

    A tangent is du and one vector for each of the optimiser's (``state``); so is an adjoint vector.
    """

    @abstractmethod
    def push(self, du: Tensor, state: Sequence[Tensor], source: Tensor) -> None:
        """Move tangents (R, D) by the step, in place.

        Args:
            du: Of the weights.
            state: Of the optimiser's vectors.
            source: H du, what the moved weights do to the gradient; overwritten.
        """

    @abstractmethod
    def kick(self, source: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what a change ``source`` (R, D) of the gradient alone adds to du and to the state's tangents."""

    @abstractmethod
    def pull(self, a_u: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Begin the way back for (Q, D) adjoint vectors, in place; return v, what the gradient's place gets."""

    @abstractmethod
    def pulled(self, a_u: Tensor, state: Sequence[Tensor], product: Tensor) -> None:
        """End it, for what ``pull`` was called with last; ``product`` is H v."""


class Family(ABC):
    """An optimiser's rule.

    Attributes:
        name: As records call it.
        kinds: The classes of ``torch.optim`` that it covers, and no subclass of them.
        settings: Arrays of the record that hold what it used.
        vectors: Keys of ``optimizer.state`` with a vector like the parameter.
        counts: Whether each parameter has a ``step`` of its own.
        scaled: Whether the step multiplies each coordinate with a number of its own.
    """

    name: str
    kinds: tuple[type, ...]
    settings: tuple[str, ...]
    vectors: tuple[str, ...]
    counts: bool = False
    scaled: bool = False

    @abstractmethod
    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise RecipeError for options without a rule."""

    @abstractmethod
    def read(self, group: Mapping[str, Any]) -> dict[str, float]:
        """Return the settings of a parameter group now, by the names of ``settings``."""

    @abstractmethod
    def apply(self, group: dict[str, Any], values: Mapping[str, float]) -> None:
        """Put recorded settings into a parameter group."""

    @abstractmethod
    def moved(
        self, group: Mapping[str, Any], weight: Tensor, gradient: Tensor, state: Mapping[str, Any]
    ) -> Tensor:
        """Return w' - w by the formula: what a step with the (clipped) gradient makes of a parameter.

        Args:
            group: Its settings.
            weight: Before the step.
            gradient: As the optimiser sees it.
            state: The optimiser's state of the parameter before the step, copied; empty at its first.
        """

    @abstractmethod
    def scalars(self, settings: Settings) -> Scalars:
        """Return the steps in the form of ``coefficients``, (U, L)."""

    @abstractmethod
    def linear(
        self, settings: Settings, form: Scalars, columns: Columns, update: int, moment: Moment | None
    ) -> LinearStep:
        """Return the derivative of a step.

        Args:
            settings: Of the record.
            form: Their scalars.
            columns: Spreads lanes over coordinates.
            update: Which step.
            moment: The step; None only where ``moments`` says that it is not needed.
        """

    def moments(self, settings: Settings) -> bool:
        """Whether the derivatives depend on where training is, and not on the settings alone."""
        clip = settings.clip_factor
        return self.scaled or (clip is not None and bool((clip < 1).any()))

    def coupled_pull(
        self, settings: Settings, columns: Columns, update: int, moment: Moment
    ) -> Tensor | None:
        """Return what ``scalars`` leaves out of the gradient, (D,); None: nothing."""
        return None

    def preconditioner(
        self, settings: Settings, columns: Columns, update: int, moment: Moment
    ) -> Tensor | None:
        """Return what a step multiplies each coordinate with, (D,); None: nothing."""
        return None
