"""Whether a way to Hessian products is right for a recipe, found out by trying.

Every way rests on rules for derivatives of derivatives: forward-mode, double backward, batching. None is
believed before it agreed with differences of the gradient itself: once, when a replay begins, a copy
of the model with slightly moved weights runs the first batch in float64, and

    J v = (g(w + h v) - g(w - h v)) / 2h

with g as ``backward`` gives it: the yardstick that knows nothing of second derivatives. Where double
backward agrees with it J is symmetric, a Hessian; it is then the sharper yardstick of the fast ways. Where
it does not, something is detached or a rule of torch is wrong: J v is had by the first way that agrees
with the differences, J^T a only where it is the transpose of that. What is left is refused by name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ...storage.errors import RecipeError
from ..determinism import derived_seed, seed_everything
from ..model.state import kept_buffers, put_back, unchanged_buffers
from ..persample.one_batch import TOLERANCE
from ..training.training import Training
from .differences import (
    SMALL,
    WIDTHS,
    Probe,
    both,
    first_samples,
    moved,
    moved_copy,
    one_line,
    random_directions,
    weighted_gradient,
)
from .second_order import (
    FieldSecondOrder,
    FieldTangentTile,
    GraphedFieldTangentTile,
    GraphedTangentTile,
    SecondOrder,
    TangentTile,
)

logger = logging.getLogger(__name__)

STATE = 1e-3
"""How much of J v may come from past weights by way of a layer's state."""

FAST = (TangentTile, GraphedTangentTile)
FIELD = (FieldTangentTile, GraphedFieldTangentTile)

