"""How long the stages of a run will take, from two trial steps: rough, and only ever shown.

The factors are measured (``docs/benchmarks.md``); letters as in ``plan``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...storage.precision import NUMBER_BYTES
from ...workers.ekfac.curvature import PASSES
from ..spec.groups import CurvatureSpec
from ..spec.spec import RunSpec
from ..vocabulary import (
    ADJOINT,
    CARRIED,
    CORRECTION,
    CURVATURE,
    EKFAC,
    GAUSS_NEWTON,
    PREFLIGHT,
    RECORD,
    REDUCE,
    REPLAY,
    TEST_GRADIENTS,
)
from .segmenting import Segmented, replay_seconds
from .sharding import Shard
from .survey import Survey

START = 0.7
"""Seconds that a stage takes before its first step: data, model, trials."""

LOOP = 1.33
"""A step in its loop, with its batch, checks and whatever is noted of it, to one of the two that are tried."""

STORE_RATE = 0.45e9
"""Bytes of rows a second that are written with their digests, and read with them."""

ROTATED = 4
"""Steps' time that it takes to turn the rows of one batch out of EKFAC's basis, once a row."""

MATMUL_RATE = 40e9
"""Multiply-adds of float32 a second and thread assumed for the reduce stage."""

PRODUCT = 1.4
"""Plain steps that a Hessian product in a tile takes, with what surrounds it."""

FIRST_PRODUCT = 1.5
"""What the first of a step takes besides: forward and backward pass, which the others share."""

GAUSS_NEWTON_PRODUCT = 1.3
"""The same of a Gauss-Newton product."""

PREFLIGHT_TRAININGS = 13
"""Plain trainings that the preflight of the exact form takes."""

ENOUGH = 128
"""Vectors (tracked samples, targets or directions) of an exact stage from which on it has a preflight."""


def curvature_passes(spec: CurvatureSpec) -> int:
    """Return how often the samples of EKFAC's curvature are run, over all its checkpoints."""
    count = spec.curvature_checkpoints if spec.curvature_at is None else len(spec.curvature_at)
    return count * PASSES


def seconds_of(
    surveyed: Survey,
    shards: Sequence[Shard],
    slots: int,
    targets: int,
    spec: RunSpec,
    segments: Segmented,
) -> dict[str, float]:
    """Return seconds by stage and their ``total``; nothing where no step was tried.

    Args:
        surveyed: The recipe's numbers.
        shards: Of tracked samples or targets.
        slots: Units in work at the same time.
        targets: Columns of the contributions.
        spec: What to run.
        segments: Of the replay.
    """
    if surveyed.step_seconds is None:
        return {}
    plain, tracked = surveyed.step_seconds
    n, m, steps, batch = (
        len(surveyed.tracked),
        len(surveyed.tested),
        surveyed.steps,
        int(surveyed.recipe.batch_size),
    )
    widest = max(shard.stop - shard.start for shard in shards)
    times = {RECORD: START + LOOP * steps * plain, TEST_GRADIENTS: START + tracked * m / batch / slots}
    if spec.form == EKFAC:
        sampled = math.ceil(min(spec.curvature_samples, surveyed.n_train) / batch)
        times[CURVATURE] = START + curvature_passes(spec) * sampled * tracked
    exact = shards[-1].stop if spec.form in CARRIED else spec.exact_rank
    if exact >= ENOUGH:
        times[PREFLIGHT] = PREFLIGHT_TRAININGS * steps * plain
    if spec.form in CARRIED:
        product = GAUSS_NEWTON_PRODUCT if spec.form == GAUSS_NEWTON else PRODUCT
        # Where the record keeps the weights of every step, the adjoint of SGD takes none again.
        read = spec.mode == ADJOINT and spec.checkpoint_every == 1 and surveyed.optimizer_vectors < 2
        # Forwards, a row has no tangent before its first visit: half of the first epoch.
        moving = 1.0 if spec.mode == ADJOINT else 1 - 0.5 / max(1.0, steps * batch / surveyed.n_train)
        one = steps * plain * ((0 if read else 1) + FIRST_PRODUCT + product * widest * moving)
    elif spec.mode == ADJOINT or spec.form == EKFAC:
        one = steps * tracked
    else:
        one = steps * (plain + (tracked - plain) * min(1.0, widest / surveyed.n_train))
    times[REPLAY] = (START + LOOP * one) * math.ceil(len(shards) / slots)
    if segments.count > 1:
        share = 1.0 if spec.form == EKFAC else widest / surveyed.n_train
        times[REPLAY] = START + replay_seconds(
            LOOP * plain, LOOP * tracked, steps, share, len(shards), segments, slots
        )
    stored = (
        0.0 if spec.mode == ADJOINT else n * surveyed.columns * NUMBER_BYTES[spec.kept_dtype] / STORE_RATE
    )
    times[REPLAY] += stored / slots
    if spec.form == EKFAC and spec.mode != ADJOINT:
        times[REPLAY] += ROTATED * tracked * n / batch / slots
    if spec.exact_rank:
        times[CORRECTION] = steps * plain * (2 + PRODUCT) * spec.exact_rank / slots
    joined = n * targets * surveyed.columns / (MATMUL_RATE * spec.torch_threads)
    times[REDUCE] = (START + (stored + joined) / slots) if spec.mode != ADJOINT else 0.0
    return {**times, "total": sum(times.values())}
