"""EKFAC where most directions are flat: the fast form, and a correction in the few coordinates that bend.

With c_t(0) the coefficient of a direction without curvature, which is the fast form's, a row is

    sum_t (N / B_t) ( c_t(0) g_t  +  Q (c_t(eigenvalue) - c_t(0)) Q^T g_t )

and the second part has only the C coordinates whose eigenvalue is not 0. So the first part is kept as in ``fast``,
weights of Linear layers as factors, and C numbers a sample beside it. Products with targets are taken likewise: of
outer products d x^T with targets that are outer products themselves as (d . d')(x . x').

With SGD, where no step clips; elsewhere a step's rows are no numbers times gradients (see ``ekfac``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.curvature import Curvature
from ...storage.trajectory import Trajectory
from ..ekfac.eigenbasis import Eigenbasis
from ..ekfac.split import SplitGradients
from ..model.layout import Layout
from ..model.row_map import Folds, RowMap
from ..persample.engine import TILE, PerSampleGradients
from ..persample.targets import outer_factors
from ..persample.ways import Ways
from ..recipe import Batch
from ..recursion.coefficients import recorded_settings
from ..recursion.eigencoefficients import EigenCoefficients
from ..recursion.rest import Rest
from ..recursion.steps import lanes_of
from ..training.training import Training
from ..training.trials import tried_ways
from .base import ProductSink, RowSink, share
from .buffers import HypergradientBuffers, row_numbers
from .fast import Scaled, Scales, StepScales, kept_as_factors
from .mapped import MappedSums
from .projection import TARGET_TILE, contributions_of, padded_tiles

ROWS = 64
"""Rows taken at a time on a CPU, where factors and a few coordinates are all that is formed of a large model."""


def bent_coordinates(curvature: Curvature) -> npt.NDArray[np.int64]:
    """Return the coordinates whose eigenvalue is not 0 at some checkpoint, and those of the core, ascending."""
    bent: npt.NDArray[np.bool_] = np.any(curvature.eigenvalues > 0, axis=0)
    if curvature.core is not None:
        bent[curvature.core.coordinates] = True
    found: npt.NDArray[np.int64] = np.flatnonzero(bent)
    return found


def splits(
    training: Training, trajectory: Trajectory, curvature: Curvature, row_map: RowMap | None = None
) -> bool:
    """Whether a replay of this curvature is less work, and less to keep, in two parts.

    Where rows are kept in part, it is always less work, and what bends must not be more than what is kept.
    """
    clips = recorded_settings(trajectory).clip_factor
    if curvature.metric is not None or (clips is not None and bool((clips < 1).any())):
        return False
    if row_map is not None:
        return len(bent_coordinates(curvature)) <= row_map.columns
    factored = kept_as_factors(training, tried_ways(training, trajectory))
    numbers = row_numbers(training.layout, factored, training.epochs)
    return numbers + len(bent_coordinates(curvature)) <= training.layout.dimension


class Split(Scaled):
    """What both sinks share: the scales of the fast form, and the coefficients of what bends beside it.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        curvature: Basis and eigenvalues.
        factored: Entries that come as factors.
        tile: Rows taken at a time on a CPU.
        ways: How gradients are had.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        curvature: Curvature,
        factored: frozenset[int],
        tile: int,
        ways: Ways,
    ) -> None:
        layout, device, dtype = training.layout, training.device, training.dtype
        settings = recorded_settings(trajectory)
        self.training = training
        self.basis = Eigenbasis(curvature.blocks, layout, dtype, device, curvature.core)
        chosen = bent_coordinates(curvature)
        self.coordinates = torch.from_numpy(chosen).to(device)
        lanes_C = self.basis.lanes(lanes_of(settings, layout))[torch.from_numpy(chosen)]
        self.engine: PerSampleGradients = SplitGradients(
            training.recipe,
            training.model,
            layout,
            ways,
            basis=self.basis,
            coordinates=self.coordinates,
            factored=factored,
            rows=tile,
            bent=self.bent,
        )
        some = replace(curvature, eigenvalues=curvature.eigenvalues[:, chosen])
        self._bends = EigenCoefficients(settings, lanes_C, some, device, torch.float64)
        self._scaling = StepScales(training, trajectory)
        self._scales = Scales(training, self._scaling, factored)
        self._lanes_C = lanes_C.to(device)
        self._members = torch.empty(0, dtype=torch.int64)

    @property
    def rest(self) -> Rest | None:  # type: ignore[override]
        """No law is known for rows that bend."""
        return None

    def begin(self, step: int, batch: Batch, members: Tensor) -> None:
        """Note the step's coefficients."""
        super().begin(step, batch, members)
        self._members = members
        if len(members):
            straight = np.append(self._scaling.coefficient(step), 0.0)
            flat = torch.from_numpy(straight).to(self._lanes_C.device)[self._lanes_C]
            bent = (self._bends.at(step) - flat) * share(self.training, step)
            self._bent_scale = bent.to(self.training.dtype)

    @abstractmethod
    def bent(self, start: int, rows_RC: Tensor) -> None:
        """Take the bent coordinates of members ``start``, start + 1, … of the step."""


