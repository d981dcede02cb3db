"""Whether products with the Gauss-Newton matrix, or a mixture, are right for a recipe, found out by trying.

On a copy of the model with slightly moved weights, in float64, as in ``probe``. Each factor of J^T H_out J has a
judge of its own. J^T is an ordinary backward pass: from d loss / d output it must give the very gradient of the
losses, or a parameter reaches them beside what the model returns. H_out must be what differences of
d loss / d output say. J must be the transpose of J^T, and with it the <g_i, v> those of a weighted gradient.
A mixture must be the sum of both products, each had by itself.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp, vjp

from ...storage.errors import RecipeError
from ..determinism import derived_seed, seed_everything
from ..model.autocast import full_precision
from ..model.state import unchanged_buffers
from ..persample.one_batch import LOOSE, TOLERANCE
from ..training.training import Training
from ..training.update_field import stopped
from .differences import (
    DIFFERENCES,
    DIRECTIONS,
    SMALL,
    WIDTHS,
    Probe,
    both,
    first_samples,
    moved_copy,
    one_line,
    random_directions,
    weighted_gradient,
)
from .gauss_newton import (
    GaussNewton,
    GaussNewtonTile,
    GraphedMixedTile,
    Mixed,
    MixedTile,
    Outputs,
    mixture,
)
from .probe import Choice, Judge, Way, chosen_way

logger = logging.getLogger(__name__)

AGREE = 1e-7
"""How far <g_i, v> may be from products with a weighted gradient in float64, relative."""

MATRIX = "the Gauss-Newton matrix of what the model returns"
"""What stands in the Hessian's place, in a manifest's words."""


def chosen_products(training: Training, *, share: float, narrow: str | None) -> Choice:
    """Return the way to products with ``share`` of the Hessian and the rest of the Gauss-Newton matrix.

    Args:
        training: At its first weights, ``batch_norm`` coupled; left as it is.
        share: S, from 0 to below 1.
        narrow: Why directions cannot be worked on together, or None.

    Raises:
        RecipeError: No way is right, or the model cannot be copied.
    """
    if share == 0.0:
        return GaussNewtonJudge(training, narrow).choice()
    return _MixtureJudge(training, narrow, share).choice()


class GaussNewtonJudge(Judge):
    """Tries the ways to J^T H_out J; arguments as for ``chosen_products``."""

    def __init__(self, training: Training, narrow: str | None) -> None:
        self.detached = False
        super().__init__(training, transposed=False, narrow=narrow)

    def _prepare(self, dtype: torch.dtype) -> None:
        trial = moved_copy(self.training, dtype)
        Probe.__init__(self, trial, first_samples(trial, 0))

    def refused(self, why: str) -> RecipeError:
        """See ``Judge.refused``."""
        return RecipeError(
            f"Gauss-Newton products of this recipe cannot be had: {why}; otherwise use --hessian exact, ekfac or none"
        )

    def choice(self) -> Choice:
        """Return the first way that is right."""
        if self.training.keeps_state and self.checked:
            self._check_state()
        parts = Outputs(self.trial, 0, self.batch)
        # Losses that compute in float32 or less, whatever the run does, are no exacter than that.
        self.tolerance = max(TOLERANCE[self.trial.dtype], TOLERANCE.get(parts.losses.dtype, LOOSE))
        self._check_cut(parts)
        self._check_curvature(parts)
        found = self._first(parts)
        matrix = f"{MATRIX} in the Hessian's place"
        if self.detached:
            matrix += "; what the losses detach counts as a constant"
        return replace(found, checked=self.checked, matrix=matrix)

    def _first(self, parts: Outputs) -> Choice:
        refusal = self.narrow
        singles = self._disagrees(GaussNewton, parts)
        if refusal is None:
            refusal = self._disagrees(GaussNewtonTile, parts)
            if refusal is None:
                return Choice(kind=GaussNewtonTile, fallback=GaussNewton if singles is None else None)
        if singles is None:
            return Choice(kind=GaussNewton, refusal=refusal, fallback=None)
        alone = self._disagrees(GaussNewtonTile, parts, alone=True)
        if alone is None:
            return Choice(kind=GaussNewtonTile, refusal=refusal, fallback=None, alone=True)
        raise self.refused(f"forward mode: {alone}; backward through backward: {singles}")

    def _check_cut(self, parts: Outputs) -> None:
        """Refuse losses that are no function of what the model returns."""
        calls = parts.calls
        if not calls.count:
            raise self.refused("losses() does not call the model; call it: outputs = model(inputs)")
        if not calls.made:
            raise self.refused(
                "losses() uses no tensor that the model's forward returns; let it return a tensor, tuple, dict or "
                "dataclass of tensors and let losses() use them"
            )
        through = torch.cat([one.reshape(-1) for one in parts.back(parts.slope, many=False)]).detach()
        whole = weighted_gradient(self.trial, self.batch, parts.share.detach())
        name = self.unlike(through[None], whole[None], self.tolerance, 1e-4)
        if name is not None:
            raise self.refused(
                f"parameter {name!r} reaches the losses otherwise than through what the model returns when losses() calls "
                "it; do all that needs parameters in the model's forward, and let weight_decay be the penalty"
            )

    def _check_curvature(self, parts: Outputs) -> None:
        """Refuse losses whose second derivative with respect to the outputs is zero, missing or wrong."""
        along = [
            random_directions((DIRECTIONS, *output.shape), self.trial, 6 + i)
            for i, output in enumerate(parts.calls.starts)
        ]
        rows = [[one[q] for one in along] for q in range(DIRECTIONS)]
        try:
            found = [_flat(parts.bend(row, many=False)[1]) for row in rows]
        except RuntimeError as error:
            raise self.refused(
                f"the losses have no second derivative with respect to what the model returns ({one_line(error)})"
            ) from error
        if not any(bool(one.any()) for one in found):
            raise self.refused(
                "the losses are linear in what the model returns, so that the Gauss-Newton matrix is zero; let the model "
                "return its outputs and losses() take the loss of them"
            )
        if not self.checked:
            return
        exactly = self.tolerance == TOLERANCE[torch.float64]
        if exactly and all(
            self._is_difference(parts, row, one) for row, one in zip(rows, found, strict=True)
        ):
            return
        self.detached = exactly
        if all(self._is_derivative(parts, row, one) for row, one in zip(rows, found, strict=True)):
            return
        raise self.refused(
            "the second derivative of the losses with respect to what the model returns is not what differences say"
        )

    def _losses(self, parts: Outputs, outputs: list[Tensor]) -> Tensor:
        trial = self.trial
        seed_everything(derived_seed(trial.recipe.seed, "step", 0))
        with unchanged_buffers(trial.model), full_precision():
            return parts.calls.losses(lambda: trial.losses(self.batch, trial.batch_size(0)), outputs)

    def _is_difference(self, parts: Outputs, along: list[Tensor], found: Tensor) -> bool:
        """Whether H_out a is (q(o + h a) - q(o - h a)) / 2h, q = d batch loss / d o."""
        for h in WIDTHS:
            ends = []
            for sign in (h, -h):
                outputs = [
                    (start.detach() + sign * a).requires_grad_()
                    for start, a in zip(parts.calls.starts, along, strict=True)
                ]
                losses = self._losses(parts, outputs)
                ends.append(_flat(torch.autograd.grad(losses, outputs, parts.share.detach())))
            right = (ends[0] - ends[1]) / (2.0 * h)
            # Entries of q are no exacter than their rounding, which differences divide by h.
            scale = max(float(right.abs().max()), SMALL * float(ends[0].abs().max()))
            if bool((found - right).abs().max() <= DIFFERENCES * scale):
                return True
        return False

    def _is_derivative(self, parts: Outputs, along: list[Tensor], found: Tensor) -> bool:
        """Whether H_out a is had by forward mode too, where what is detached is a constant as well."""

        def slope(outputs: list[Tensor]) -> list[Tensor]:
            _losses, pull, *_ = vjp(lambda given: self._losses(parts, given), outputs)
            (gradient,) = pull(parts.share.detach())
            return list(gradient)

        starts = [start.detach() for start in parts.calls.starts]
        try:
            with stopped():
                right = _flat(jvp(slope, (starts,), (along,))[1])
        except Exception as error:  # noqa: BLE001 - whatever torch.func cannot do
            logger.debug("forward mode through the losses fails: %s", one_line(error))
            return False
        return bool((found - right).abs().max() <= self.tolerance * float(right.abs().max()))

    def _disagrees(
        self, kind: type[GaussNewtonTile | GaussNewton], parts: Outputs, *, alone: bool = False
    ) -> str | None:
        """Return why a way is not to be believed, or None."""
        what = "torch.func" if issubclass(kind, GaussNewtonTile) else "double backward"
        directions = self.directions[:1] if alone else self.directions
        try:
            way = kind(self.trial, 0, self.batch)
            along = way.along(directions)
            products, values = both(way, directions)
        except Exception as error:  # noqa: BLE001 - as above
            return f"{what} fails: {one_line(error)}"
        for q, v in enumerate(directions):
            u = [random_directions(tuple(one.shape[1:]), self.trial, 16 + q) for one in along]
            row = [one[q] for one in along]
            back = _flat(parts.back(u, many=False))
            forth = float(_flat(u) @ _flat(row))
            scale = float(_flat(u).norm() * _flat(row).norm())
            if not abs(forth - float(back @ v)) <= self.tolerance * scale:
                return f"{what}: the outputs' derivative is not the transpose of backward's"
            right = _flat(parts.back(parts.bend(row, many=False)[1], many=False))
            name = self.unlike(products[q : q + 1], right[None], self.tolerance, 1e-4)
            if name is not None:
                return f"{what}: products of parameter {name!r} in a tile differ from those alone"
        if not self._right_values(values, directions):
            return f"{what}: the derivatives of the losses are not those of a weighted gradient"
        return self._fails(kind)

    def _right_values(self, values_QB: Tensor, directions_QD: Tensor) -> bool:
        """Whether the <g_i, v>, weighted at random, are the products of a weighted gradient."""
        drawn = random_directions((values_QB.shape[1],), self.trial, 5).abs() + 0.5
        right = directions_QD @ weighted_gradient(self.trial, self.batch, drawn)
        allowed = max(self.tolerance, AGREE) * float(right.abs().max()) + 1e-12
        return bool((right - values_QB.to(drawn) @ drawn).abs().max() <= allowed)


class _MixtureJudge(GaussNewtonJudge):
    """Tries the ways to S H + (1 - S) J^T H_out J against the sum of both products."""

    def __init__(self, training: Training, narrow: str | None, share: float) -> None:
        super().__init__(training, narrow)
        self.share = share

    def choice(self) -> Choice:
        first = super().choice()
        exact = chosen_way(self.training, transposed=False, narrow=self.narrow)
        if exact.field is not None:
            raise self.refused(exact.field)
        right = self._sum(exact.kind, first.kind)
        refusal = self.narrow
        single = mixture(Mixed, self.share)
        singles = self._is_not(single, right)
        matrix = f"{self.share:g} of the Hessian and {1 - self.share:g} of {MATRIX}"
        if refusal is None:
            for kind in (MixedTile, GraphedMixedTile):
                way = mixture(kind, self.share)
                refusal = self._is_not(way, right)
                if refusal is None:
                    return Choice(
                        kind=way,
                        fallback=single if singles is None else None,  # type: ignore[arg-type]
                        checked=self.checked,
                        matrix=matrix,
                    )
        if singles is None:
            return Choice(kind=single, refusal=refusal, fallback=None, checked=self.checked, matrix=matrix)
        raise self.refused(f"{refusal}; {singles}")

    def _sum(self, exact: Way, gauss_newton: Way) -> Tensor:
        products = []
        for kind in (exact, gauss_newton):
            way = kind(self.trial, 0, self.batch)
            products.append(torch.cat([both(way, v[None])[0] for v in self.directions]))
        return self.share * products[0] + (1.0 - self.share) * products[1]

    def _is_not(self, kind: Way, right: Tensor) -> str | None:
        try:
            products, values = both(kind(self.trial, 0, self.batch), self.directions)
        except Exception as error:  # noqa: BLE001 - as above
            return f"{kind.__name__} fails: {one_line(error)}"
        # Parts are divided by the share and multiplied with it.
        name = self.unlike(products, right, self.tolerance / min(self.share, 1.0), 1e-4)
        if name is not None:
            return f"mixed products of parameter {name!r} are not the sum of both"
        if not self._right_values(values, self.directions):
            return "the derivatives of the losses are not those of a weighted gradient"
        return self._fails(kind)


def _flat(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])