Way = type[TangentTile] | type[SecondOrder]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How products are had.

    Attributes:
        kind: The way.
        refusal: Why it is not the fast one; None where it is.
        fallback: What a step may use where ``kind`` fails; None: nothing.
        field: What the update is where it is no gradient; None where it is one.
        checked: Whether differences of the gradient could be taken.
        alone: Whether ``kind`` works for one direction at a time alone.
        matrix: What stands in the Hessian's place; None: nothing.
    """

    kind: Way
    refusal: str | None = None
    fallback: type[SecondOrder] | None = SecondOrder
    field: str | None = None
    checked: bool = True
    alone: bool = False
    matrix: str | None = None


def chosen_way(training: Training, *, transposed: bool, narrow: str | None) -> Choice:
    """Return the way to J v, or to J^T v where it is ``transposed``.

    Args:
        training: At its first weights, ``batch_norm`` coupled; left as it is.
        transposed: What is wanted.
        narrow: Why directions cannot be worked on together, or None.

    Raises:
        RecipeError: No way is right, or the model cannot be copied.
    """
    return Judge(training, transposed, narrow).choice()


class Judge(Probe):
    """Tries the ways to products with the derivative of the update; see the module."""

    def __init__(self, training: Training, transposed: bool, narrow: str | None) -> None:
        self.training, self.transposed, self.narrow = training, transposed, narrow
        self.checked = True
        try:
            self._prepare(torch.float64)
        except RuntimeError as error:
            if training.dtype == torch.float64:
                raise self.refused(f"its gradient fails: {one_line(error)}") from error
            logger.debug("probe in float64 failed, trying the run's dtype: %s", error)
            self.checked = False  # differences in float32 say nothing
            self._prepare(training.dtype)

    def _prepare(self, dtype: torch.dtype) -> None:
        trial = moved_copy(self.training, dtype)
        super().__init__(trial, first_samples(trial, 0))
        self.plain, self.error = self.double_backward(SecondOrder)

    def choice(self) -> Choice:
        """Return the way that is right; see ``chosen_way``."""
        if self.training.keeps_state and self.checked:
            self._check_state()
        if self.plain is not None and (not self.checked or self.difference(self.plain[0]) is None):
            return self._symmetric(self.plain)
        if not self.checked:
            raise self.refused(f"it has no second derivative: {self.error}")
        return self._field()

    def _check_state(self) -> None:
        """Refuse a layer whose state carries past weights into the gradient: tangents would have to follow it.

        With S(w) the buffers after a forward pass, differences of g(w; S(w + h v)) must be nothing beside J v.
        """
        trial, size, h = self.trial, self.trial.batch_size(0), WIDTHS[0]
        share = torch.full((size,), 1.0 / trial.divisor(0), dtype=trial.dtype, device=trial.device)
        before = kept_buffers(trial.model, statistics=False)
        ends = []
        for sign in (h, -h):
            with moved(trial, sign * self.directions[0]), torch.no_grad():
                seed_everything(derived_seed(trial.recipe.seed, "step", 0))
                trial.losses(self.batch, size)
            ends.append(weighted_gradient(trial, self.batch, share))
            put_back(before)
        carried = (ends[0] - ends[1]) / (2.0 * h)
        name = self.unlike(carried[None] + self.right[0][:1], self.right[0][:1], STATE, SMALL)
        if name is not None:
            layers = sorted({f"{type(module).__name__}.{buffer}" for module, buffer, _copy in before})
            raise self.refused(
                f"the model keeps a state ({', '.join(layers[:4])}) that past weights moved and the gradient of parameter "
                f"{name!r} reads"
            )

    # ------------------------------------------------------------------ a Hessian

    def _symmetric(self, right: tuple[Tensor, Tensor]) -> Choice:
        """The update is a gradient: the fast ways must agree with double backward."""
        refusal = self.narrow
        if refusal is None:
            for kind in FAST:
                refusal = self._disagreement(kind, right)
                if refusal is None:
                    return Choice(kind=kind, checked=self.checked)
        if self._fails(SecondOrder) is None:
            return Choice(kind=SecondOrder, refusal=refusal, checked=self.checked)
        if self.narrow is not None and self._disagreement(TangentTile, right) is None:
            return Choice(kind=TangentTile, refusal=refusal, fallback=None, checked=self.checked)
        raise self.refused(f"{refusal}, and double backward fails: {self._fails(SecondOrder)}")

    def _disagreement(self, kind: type[TangentTile], right: tuple[Tensor, Tensor]) -> str | None:
        """Return why a fast way is not to be believed, or None."""
        try:
            tried = both(kind(self.trial, 0, self.batch), self.directions)
        except Exception as error:  # noqa: BLE001 - whatever torch.func cannot do, SecondOrder can
            return f"torch.func fails: {one_line(error)}"
        tolerance = TOLERANCE[self.trial.dtype]
        name = self.unlike(tried[0], right[0], tolerance, 1e-4)
        if name is not None:
            return f"its Hessian products of parameter {name!r} differ from those of double backward"
        scale = float(right[1].abs().max())
        if not bool((tried[1] - right[1]).abs().max() <= tolerance * scale):
            return "its derivatives of the losses differ from those of double backward"
        return self._fails(kind)

    # ------------------------------------------------------------------ no gradient, or a wrong rule

    def _field(self) -> Choice:
        """J v by the first way that agrees with the differences; J^T where it is the transpose of that."""
        found = None
        for kind in (*FAST, *FIELD):
            try:
                tried = both(kind(self.trial, 0, self.batch), self.directions)
            except Exception as error:  # noqa: BLE001 - as above
                logger.debug("%s fails: %s", kind.__name__, error)
                continue
            if self.difference(tried[0]) is None and self.values_agree(tried[1]):
                found = kind
                break
        why = self._what()
        if found is None or self._fails(found) is not None:
            raise self.refused(
                f"{why}, and no way to differentiate it agrees with differences of the gradient"
            )
        if not self.transposed:
            return Choice(kind=found, field=why, fallback=None)
        if self._is_symmetric(found):  # torch's double backward is wrong, or missing
            return Choice(kind=found, field=why, fallback=None)
        if self._is_transpose(FieldSecondOrder, found) and self._fails(FieldSecondOrder) is None:
            return Choice(kind=FieldSecondOrder, refusal=why, field=why, fallback=None)
        raise self.refused(f"{why}, and the transpose of its derivative cannot be had; forward mode can")

    def _what(self) -> str:
        if self.plain is None:
            return f"double backward fails ({self.error})"
        name = self.difference(self.plain[0])
        return (
            f"the derivative of the update of parameter {name!r} is not what double backward gives (something is "
            "detached, or a backward pass has no right derivative)"
        )

    def _is_symmetric(self, kind: type[TangentTile]) -> bool:
        """Whether <a, J v> = <v, J a> block by block."""
        return self._pairs(kind, self._products(kind, self.directions))

    def _is_transpose(self, kind: type[SecondOrder], of: type[TangentTile]) -> bool:
        """Whether <J^T a, v> = <a, J v> for v in every single parameter."""
        found, _ = self.double_backward(kind)
        return found is not None and self._pairs(of, found[0]) and self.values_agree(found[1])

    def _pairs(self, kind: type[TangentTile], back: Tensor) -> bool:
        """Whether ``back`` (Q, D) is J^T of the directions, J being what ``kind`` gives."""
        layout, a = self.trial.layout, self.directions
        v = a.flip(0)[:1]
        left, right, scale = [], [], []
        for i, entry in enumerate(layout.entries):
            span = slice(entry.start, entry.start + layout.size(i))
            block = torch.zeros_like(v)
            block[:, span] = v[:, span]
            product = self._products(kind, block)[0]
            left.append(back[:, span] @ v[0, span])
            right.append(a @ product)
            scale.append(product.norm() * a.norm(dim=1))
        difference = (torch.stack(left) - torch.stack(right)).abs()
        return bool(
            (difference <= 1e-8 * torch.stack(scale).clamp(min=float(torch.stack(scale).max()) * SMALL)).all()
        )

    def _products(self, kind: type[TangentTile], directions: Tensor) -> Tensor:
        return both(kind(self.trial, 0, self.batch), directions)[0]

    def refused(self, why: str) -> RecipeError:
        """Return the error of a recipe for which no way is right."""
        return RecipeError(
            f"exact tangents of this recipe cannot be had: {why}; use --hessian none or ekfac, or change the operation"
        )

    def _fails(self, kind: Way) -> str | None:
        """Return why a way does not work in the run itself: its dtype, its first and its last batch."""
        training = self.training
        for step in sorted({0, training.epoch_ends[0] - 1}):
            batch = first_samples(training, step)
            directions = random_directions((1, training.layout.dimension), training, 3)
            try:
                with unchanged_buffers(training.model):
                    kind(training, step, batch).tile(directions, torch.empty_like(directions))
            except Exception as error:  # noqa: BLE001 - as above
                what = "torch.func" if issubclass(kind, TangentTile) else "double backward"
                return f"{what} fails: {one_line(error)}"
        return None


def dependence(training: Training, kind: Way, width: int) -> set[int]:
    """Return the batch sizes for which the rows of a padded tile are not alone.

    One direction in every row must give the same bits everywhere, and in its row among others too. Which
    kernels run follows from shapes, so the recipe's own whole batch and its last one are tried. (A
    product of odd sizes may start at another alignment of memory in every row.)
    """
    found = set()
    for step in sorted({0, training.epoch_ends[0] - 1}):
        size = training.batch_size(step)
        batch = first_samples(training, step)
        one, others = (random_directions((width, training.layout.dimension), training, s) for s in (0, 1))
        way = kind(training, step, batch)
        same = _row_bits(way, one[:1].repeat(width, 1))
        mixed = _row_bits(way, torch.cat([one[:1], 100 * others[1:]]))
        if any(not torch.equal(row, same[0]) for row in [*same, mixed[0]]):
            found.add(size)
    return found


def _row_bits(way: TangentTile | SecondOrder, directions_QD: Tensor) -> Tensor:
    out = torch.empty_like(directions_QD)
    values = way.tile(directions_QD, out)
    return torch.cat([out, values], 1)
