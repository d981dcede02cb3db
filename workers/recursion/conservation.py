"""The conservation law, checked as a run goes: what a shard tells of the sum of its rows in a few numbers.

Without the Hessian and with every training sample tracked

    sum_i hypergradient_i / N = w_T - phi_T w_0 - psi_T m_0 - rest

(m_0: the momentum that training began with, mostly none; the rest: 0 but for clipped steps and Adam, where each
replay follows it, see ``rest``). So a shard notes, for each parameter, the sum of its rows along `DIRECTIONS` random
directions of +-1: the sums of all shards must be what the record says along the same directions, and
nothing is read again. Rows that are kept in part, or folded (see ``model.row_map``), obey the law of what is kept: both sides
go through the same linear map.
Letters: n rows of a shard, D parameters, P parameter tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...storage.errors import ConservationBroken
from ...storage.trajectory import ParameterEntry, Trajectory
from ..model.row_map import RowMap
from .coefficients import phi, psi, recorded_settings
from .rest import NOISE, UNIT, Rest

DIRECTIONS = 2
"""Random directions a parameter; an error of norm e shows as about e along each."""

SAMPLED_ROWS = 64
"""Rows of a shard whose mean size says how far rounding may take the sum."""

BASE = {"float32": 1e-5, "float64": 1e-12}
"""Error allowed for the rounding of per-sample gradients, relative to the size of a row."""

NOISY = 4.0
"""How many times as much as in the trials rows may add up to something else."""

SPREAD = 6.0
"""Along a random direction an error of norm e may show as up to so many times e."""

Float = npt.NDArray[np.float64]


class FromStart:
    """What w_T holds of the weights and the momentum that training began with, without any gradient.

    Args:
        trajectory: The record.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        settings, self.first = recorded_settings(trajectory), trajectory.checkpoint(0)
        self.phi, self.psi = phi(settings), psi(settings)
        lanes = (
            [entry.group for entry in trajectory.parameters] if settings.lane_of is None else settings.lane_of
        )
        self._lane = {entry.name: int(k) for entry, k in zip(trajectory.parameters, lanes, strict=True)}

    def of(self, entry: ParameterEntry) -> tuple[Float, Float]:
        """Return phi_T w_0 and psi_T m_0 of a parameter that training moved."""
        here, lane = _span(entry), self._lane[entry.name]
        weights, momentum = (v[here].astype(np.float64) for v in (self.first.weights, self.first.momentum))
        return float(self.phi[lane]) * weights, float(self.psi[lane]) * momentum


