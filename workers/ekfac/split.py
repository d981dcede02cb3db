"""Per-sample gradients as they are, and beside them the few of their turned coordinates whose curvature matters.

Most directions of an eigenbasis have so little curvature that training moves nothing along them: there the recursion
is the fast one. So rows stay what they are in the fast form (factors of Linear layers among them), and only the
coordinates that bend are formed. Letters as in ``ekfac``; C coordinates that bend.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..model.layout import Layout
from ..persample.capture import Call
from ..persample.engine import PerSampleGradients, TakeFactors, TakeRows
from ..persample.ways import Ways
from ..recipe import Recipe
from .eigenbasis import Eigenbasis
from .eigengradients import EigenGradients


class SplitGradients(EigenGradients):
    """Hands over rows as ``PerSampleGradients`` does, and before each tile its bent coordinates.

    Args:
        basis: The eigenbasis.
        coordinates: (C,) ascending; the core's among them.
        factored: Entries handed over as factors.
        rows: Of a tile.
        bent: Takes (first row, (R, C) coordinates); only valid during the call.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        layout: Layout,
        ways: Ways,
        *,
        basis: Eigenbasis,
        coordinates: Tensor,
        factored: frozenset[int],
        rows: int,
        bent: Callable[[int, Tensor], None],
    ) -> None:
        self._rows = rows
        super().__init__(recipe, model, layout, ways, basis, None, coordinates, factored)
        self._bent, self._positions = bent, coordinates

    def tile_for(self, like: Tensor) -> int:
        """See ``PerSampleGradients``."""
        return self._rows if like.device.type == "cpu" else PerSampleGradients.tile_for(self, like)

    def hand_over(
        self, positions: Tensor, size: int, sink: TakeRows, factors: TakeFactors | None = None
    ) -> None:
        """Hand over both; see ``PerSampleGradients.hand_over``."""
        self._factors, self._whole, self._positions = {}, {}, positions
        self._seen: set[int] = set()

        def keep(entry: int, d_R: Tensor, x_R: Tensor | None) -> None:
            if x_R is None:
                self._whole[entry] = d_R
            if factors is not None:
                factors(entry, d_R, x_R)

        def both(start: int, block: Tensor) -> None:
            self.given(block)
            self._bent(start, self.rotated(start, len(block)))
            sink(start, block)

        PerSampleGradients.hand_over(self, positions, size, both, keep)
        self._factors, self._whole = {}, {}

    def prepared(self, call: Call, batch_size: int) -> Tensor:
        """Turn the factors of a layer's gradients on the way; see ``PerSampleGradients.prepared``."""
        x_B = super().prepared(call, batch_size)
        for _name, i in self.owned(call):
            k = self._block_of.get(i, -1)
            if k not in self.sides:
                continue
            if k in self._seen or call.d_B is None or call.d_B.ndim != 2 or call.x_B.ndim != 2:
                self._factors.pop(k, None)  # not one outer product: the rows are turned
            elif self.wants(k):
                d_B, turned_B = EigenGradients.factors_of(self, call, i, call.d_B * self._divisor)
                at = self._positions
                self._factors[k] = d_B.index_select(0, at), turned_B.index_select(0, at)
            self._seen.add(k)
        return x_B

    def factors_of(self, call: Call, entry: int, d_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors as they are."""
        return PerSampleGradients.factors_of(self, call, entry, d_B)
