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

import copy
import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...storage.errors import RecipeError
from ..data.batches import step_batch, to_device
from ..data.cast import cast_model
from ..determinism import derived_seed, seed_everything
from ..model.state import copied, kept_buffers, put_back, unchanged_buffers
from ..persample.trials import TOLERANCE
from ..recipe import Batch
from ..training.training import Training
from .second_order import (
    FieldSecondOrder,
    FieldTangentTile,
    GraphedFieldTangentTile,
    GraphedTangentTile,
    SecondOrder,
    TangentTile,
)

logger = logging.getLogger(__name__)

MOVED = 0.05
"""How far the probe moves the weights, in standard normals: what is zero in a fresh model hides terms."""

SMALL = 1e-3
"""Share of the largest entry of J v below which a parameter's own scale is not used."""

DIFFERENCES = 1e-4
"""How far a way may be from the differences, relative to the parameter's scale: they are no better."""

STATE = 1e-3
"""How much of J v may come from past weights by way of a layer's state."""

WIDTHS = (1e-7, 1e-9)
"""h, in standard normals: the smaller one where the larger crosses a kink (ReLU, pooling)."""

DIRECTIONS = 3

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
    """

    kind: Way
    refusal: str | None = None
    fallback: type[SecondOrder] | None = SecondOrder
    field: str | None = None
    checked: bool = True


def chosen_way(training: Training, *, transposed: bool, narrow: str | None) -> Choice:
    """Return the way to J v, or to J^T v where it is ``transposed``.

    Args:
        training: At its first weights, ``batch_norm`` coupled; left as it is.
        transposed: What is wanted.
        narrow: Why directions cannot be worked on together, or None.

    Raises:
        RecipeError: No way is right, or the model cannot be copied.
    """
    return _Judge(training, transposed, narrow).choice()


class _Probe:
    """A trial of a training on one batch in float64, and J v by differences for a few directions.

    Args:
        trial: See ``_trial``; used up.
        batch: On its device, in its dtype.
    """

    def __init__(self, trial: Training, batch: Batch) -> None:
        self.trial, self.batch = trial, batch
        self.directions = _directions(trial)
        self.right = [_differences(trial, batch, self.directions, WIDTHS[0])]

    def double_backward(self, kind: type[SecondOrder]) -> tuple[tuple[Tensor, Tensor] | None, str]:
        try:
            return _both(kind(self.trial, 0, self.batch), self.directions), ""
        except RuntimeError as error:
            return None, one_line(error)

    def difference(self, tried: Tensor) -> str | None:
        """Return a parameter of which ``tried`` is not J v by differences, or None."""
        name: str | None = None
        for k, h in enumerate(WIDTHS):
            if k == len(self.right):
                self.right.append(_differences(self.trial, self.batch, self.directions, h))
            name = self.unlike(tried, self.right[k], DIFFERENCES, SMALL)
            if name is None:
                return None
        return name

    def unlike(self, tried: Tensor, right: Tensor, tolerance: float, small: float) -> str | None:
        layout = self.trial.layout
        floor = small * float(right.abs().max())
        for i, entry in enumerate(layout.entries):
            span = slice(entry.start, entry.start + layout.size(i))
            a, b = tried[:, span], right[:, span]
            if a.numel() and not bool((a - b).abs().max() <= tolerance * max(float(b.abs().max()), floor)):
                return entry.name
        return None

    def values_agree(self, values_KB: Tensor) -> bool:
        """Whether the <g_i, v>, weighted at random, are the products of a weighted gradient."""
        size = values_KB.shape[1]
        weights = torch.rand(size, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
        weights = weights.to(values_KB)
        gradient = _gradient(self.trial, self.batch, weights)
        right, found = self.directions @ gradient, values_KB @ weights
        return bool((right - found).abs().max() <= 1e-7 * float(right.abs().max()) + 1e-12)


class _Judge(_Probe):
    def __init__(self, training: Training, transposed: bool, narrow: str | None) -> None:
        self.training, self.transposed, self.narrow = training, transposed, narrow
        self.checked = True
        try:
            self._prepare(torch.float64)
        except RuntimeError as error:
            if training.dtype == torch.float64:
                raise _refused(f"its gradient fails: {one_line(error)}") from error
            logger.debug("probe in float64 failed, trying the run's dtype: %s", error)
            self.checked = False  # differences in float32 say nothing
            self._prepare(training.dtype)

    def _prepare(self, dtype: torch.dtype) -> None:
        trial = _trial(self.training, dtype)
        super().__init__(trial, first_samples(trial, 0))
        self.plain, self.error = self.double_backward(SecondOrder)

    def choice(self) -> Choice:
        if self.training.keeps_state and self.checked:
            self._check_state()
        if self.plain is not None and (not self.checked or self.difference(self.plain[0]) is None):
            return self._symmetric(self.plain)
        if not self.checked:
            raise _refused(f"it has no second derivative: {self.error}")
        return self._field()

    def _check_state(self) -> None:
        """Refuse a layer whose state carries past weights into the gradient: tangents would have to follow it.

        With S(w) the buffers after a forward pass, differences of g(w; S(w + h v)) must be nothing beside J v.
        """
        trial, size, h = self.trial, self.trial.batch_size(0), WIDTHS[0]
        share = torch.full((size,), 1.0 / size, dtype=trial.dtype, device=trial.device)
        before = kept_buffers(trial.model, statistics=False)
        ends = []
        for sign in (h, -h):
            with _moved(trial, sign * self.directions[0]), torch.no_grad():
                seed_everything(derived_seed(trial.recipe.seed, "step", 0))
                trial.losses(self.batch, size)
            ends.append(_gradient(trial, self.batch, share))
            put_back(before)
        carried = (ends[0] - ends[1]) / (2.0 * h)
        name = self.unlike(carried[None] + self.right[0][:1], self.right[0][:1], STATE, SMALL)
        if name is not None:
            layers = sorted({f"{type(module).__name__}.{buffer}" for module, buffer, _copy in before})
            raise _refused(
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
        raise _refused(f"{refusal}, and double backward fails: {self._fails(SecondOrder)}")

    def _disagreement(self, kind: type[TangentTile], right: tuple[Tensor, Tensor]) -> str | None:
        """Return why a fast way is not to be believed, or None."""
        try:
            tried = _both(kind(self.trial, 0, self.batch), self.directions)
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
                tried = _both(kind(self.trial, 0, self.batch), self.directions)
            except Exception as error:  # noqa: BLE001 - as above
                logger.debug("%s fails: %s", kind.__name__, error)
                continue
            if self.difference(tried[0]) is None and self.values_agree(tried[1]):
                found = kind
                break
        why = self._what()
        if found is None or self._fails(found) is not None:
            raise _refused(f"{why}, and no way to differentiate it agrees with differences of the gradient")
        if not self.transposed:
            return Choice(kind=found, field=why, fallback=None)
        if self._is_symmetric(found):  # torch's double backward is wrong, or missing
            return Choice(kind=found, field=why, fallback=None)
        if self._is_transpose(FieldSecondOrder, found) and self._fails(FieldSecondOrder) is None:
            return Choice(kind=FieldSecondOrder, refusal=why, field=why, fallback=None)
        raise _refused(f"{why}, and the transpose of its derivative cannot be had; forward mode can")

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
        """Whether ``back`` (K, D) is J^T of the directions, J being what ``kind`` gives."""
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
        return _both(kind(self.trial, 0, self.batch), directions)[0]

    def _fails(self, kind: Way) -> str | None:
        """Return why a way does not work in the run itself: its dtype, its first and its last batch."""
        training = self.training
        for step in sorted({0, training.steps_per_epoch - 1}):
            batch = first_samples(training, step)
            directions = random_directions((1, training.layout.dimension), training, 3)
            try:
                with unchanged_buffers(training.model):
                    kind(training, step, batch).tile(directions, torch.empty_like(directions))
            except Exception as error:  # noqa: BLE001 - as above
                what = "torch.func" if issubclass(kind, TangentTile) else "double backward"
                return f"{what} fails: {one_line(error)}"
        return None


def unlike_differences(training: Training, batch: Batch, indices: npt.NDArray[np.int64]) -> str | None:
    """Return a parameter whose double backward is not the derivative of its gradient, or None.

    Tried on the given batch, in the mode that the model is in; None too where differences mean nothing,
    because the model does not compute in float64.
    """
    trial = _trial(training, torch.float64)
    trial.batches = indices[None].astype(np.int32)
    wide = to_device(batch, training.device, torch.float64)
    try:
        probe = _Probe(trial, wide)
    except RuntimeError as error:
        logger.debug("differences in float64 failed: %s", error)
        return None
    found, _ = probe.double_backward(SecondOrder)
    return None if found is None else probe.difference(found[0])


def _refused(why: str) -> RecipeError:
    return RecipeError(
        f"exact tangents of this recipe cannot be had: {why}; use --hessian none or ekfac, or change the operation"
    )


def _trial(training: Training, dtype: torch.dtype) -> Training:
    """Return a training of a copy of the model, its weights moved."""
    trial = copy.copy(training)
    trial.model, trial.dtype = cast_model(copied(training.model), None, dtype), dtype
    trial.parameters = training.layout.parameters(trial.model)
    with torch.no_grad():
        move = MOVED * random_directions((training.layout.dimension,), trial, 2)
        parts = move.split([parameter.numel() for parameter in trial.parameters])
        for parameter, part in zip(trial.parameters, parts, strict=True):
            parameter.add_(part.view_as(parameter))
    return trial


def _directions(trial: Training) -> Tensor:
    """Return random directions (K, D); rows at a ``padding_idx``, which never move, stay out of them."""
    found = random_directions((DIRECTIONS, trial.layout.dimension), trial, 3)
    entries = {id(p): entry for p, entry in zip(trial.parameters, trial.layout.entries, strict=True)}
    for module in trial.model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and padding is not None:
            entry = entries.get(id(module.weight))
            if entry is not None:
                width = module.weight.shape[1]
                found[:, entry.start + padding * width : entry.start + (padding + 1) * width] = 0.0
    return found


def _differences(trial: Training, batch: Batch, directions_KD: Tensor, h: float) -> Tensor:
    """Return J v by central differences of the batch's gradient, (K, D)."""
    size = trial.batch_size(0)
    share = torch.full((size,), 1.0 / size, dtype=trial.dtype, device=trial.device)
    rows = []
    for v in directions_KD:
        ends = []
        for sign in (1.0, -1.0):
            with _moved(trial, sign * h * v):
                ends.append(_gradient(trial, batch, share))
        rows.append((ends[0] - ends[1]) / (2.0 * h))
    return torch.stack(rows)