class RowSums:
    """Adds up the rows of a shard as they are written.

    Args:
        parameters: Of the flat vector.
        row_map: What is kept of a row; None: all.
    """

    def __init__(self, parameters: Sequence[ParameterEntry], row_map: RowMap | None = None) -> None:
        self.row_map = row_map
        self.parameters = tuple(parameters) if row_map is None else row_map.kept_entries()
        self.total: Float | None = None
        self.squares: Float | None = None
        self.sampled = 0

    def add(self, rows_nD: npt.NDArray[np.floating]) -> None:
        """Take some rows."""
        ones = np.ones(len(rows_nD), dtype=rows_nD.dtype)
        part = (ones @ rows_nD).astype(np.float64)
        self.total = part if self.total is None else self.total + part
        missing = SAMPLED_ROWS - self.sampled
        if missing > 0:
            some = rows_nD[:missing].astype(np.float64)
            squares = np.array([float((some[:, _span(e)] ** 2).sum()) for e in self.parameters])
            self.squares = squares if self.squares is None else self.squares + squares
            self.sampled += len(some)

    def values(self, rest: Rest | None = None) -> dict[str, list[list[float]] | list[float]]:
        """Return what a manifest keeps.

        Returns:
            ``sum`` (P, DIRECTIONS) and ``size`` (P,), root mean square of a row; and where rows leave something
            out ``rest`` (P, DIRECTIONS), its norm ``rest_size`` (P,), and ``slack`` (P,), see ``Rest``.
        """
        assert self.total is not None
        assert self.squares is not None
        return {
            "sum": self.along(self.total),
            "size": np.sqrt(self.squares / max(self.sampled, 1)).tolist(),
            **self.left_out(rest),
        }

    def left_out(
        self, rest: Rest | None, segment: tuple[int, int] | None = None
    ) -> dict[str, list[list[float]] | list[float]]:
        """Return what `values` does of the rest; of a segment's also what `joined_rests` needs.

        Args:
            rest: What the rows leave out; None: nothing.
            segment: First batch and one past the last, where that is not all of the training.
        """
        vector = None if rest is None else rest.vector
        if rest is None or (vector is None and segment is None):
            return {}
        found: dict[str, list[list[float]] | list[float]] = {}
        if vector is not None:
            found = {**self._sized("rest", vector), "slack": self._of_kept(rest.slack).tolist()}
        if segment is not None:
            found["carried"] = self._of_kept(rest.of_segment(*segment)).tolist()
            if rest.momentum is not None:
                found |= self._sized("momentum", rest.momentum)
        return found

    def _of_kept(self, values: Float) -> Float:
        """Return what is said of the parameters that are kept, of values one a parameter."""
        return values if self.row_map is None else values[[part.entry for part in self.row_map.parts]]

    def _sized(self, name: str, vector_D: Float) -> dict[str, list[list[float]] | list[float]]:
        if self.row_map is not None:
            vector_D = self.row_map.apply(vector_D[None])[0]
        sizes = [float(np.linalg.norm(vector_D[_span(e)])) for e in self.parameters]
        return {name: self.along(vector_D), f"{name}_size": sizes}

    def along(self, vector_D: Float) -> list[list[float]]:
        """Return the products of each parameter's values with its directions, (P, DIRECTIONS)."""
        return [projections(vector_D[_span(e)], k) for k, e in enumerate(self.parameters)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """What the law came to.

    Attributes:
        worst: Name of the parameter whose sum is farthest from its limit.
        error: Its error, relative to what it moved or, where that is more, to the size of a row.
        limit: What rounding allows.
    """

    worst: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the worst parameter is within its limit."""
        return self.error <= self.limit


def law_of(
    trajectory: Trajectory,
    shards: Sequence[Mapping[str, Sequence[object]]],
    n_train: int,
    noise: float = 0.0,
    row_map: RowMap | None = None,
) -> Law:
    """Compare the sums that the shards noted with the record.

    Args:
        trajectory: The record.
        shards: What ``RowSums.values`` gave, one a shard; together they hold every training sample.
        n_train: N.
        noise: How exactly rows of a batch added up in the trials, relative; see ``Ways``.
        row_map: What is kept of a row; None: all.
    """
    sums = np.sum([np.asarray(s["sum"], dtype=np.float64) for s in shards], axis=0)
    return worst_of(laws_of(trajectory, sums, shards, n_train, noise, row_map))


def worst_of(laws: Sequence[Law]) -> Law:
    """Return the one that is farthest from its limit; NaN counts as farthest."""

    def used(law: Law) -> float:
        if not law.error <= law.limit:
            return law.error / law.limit if law.limit and law.error <= math.inf else math.inf
        return law.error / law.limit if law.limit else 0.0

    return max(laws, key=used)


def laws_of(
    trajectory: Trajectory,
    sums_PK: npt.NDArray[np.float64],
    shards: Sequence[Mapping[str, Sequence[object]]],
    n_train: int,
    noise: float = 0.0,
    row_map: RowMap | None = None,
    rounding: Float | None = None,
) -> list[Law]:
    """Compare the sum of all rows with the record, by parameter.

    Args:
        trajectory: The record.
        sums_PK: Products of the sum with each parameter's directions.
        shards: See ``law_of``; for the sizes of rows and what they leave out.
        n_train: N.
        noise: See ``law_of``.
        row_map: See ``law_of``.
        rounding: (P,) what rounding of the stored rows may come to in the mean row; None: nothing.
    """

    def of(name: str) -> Float:
        # Every replay follows the same training: the shards say the same.
        return np.mean([np.asarray(s[name], dtype=np.float64) for s in shards], axis=0)  # type: ignore[no-any-return]

    sums, sizes = (
        sums_PK / n_train,
        np.sqrt(np.mean([np.square(np.asarray(s["size"], dtype=np.float64)) for s in shards], axis=0)),
    )
    rest, rest_size, slack = np.zeros_like(sums), np.zeros_like(sizes), np.zeros_like(sizes)
    if all("rest" in shard for shard in shards):
        rest, rest_size, slack = of("rest"), of("rest_size"), of("slack")
    start, last = FromStart(trajectory), trajectory.checkpoint(-1).weights
    first = start.first.weights
    dtype, steps = str(first.dtype), len(trajectory.loss)
    found, base = [], max(BASE[dtype], NOISY * max(noise, autocast_rounding(trajectory)))
    entries = trajectory.parameters
    if row_map is not None:
        entries = tuple(row_map.entries[part.entry] for part in row_map.parts)
    for k, entry in enumerate(entries):
        here = _span(entry)
        before, after = first[here].astype(np.float64), last[here].astype(np.float64)
        # SGD leaves a parameter without a gradient alone, weight decay included: nothing is lost then.
        still = np.array_equal(before, after) and not np.any(sums[k])
        held, pushed = (before, 0.0 * before) if entry.group < 0 or still else start.of(entry)
        expected = after - held - pushed
        if row_map is not None:
            expected = row_map.apply_part(k, expected)
        squares = float(after @ after) + float(held @ held) + float(pushed @ pushed)
        drift = UNIT[dtype] * math.sqrt(steps * (squares + float(rest_size[k]) ** 2))
        scale = max(float(np.linalg.norm(expected)), float(sizes[k]))
        error = float(np.abs(sums[k] + rest[k] - projections(expected, k)).max())
        allowed = base * scale + drift + float(slack[k]) + (0.0 if rounding is None else float(rounding[k]))
        found.append((entry.name, error, allowed, scale))
    largest = max((scale for *_rest, scale in found), default=0.0)
    laws = []
    for name, error, allowed, scale in found:
        # What moved by so much less than others may be what rounding of theirs leaves of zero.
        more = UNIT[dtype] * largest if scale < NOISE * largest else 0.0
        limit, per = SPREAD * (allowed + more), scale or 1.0
        laws.append(Law(worst=name, error=error / per, limit=limit / per if scale else 0.0))
    return laws


def check_sums(
    contributions_Qn: npt.NDArray[np.floating],
    targets_QD: npt.NDArray[np.floating],
    trajectory: Trajectory,
    noise: float = 0.0,
    rest: Rest | None = None,
) -> None:
    """Hold the contributions of all samples to each target against the law.

        sum_i C(i, j) = -<w_T - phi_T w_0 - psi_T m_0 - rest, gradient of j>

    Raises:
        ConservationBroken: They do not add up.
    """
    start, last = FromStart(trajectory), trajectory.checkpoint(-1).weights
    first = start.first.weights
    dtype = str(first.dtype)
    moved = last.astype(np.float64)
    for entry in trajectory.parameters:
        here = _span(entry)
        if entry.group < 0 or np.array_equal(first[here], last[here]):
            moved[here] -= first[here]
        else:
            moved[here] -= sum(start.of(entry))
    vector = None if rest is None else rest.vector
    weights, slack = float(np.linalg.norm(last.astype(np.float64))), np.zeros(len(trajectory.parameters))
    if rest is not None and vector is not None:
        moved -= vector
        weights, slack = math.hypot(weights, float(np.linalg.norm(vector))), rest.slack
    targets, found = targets_QD.astype(np.float64), contributions_Qn.astype(np.float64)
    right = -targets @ moved
    norms = np.stack([np.linalg.norm(targets[:, _span(e)], axis=1) for e in trajectory.parameters], 1)
    drift = UNIT[dtype] * math.sqrt(len(trajectory.loss)) * weights
    rounding = np.linalg.norm(targets, axis=1) * drift + norms @ slack
    size = np.abs(found).sum(1) + rounding / BASE[dtype]
    error = np.abs(found.sum(1) - right)
    allowed = SPREAD * max(BASE[dtype], NOISY * max(noise, autocast_rounding(trajectory))) * size
    if not (error <= allowed).all():
        k = int(np.argmax(np.where(np.isnan(error), np.inf, error - allowed)))
        raise ConservationBroken(
            f"the contributions of all samples to target {k} of this block add up to {found[k].sum():.6e} and the recorded "
            f"weights say {right[k]:.6e}; {REMEDY}"
        )


def autocast_rounding(trajectory: Trajectory) -> float:
    """Return how exactly a batch's gradient is the sum of its samples', each rounded under autocast; 0 without."""
    kinds = trajectory.attrs.get("autocast", ())
    return max((float(torch.finfo(getattr(torch, kind)).eps) for kind in kinds), default=0.0)


REMEDY = "use --per-sample vjp, which differentiates every sample by itself, and please report the recipe"
"""What to do where per-sample gradients are wrong and no trial saw it."""


def projections(values: Float, k: int) -> list[float]:
    """Return the products of a parameter's values with its random directions of +-1."""
    generator = np.random.default_rng([k, 11])
    signs = generator.integers(0, 2, size=(DIRECTIONS, len(values)), dtype=np.int8)
    return [float(values[row == 1].sum() - values[row == 0].sum()) for row in signs]


def _span(entry: ParameterEntry) -> slice:
    return slice(entry.start, entry.start + math.prod(entry.shape))
