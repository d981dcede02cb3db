"""Hypergradients over training: at chosen epochs, what they would be had training ended there.

Several forms are replayed in lockstep, so that each sample's error is taken while both
hypergradients are in memory and none has to be stored. ``exact`` is the reference. Letters: n tracked
samples, M test samples, D parameters, E epochs.

The raw-decay forms use N times the optimiser's weight decay in the recursion (and not in training), as
the first published code of the HyDRA paper did: see ``docs/evaluate.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.curvature import Curvature
from ...storage.trajectory import Trajectory
from ..model.state import pack_buffers
from ..persample.engine import TILE
from ..recipe import Recipe
from ..recursion.coefficients import recorded_settings
from ..recursion.forms import EKFAC, EXACT, FAST
from ..training.test_gradients import TEST_BATCH, TestGradients
from ..training.training import Compute, Training
from ..training.truncated import with_decay
from ..training.verified import Report
from .base import Replay, Sink
from .exact import ExactRows
from .segmented import ekfac_segments, fast_segments

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

RAW = "-raw-decay"
"""Ending of a form's name whose recursion has N times the weight decay."""


def pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return (reference, method) of what is compared: all with the exact form, raw with raw as well."""
    found: list[tuple[str, str]] = [(EXACT, method) for method in methods if method != EXACT]
    if EXACT + RAW in methods:  # not the forms with the true decay: two changes at once say nothing
        left = (EXACT, EXACT + RAW, FAST, EKFAC)
        found += [(EXACT + RAW, method) for method in methods if method not in left]
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class State:
    """One form at one epoch.

    Attributes:
        contribution: C(i, j) as if training had ended there, (n, M) in the run's dtype.
        mean: C(i), its mean over the test samples, (n,).
        norm: l2 norm of the hypergradients, (n,).
        error: l2 norm of the difference to each reference's, (n,).
    """

    contribution: npt.NDArray[np.floating]
    mean: Floats
    norm: Floats
    error: Mapping[str, Floats]


class ByEpoch:
    """Follows some tracked samples through the recorded training.

    Args:
        recipe: The recipe that was recorded.
        compute: How the run computes.
        exact: The same with BatchNorm coupled, for the exact form.
        trajectory: The record.
        tracked: Train indices, (n,).
        first_row: Place of the first of them among all tracked samples: fixes the tiles, so that bits
            do not depend on how the samples are cut into shards.
        tested: Test indices, (M,).
        epochs: Ascending; the states after them are wanted.
        curvature: For the EKFAC form; None: without it.
        raw_decay: Whether to carry the raw-decay forms.
    """

    def __init__(
        self,
        recipe: Recipe,
        compute: Compute,
        exact: Compute,
        trajectory: Trajectory,
        *,
        tracked: Integers,
        first_row: int,
        tested: Integers,
        epochs: Sequence[int],
        curvature: Curvature | None = None,
        raw_decay: bool = False,
    ) -> None:
        self.tracked, self.tested, self.epochs = tracked, tested, list(epochs)
        self.lead = first_row % TILE
        training = Training(recipe, compute)
        self.ends, self.n_train = training.epoch_ends, training.n_train
        raw = with_decay(trajectory, self.n_train)
        borders = [self.ends[epoch - 1] for epoch in self.epochs]
        exact_form = Replay(Training(recipe, exact), trajectory, tracked, ExactRows)
        settings = [recorded_settings(record) for record in (trajectory, raw)[: 1 + raw_decay]]
        fast_sink = partial(fast_segments, borders=borders, settings=settings)
        fast = Replay(training, trajectory, tracked, fast_sink)
        self.replays: list[Replay[Sink]] = [exact_form, fast]
        self.forms: dict[str, Callable[[], Tensor]] = {
            EXACT: lambda: exact_form.sink.weights,
            FAST: lambda: fast.sink.state(0),
        }
        if curvature is not None:
            bent_sink = partial(ekfac_segments, borders=borders, curvature=curvature)
            bent = Replay(Training(recipe, compute), trajectory, tracked, bent_sink)
            self.replays.append(bent)
            self.forms[EKFAC] = bent.sink.state
        if raw_decay:
            exact_raw = Replay(Training(recipe, exact), raw, tracked, ExactRows)
            exact_raw.train_as(trajectory)
            self.replays.append(exact_raw)
            self.forms[EXACT + RAW] = lambda: exact_raw.sink.weights
            self.forms[FAST + RAW] = lambda: fast.sink.state(1)
        self._standing = training
        self._gradients = TestGradients(Training(recipe, compute), trajectory)

    def run(self, report: Report | None = None) -> Iterator[tuple[int, dict[str, State]]]:
        """Yield (epoch, state by form) as training goes on.

        Args:
            report: Told of (steps done, steps in all), the replays' steps counted together.

        Raises:
            ReplayDiverged, NonFiniteLoss: As ``VerifiedReplay.replay``.
        """
        total = len(self.replays) * self.ends[self.epochs[-1] - 1]
        for epoch in self.epochs:
            for replay in self.replays:

                def moved(_done: int, _total: int) -> None:
                    if report:
                        report(sum(one.done for one in self.replays), total)

                replay.advance(self.ends[epoch - 1], moved)
            yield epoch, self._look()

    def close(self) -> None:
        """Take the hooks off the models."""
        for replay in self.replays:
            replay.close()
        self._gradients.engine.close()

    def _look(self) -> dict[str, State]:
        forms = {name: state() for name, state in self.forms.items()}
        contribution = self._contributions(forms)
        against = pairs(list(forms))
        found = {}
        for name, rows in forms.items():
            error = {
                reference: self._norms(rows, forms[reference])
                for reference, method in against
                if method == name
            }
            mean = contribution[name].astype(np.float64).mean(1)
            found[name] = State(
                contribution=contribution[name], mean=mean, norm=self._norms(rows, None), error=error
            )
        return found

    def _contributions(self, forms: Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.floating]]:
        """Return C(i, j) of each form at the present weights, (n, M)."""
        standing, beside = self._standing, self._gradients.training
        beside.load_weights(standing.weights().cpu().numpy(), pack_buffers(standing.model))
        like = next(iter(forms.values()))
        out = {name: like.new_empty(len(self.tracked), len(self.tested)) for name in forms}
        for start in range(0, len(self.tested), TEST_BATCH):
            chosen = self.tested[start : start + TEST_BATCH]
            gradient = torch.from_numpy(self._gradients.rows(chosen).gradient).to(like.device)
            for name, rows in forms.items():
                for place, span, tile in self._tiles(rows):
                    product = torch.mm(tile, gradient.T)[span]
                    out[name][place, start : start + len(chosen)] = product
        return {name: (values / -float(self.n_train)).cpu().numpy() for name, values in out.items()}

    def _tiles(self, rows: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (place among the rows, place in the tile, tile of ``TILE`` rows), borders fixed for the run."""
        tile = rows.new_zeros(TILE, rows.shape[1])
        for start in range(-self.lead, len(rows), TILE):
            place = slice(max(start, 0), min(start + TILE, len(rows)))
            span = slice(place.start - start, place.stop - start)
            tile.zero_()
            tile[span] = rows[place]
            yield place, span, tile

    def _norms(self, rows: Tensor, base: Tensor | None) -> Floats:
        """Return each row's norm, or that of its difference to ``base``'s row, (n,)."""
        found = np.empty(len(rows))
        row = torch.empty(rows.shape[1], dtype=torch.float64, device=rows.device)
        for r in range(len(rows)):
            row.copy_(rows[r])
            if base is not None:
                row -= base[r]
            found[r] = float(row.norm())
        return found
