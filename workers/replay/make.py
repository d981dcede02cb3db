"""Which replay makes a form of the Hessian in a mode."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from ...storage.curvature import Curvature
from ...storage.trajectory import Trajectory
from ..hessian.tiles import TILE
from ..recursion.forms import ADJOINT, CARRIED, EKFAC, FAST, FORWARD, Mode
from ..training.training import Training
from ..training.verified import Rows
from .adjoint import Adjoint
from .base import ProductSink, Replay, RowSink
from .ekfac import EkfacProducts, EkfacRows
from .exact import ExactRows
from .fast import FastRows
from .projection import FastProducts
from .split import SplitProducts, SplitRows, splits


@overload
def make_replay(
    form: str,
    mode: Literal["forward"],
    training: Training,
    trajectory: Trajectory,
    tracked: Rows,
    *,
    curvature: Curvature | None = None,
    share: float = 1.0,
) -> Replay[RowSink]: ...


@overload
def make_replay(
    form: str,
    mode: Literal["adjoint"],
    training: Training,
    trajectory: Trajectory,
    tracked: Rows,
    *,
    curvature: Curvature | None = None,
    share: float = 1.0,
    targets: npt.NDArray[np.floating],
    tile: int = TILE,
) -> Replay[ProductSink] | Adjoint: ...


def make_replay(
    form: str,
    mode: Mode,
    training: Training,
    trajectory: Trajectory,
    tracked: Rows,
    *,
    curvature: Curvature | None = None,
    share: float = 1.0,
    targets: npt.NDArray[np.floating] | None = None,
    tile: int = TILE,
) -> Replay[RowSink] | Replay[ProductSink] | Adjoint:
    """Return what replays the record in a form and a mode: ``run`` it, take the result, ``close`` it.

    Args:
        form: One of ``recursion.forms``.
        mode: ``forward``, whose result are rows ``numpy(start, stop)``, or ``adjoint``, whose result are
            ``contributions()``.
        training: A fresh ``Training`` of the recipe; its ``batch_norm`` coupled for the forms that are ``CARRIED``.
        trajectory: The record.
        tracked: Train indices, (n,).
        curvature: For the EKFAC form: basis and eigenvalues.
        share: For ``CARRIED`` forms: of the Hessian in the products, 1 exact, 0 Gauss-Newton; see ``HessianTiles``.
        targets: In adjoint mode the gradients of the targets at w_T, (Q, D).
        tile: For ``CARRIED`` forms in adjoint mode: targets carried together; see ``Adjoint``.

    Raises:
        ReplayDiverged: See ``VerifiedReplay``.
    """
    given = (training, trajectory, tracked)
    assert (curvature is not None) == (form == EKFAC), form
    assert (targets is not None) == (mode == ADJOINT), mode
    assert form in (FAST, EKFAC, *CARRIED), form
    assert mode in (FORWARD, ADJOINT), mode
    if targets is None:
        if curvature is not None:
            rows = SplitRows if splits(training, trajectory, curvature) else EkfacRows
            return Replay(*given, partial(rows, curvature=curvature))
        return Replay(*given, partial(ExactRows, share=share) if form in CARRIED else FastRows)
    if curvature is not None:
        products = SplitProducts if splits(training, trajectory, curvature) else EkfacProducts
        return Replay(*given, partial(products, curvature=curvature, targets_QD=targets))
    if form in CARRIED:
        return Adjoint(*given, targets, share=share, tile=tile)
    return Replay(*given, partial(FastProducts, targets_QD=targets))