class SplitRows(Split, RowSink):
    """Hypergradients in two parts; see ``Replay`` and ``Split``.

    Where rows are kept in part, the first part is folded as it comes, and what bends when it is read.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        rows: int,
        curvature: Curvature,
        row_map: RowMap | None = None,
        sampled: Sequence[int] = (),
    ) -> None:
        ways, dtype, device = tried_ways(training, trajectory), training.dtype, training.device
        mapped = row_map is not None
        factored = frozenset() if mapped else kept_as_factors(training, ways)
        super().__init__(training, trajectory, curvature, factored, TILE if mapped else ROWS, ways)
        self._sampled = list(sampled)
        self.buffers: HypergradientBuffers | None = None
        self._mapped: MappedSums | None = None
        if row_map is not None:
            self._mapped = MappedSums(rows, row_map, sampled, dtype, device)
            self._folds, self._selects = (Folds(one, dtype, device) for one in (row_map, row_map.whole))
        else:
            self.buffers = HypergradientBuffers(
                rows, training.layout, factored, self.engine.columns, training.epochs, dtype, device
            )
        padded = -(-rows // TILE) * TILE
        self._bent_sums = torch.zeros(
            padded, len(self.coordinates), dtype=training.dtype, device=training.device
        )

    def bent(self, start: int, rows_RC: Tensor) -> None:
        """Add the scaled coordinates."""
        at = self._members[start : start + len(rows_RC)].to(self._bent_sums.device)
        self._bent_sums.index_add_(0, at, rows_RC.mul_(self._bent_scale))

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the scaled gradients to the dense rows."""
        self._sums.add(rows, block, self._scales.block())

    @property
    def _sums(self) -> HypergradientBuffers | MappedSums:
        found = self._mapped or self.buffers
        assert found is not None
        return found

    def add_factors(self, entry: int, rows: Tensor, d_R: Tensor, x_R: Tensor | None) -> None:
        """Note a visit of a factored entry."""
        assert self.buffers is not None
        self.buffers.add_factors(entry, rows, d_R, x_R, self._scales.of_entry(entry))

    def end_epoch(self) -> None:
        """Let the buffers fold their factors."""
        self._sums.end_epoch()

    def whole(self) -> npt.NDArray[np.floating] | None:
        """Return sampled rows before they are folded; see ``RowSink``."""
        if self._mapped is None:
            return None
        found = self._mapped.whole()
        for start in range(0, len(self._sampled), TILE):
            chosen = self._sampled[start : start + TILE]
            turned = self._bent_sums.new_zeros(TILE, self.training.layout.dimension)
            turned[: len(chosen), self.coordinates] = self._bent_sums[chosen]
            rows = self._selects.apply_(self.basis.to_parameters(turned))
            found[start : start + len(chosen)] += rows[: len(chosen)].cpu().numpy()
        return found

    def numpy(self, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return hypergradient rows in parameter order, on the host; see ``Replay``."""
        found = self._sums.numpy(start, stop)
        found = found if self._mapped is None else found.copy()  # a view of the sums
        for tile in range(start - start % TILE, stop, TILE):  # whole tiles: the same bits for any shard
            turned = self._bent_sums.new_zeros(TILE, self.training.layout.dimension)
            turned[:, self.coordinates] = self._bent_sums[tile : tile + TILE]
            back = self.basis.to_parameters(turned)
            rows = (back if self._mapped is None else self._folds.apply_(back)).cpu().numpy()
            first, last = max(start, tile), min(stop, tile + TILE)
            found[first - start : last - start] += rows[first - tile : last - tile]
        return found


class SplitProducts(Split, ProductSink):
    """Products with targets in two parts; see ``Replay`` and ``Split``.

    Args:
        targets_QD: Gradients of the targets at w_T.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        rows: int,
        curvature: Curvature,
        targets_QD: npt.NDArray[np.floating],
    ) -> None:
        ways, layout = tried_ways(training, trajectory), training.layout
        targets = torch.from_numpy(np.array(targets_QD)).to(training.device)
        self.count = len(targets)
        tiles = padded_tiles(targets)
        outer = [i for i, strategy in enumerate(ways.strategies) if strategy == "outer"]
        factors = {i: found for i in outer if (found := _factors_of(tiles, layout, i))}
        super().__init__(training, trajectory, curvature, frozenset(factors), ROWS, ways)
        kept = torch.cat(
            [
                torch.arange(e.start, e.start + layout.size(i))
                for i, e in enumerate(layout.entries)
                if i not in factors
            ]
            or [torch.empty(0, dtype=torch.int64)]
        )
        self._dense = [tile[:, kept.to(tile.device)].T.contiguous() for tile in tiles]
        self._bent_targets = [self.basis.to_eigen(tile)[:, self.coordinates].T.contiguous() for tile in tiles]
        self._factors_of_targets = factors
        self._sums = targets.new_zeros(rows, len(tiles) * TARGET_TILE)

    def _columns(self, k: int) -> Tensor:
        return self._sums[:, k * TARGET_TILE : (k + 1) * TARGET_TILE]

    def bent(self, start: int, rows_RC: Tensor) -> None:
        """Add the products of the scaled coordinates."""
        where = self._members[start : start + len(rows_RC)].to(self._sums.device)
        rows_RC.mul_(self._bent_scale)
        for k, tile in enumerate(self._bent_targets):
            self._columns(k).index_add_(0, where, torch.mm(rows_RC, tile))

    def add(self, rows: Tensor, block: Tensor) -> None:
        """Add the products of the scaled gradients that come as rows."""
        where = rows.to(self._sums.device)
        block *= self._scales.block()
        for k, tile in enumerate(self._dense):
            self._columns(k).index_add_(0, where, torch.mm(block, tile))

    def add_factors(self, entry: int, rows: Tensor, d_R: Tensor, x_R: Tensor | None) -> None:
        """Add the products of those that come as factors, or as rows after all."""
        where, scale = rows.to(self._sums.device), self._scales.of_entry(entry)
        for k, (left, right) in enumerate(self._factors_of_targets[entry]):
            if x_R is None:
                found = (torch.matmul(d_R, right) * left).sum(1)
            else:
                found = torch.mm(d_R, left).mul_(torch.mm(x_R, right))
            self._columns(k).index_add_(0, where, found, alpha=scale)

    def contributions(self) -> npt.NDArray[np.floating]:
        """Return the contributions; see ``Replay``."""
        return contributions_of(self._sums[:, : self.count], self.training.n_train)


def _factors_of(tiles: Sequence[Tensor], layout: Layout, entry: int) -> list[tuple[Tensor, Tensor]]:
    """Return the targets' parts of a weight as outer products, (O, Q) and (I, Q) a tile; nothing where one is none."""
    start, shape, size = layout.entries[entry].start, layout.entries[entry].shape, layout.size(entry)
    found = [outer_factors(tile[:, start : start + size].reshape(-1, *shape)) for tile in tiles]
    known = [pair for pair in found if pair is not None]
    return known if len(known) == len(tiles) else []