class _moved:
    """Move the weights for a while, and put exactly the old ones back."""

    def __init__(self, trial: Training, by_D: Tensor) -> None:
        self.trial, self.by = trial, by_D
        self.old = [p.detach().clone() for p in trial.parameters]

    @torch.no_grad()
    def __enter__(self) -> None:
        parts = self.by.split([p.numel() for p in self.trial.parameters])
        for p, part in zip(self.trial.parameters, parts, strict=True):
            p.add_(part.view_as(p))

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for p, old in zip(self.trial.parameters, self.old, strict=True):
            p.copy_(old)


def _gradient(trial: Training, batch: Batch, weights_B: Tensor) -> Tensor:
    """Return the gradient of the weighted sum of the losses as ``backward`` gives it, (D,)."""
    seed_everything(derived_seed(trial.recipe.seed, "step", 0))
    with unchanged_buffers(trial.model):
        losses_B = trial.losses(batch, trial.batch_size(0))
        found = torch.autograd.grad(losses_B, trial.parameters, weights_B, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, trial.parameters, strict=True)]
    return torch.cat([part.detach().reshape(-1) for part in parts])


def _both(way: TangentTile | SecondOrder, directions: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(directions)
    values = way.tile(directions, out)
    return out, values.detach()


def dependence(training: Training, kind: Way, width: int) -> set[int]:
    """Return the batch sizes for which the rows of a padded tile are not alone.

    One direction in every row must give the same bits everywhere, and in its row among others too. Which
    kernels run follows from shapes, so the recipe's own whole batch and its last one are tried. (A
    product of odd sizes may start at another alignment of memory in every row.)
    """
    found = set()
    for step in sorted({0, training.steps_per_epoch - 1}):
        size = training.batch_size(step)
        batch = first_samples(training, step)
        one, others = (random_directions((width, training.layout.dimension), training, s) for s in (0, 1))
        way = kind(training, step, batch)
        same = _row_bits(way, one[:1].repeat(width, 1))
        mixed = _row_bits(way, torch.cat([one[:1], 100 * others[1:]]))
        if any(not torch.equal(row, same[0]) for row in [*same, mixed[0]]):
            found.add(size)
    return found


def _row_bits(way: TangentTile | SecondOrder, directions_KD: Tensor) -> Tensor:
    out = torch.empty_like(directions_KD)
    values = way.tile(directions_KD, out)
    return torch.cat([out, values], 1)


def first_samples(training: Training, step: int) -> Batch:
    """Return a step's batch on the device, outside of the loop; moves the generators."""
    found = step_batch(training.recipe, training.dataset, training.batches, training.recipe.seed, step)
    return to_device(found, training.device, training.dtype)


def random_directions(shape: tuple[int, ...], training: Training, seed: int) -> Tensor:
    """Return standard normals in the training's dtype, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.to(device=training.device, dtype=training.dtype)


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
